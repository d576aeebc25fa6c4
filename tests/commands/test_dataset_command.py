"""The command as a whole; each dataset has a test of its own in ``tests/datasets``."""

from __future__ import annotations

import pytest

from nnunet_ssl.commands.dataset import main
from nnunet_ssl.datasets import MADE_UP, PUBLISHED
from nnunet_ssl.datasets.cases import Files
from nnunet_ssl.demo.dataset import write_dataset
from nnunet_ssl.errors import UserError


def test_list(capsys):
    main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*PUBLISHED, *MADE_UP]


@pytest.mark.parametrize("name", [*PUBLISHED, *MADE_UP])
def test_help_tells_what_a_dataset_needs(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "-h"])
    assert f"nnUNetv2_ssl_dataset {name} " in capsys.readouterr().out.partition("usage")[2].partition("\n\n")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a dataset, one of acdc, amos"),
        (["no_such"], "invalid choice: 'no_such'"),
        (["la", "-d", "650"], "required: --data. See nnUNetv2_ssl_dataset la --help"),
        (["la", "-d", "1000", "--data", "x"], "-d: '1000' must be a dataset id"),
        (["la", "-d", "650", "--data", "x", "-np", "0"], "-np: '0' must be"),
        (["hippocampus", "-d", "650", "--data", "x", "--train-list", "x"], "unrecognized arguments: --train-list"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_the_demos_cases_with_all_labels(fresh_folders, tmp_path):
    main(["demo", "-d", "7"])
    made, demo = fresh_folders.raw / "Dataset007_SSLDemoAllLabels", write_dataset(tmp_path, 0, unlabeled=1, test=0)
    labels = Files(made / "labelsTr", "{}.nii.gz").found
    assert sorted(labels) == [f"case_{number:03d}" for number in range(55)]
    for file in [*(demo / "imagesTr").iterdir(), *(demo / "labelsTr").iterdir()]:
        assert (made / file.parent.name / file.name).read_bytes() == file.read_bytes()
    (unlabeled,) = (demo / "imagesUn").iterdir()
    assert (made / "imagesTr" / unlabeled.name).read_bytes() == unlabeled.read_bytes()
    with pytest.raises(UserError, match="-d 7: Dataset007_SSLDemoAllLabels exists already"):
        main(["demo", "-d", "7"])
