"""``nnUNetv2_ssl_benchmark``: its arguments, its list, and what a dry run prints."""

from __future__ import annotations

import json
import subprocess

import pytest

from nnunet_ssl.commands.benchmark import main
from nnunet_ssl.demo.dataset import write_dataset
from nnunet_ssl.errors import UserError

PROTOCOL = {
    "name": "made_up",
    "data": {"dataset": 1, "test": "test.txt", "validation": 1},
    "first_id": 2,
    "labeled": [2],
    "seeds": [0],
    "plans": "small",
    "shrink": {"features": [4, 6, 8], "patch_size": [16, 16, 16], "batch_size": 2},
    "rows": [
        {"name": "Labels only", "trainer": "nnUNetTrainerLabeledOnly"},
        {"name": "CPS", "trainer": "nnUNetTrainerCPS", "settings": {"cps_weight": 0.5}},
    ],
    "epochs": 2,
    "budgets": [{"steps": 4}, {"time_of": "CPS"}],
    "predict": ["--disable_tta"],
    "metrics": ["dice", "hd95"],
    "measure": {"epochs": 2, "iterations": 3, "rounds": 1},
}


@pytest.fixture
def protocol(fresh_folders, tmp_path):
    """The file of the protocol, and the dataset that it splits."""
    write_dataset(fresh_folders.raw, 0, labeled=7, unlabeled=1, test=0, shape=(20, 24, 22))
    (tmp_path / "test.txt").write_text("case_005\ncase_006\n")
    file = tmp_path / "protocol.json"
    file.write_text(json.dumps(PROTOCOL))
    return file


def test_dry_run_prints_commands_and_does_nothing(protocol, tmp_path, capsys, fresh_folders):
    before = sorted(tmp_path.rglob("*"))
    main([str(protocol), "--dry-run", "--device", "cpu", "-o", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert sorted(tmp_path.rglob("*")) == before
    commands = [line for line in lines if not line.startswith(("#", "export", "mkdir", "echo"))]
    names = [next(word for word in line.split() if "=" not in word) for line in commands]
    # dataset, plans, network, unlabelled; two short runs; (train, predict, evaluate) x three runs; two comparisons
    assert names == [
        "nnUNetv2_ssl_split", "nnUNetv2_plan_and_preprocess", "python", "nnUNetv2_ssl_preprocess",
        "nnUNetv2_train", "nnUNetv2_train",
        *["nnUNetv2_train", "nnUNetv2_predict", "nnUNetv2_ssl_evaluate"] * 3,
        "nnUNetv2_ssl_evaluate", "nnUNetv2_ssl_evaluate",
    ]  # fmt: skip
    assert subprocess.run(["sh", "-n"], input="\n".join(lines), text=True).returncode == 0  # a shell can read it


def test_list(capsys):
    main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "amos", "brats2019", "hippocampus", "la", "pancreas_ct", "synapse",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a protocol: a JSON file, or one of amos"),
        (["no_such"], "no_such does not exist"),
        (["la", "--jobs", "0"], "--jobs 0 must be at least 1"),
        (["la", "-np", "0"], "-np 0 must be at least 1"),
        (["la", "--device", "cpu", "--data", "nowhere", "-o", "out"], "nowhere is no folder"),
        (["la", "--device", "cpu", "--scripts", "nowhere", "-o", "out"], "prepare_la.py does not exist"),
        (["la", "--device", "cpu", "--report", "-o", "out"], "no run in .* is finished yet"),
    ],
)
def test_what_is_refused(arguments, message, fresh_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(arguments)
