"""``nnUNetv2_ssl_dataset amos`` on made-up files with the challenge's folders and numbers."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from helpers.raw_files import array, cases, fold, image, label, nothing_written, write

from nnunet_ssl.commands.dataset import main
from nnunet_ssl.datasets import writing
from nnunet_ssl.datasets.amos import LABELED, VALIDATION
from nnunet_ssl.errors import UserError

CT, MRI = "0078", "0514"  # labeled ones


def numbers(known: set[str], first_ct: int, ct: int, first_mri: int, mri: int) -> list[str]:
    """``ct`` numbers below 500 and ``mri`` above, those known to exist and made-up ones."""
    result: list[str] = []
    for low, high, first, count in ((0, 500, first_ct, ct), (500, 1000, first_mri, mri)):
        kind = sorted(case for case in known if low <= int(case) < high)
        kind += [case for number in range(first, high) if (case := f"{number:04d}") not in known]
        result += kind[:count]
    return result


KNOWN = {*VALIDATION, *LABELED[4], *LABELED[10]}
TRAIN = numbers(KNOWN, 1, 200, 600, 40)
TEST = [case for case in numbers(set(), 250, 200, 700, 20) if case not in TRAIN][-120:]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """240 and 120 cases; of the labels only those that are wanted."""
    root = tmp_path_factory.mktemp("amos22")
    content = {
        "images": write(root / "image.nii.gz", image()).read_bytes(),
        "labels": write(root / "label.nii.gz", label(*range(16), dtype=np.float64)).read_bytes(),
    }
    for suffix, found in (("Tr", TRAIN), ("Va", TEST)):
        for kind, data in content.items():
            (root / f"{kind}{suffix}").mkdir()
            for case in found:
                if kind == "images" or suffix == "Va" or case in KNOWN:
                    (root / f"{kind}{suffix}" / f"amos_{case}.nii.gz").write_bytes(data)
    return root


def run(data, *more):
    main(["amos", "--data", str(data), "-d", "711", *more])


def test_the_made_up_numbers_are_like_the_published_ones():
    for found, ct, mri in ((TRAIN, 200, 40), (TEST, 100, 20)):
        assert sum(case < "0500" for case in found) == ct
        assert sum(case >= "0500" for case in found) == mri


@pytest.fixture
def names_only(monkeypatch):
    """Which case becomes what, without reading 360 files; ``test_files`` reads some."""
    made = []
    monkeypatch.setattr(writing, "_check", lambda case, recipe: made.append(case) or [])
    monkeypatch.setattr(writing, "_write", lambda case, recipe, target: None)
    return made


def sizes(made) -> dict[str, int]:
    return dict(Counter(case.part for case in made))


def test_published_lists(published, fresh_folders, names_only):
    run(published)
    labeled, validation = ([f"amos_{case}" for case in sorted(found)] for found in (LABELED[10], VALIDATION))
    assert fold(fresh_folders, "Dataset711_AMOSLabeled10") == {"train": labeled, "val": validation}
    assert sizes(names_only) == {"labeled": 10, "validation": 24, "unlabeled": 206, "test": 120}
    assert {case.name for case in names_only if case.part == "test"} == {f"amos_{case}" for case in TEST}
    assert all((case.label is None) == (case.part == "unlabeled") for case in names_only)
    content = json.loads((fresh_folders.raw / "Dataset711_AMOSLabeled10" / "dataset.json").read_text())
    assert content["channel_names"]["0"] != "CT"
    assert list(content["labels"].values()) == list(range(16))
    assert content["labels"]["bladder"] == 14
    assert sorted(label for group in content["class_groups"].values() for label in group) == list(range(1, 16))


def test_ct_only(published, fresh_folders, names_only):
    run(published, "--ct-only")
    assert sizes(names_only) == {"labeled": 7, "validation": 18, "unlabeled": 175, "test": 100}
    content = json.loads((fresh_folders.raw / "Dataset711_AMOSCTLabeled7" / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "CT"}


@pytest.mark.parametrize(("options", "mri_low"), [([], -1000), (["--clip-mri"], -125)])
def test_files(published, fresh_folders, tmp_path, options, mri_low):
    """The window is for CT."""
    for name, found in (("train", [CT, MRI, "0001", "0600"]), ("validation", VALIDATION[:1]), ("test", TEST[-1:])):
        (tmp_path / f"{name}.txt").write_text("".join(f"data/amos_{case}.npy\n" for case in found))
        options = [*options, f"--{name}-list={tmp_path / name}.txt"]
    run(published, "--labeled", "2", *options)
    dataset = fresh_folders.raw / "Dataset711_AMOSLabeled2"
    assert cases(dataset / "labelsTr") == [f"amos_{case}" for case in sorted([CT, MRI, VALIDATION[0]])]
    assert cases(dataset / "imagesUn") == ["amos_0001", "amos_0600"]
    assert array(dataset / "imagesTr" / f"amos_{CT}_0000.nii.gz").min() == -125
    assert array(dataset / "imagesTr" / f"amos_{MRI}_0000.nii.gz").min() == mri_low
    assert (array(dataset / "labelsTs" / f"amos_{TEST[-1]}.nii.gz") == label(*range(16))).all()


def test_lists_that_hold_validation_cases_are_refused(published, fresh_folders, tmp_path):
    """As the published labeled_20p does."""
    (tmp_path / "labeled_20p.txt").write_text("amos_0078\namos_0027\n")
    with pytest.raises(UserError, match=r"labeled_20p\.txt holds cases that are not training cases: 0027"):
        run(published, "--labeled-list", str(tmp_path / "labeled_20p.txt"))
    with pytest.raises(UserError, match="--labeled 21: expected 4 or 10 or all"):
        run(published, "--labeled", "21")


def test_incomplete_downloads_are_refused(published, fresh_folders, tmp_path, names_only):
    data = tmp_path / "amos22"
    shutil.copytree(published, data)
    (data / "imagesTr" / "amos_0001.nii.gz").unlink()
    (data / "labelsVa" / f"amos_{TEST[0]}.nii.gz").unlink()
    shutil.copytree(data / "imagesVa", data / "imagesVa_old")
    with pytest.raises(UserError, match="imagesTr holds 239 cases; 240 were published") as error:
        run(data)
    assert f"labels*/amos_{TEST[0]}.nii.gz is missing" in str(error.value)
    assert f"images*/amos_{TEST[0]}.nii.gz is there 2 times" in str(error.value)
    assert nothing_written(fresh_folders)
