"""``nnUNetv2_ssl_benchmark``: from a made-up dataset to the report, killed and resumed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from nnunet_ssl.benchmark import report
from nnunet_ssl.benchmark.run import Benchmark, claimed
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
    "figures": ["Labels only", "CPS"],
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
    # dataset, plans, network, unlabelled; two short runs; (train, predict, evaluate) x three runs; two comparisons;
    # figures
    assert names == [
        "nnUNetv2_ssl_split", "nnUNetv2_plan_and_preprocess", "python", "nnUNetv2_ssl_preprocess",
        "nnUNetv2_train", "nnUNetv2_train",
        *["nnUNetv2_train", "nnUNetv2_predict", "nnUNetv2_ssl_evaluate"] * 3,
        "nnUNetv2_ssl_evaluate", "nnUNetv2_ssl_evaluate", "nnUNetv2_ssl_figures",
    ]  # fmt: skip
    assert subprocess.run(["sh", "-n"], input="\n".join(lines), text=True).returncode == 0  # a shell can read it


def test_list(capsys):
    main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "acdc_shapes", "amos", "brats2019", "hippocampus", "hippocampus_shapes", "la", "la_shapes", "pancreas_ct",
        "synapse",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a protocol: a JSON file, or one of acdc_shapes, amos"),
        (["no_such"], "no_such does not exist"),
        (["la", "--jobs", "0"], "--jobs: '0' must be"),
        (["la", "-np", "0"], "-np: '0' must be"),
        (["la", "--device", "cpu", "--data", "nowhere", "-o", "out"], "nowhere is no folder"),
        (["la", "--device", "cpu", "--scripts", "nowhere", "-o", "out"], "prepare_la.py does not exist"),
        (["la", "--device", "cpu", "--report", "-o", "out"], "no run in .* is finished yet"),
    ],
)
def test_what_is_refused(arguments, message, fresh_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_a_failed_run_is_told_after_the_report(protocol, tmp_path, monkeypatch, capsys):
    """The commands are not run here; nothing is finished, so there is nothing to report, and the failure is told."""
    monkeypatch.setattr(Benchmark, "run", lambda self: "1 failed: CPS. Mend it and start again.")
    with pytest.raises(UserError, match="1 failed: CPS"):
        main([str(protocol), "--device", "cpu", "-o", str(tmp_path / "out")])
    monkeypatch.setattr(report, "is_finished", lambda plan, run: True)
    monkeypatch.setattr(report, "write_report", lambda plan, page: "what is finished")
    with pytest.raises(UserError, match="1 failed: CPS"):
        main([str(protocol), "--device", "cpu", "-o", str(tmp_path / "out")])
    assert "what is finished" in capsys.readouterr().out


def start(*arguments):
    """The command in a process of its own."""
    code = "from nnunet_ssl.commands.benchmark import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.DEVNULL)


def wait_for(pattern, folder, process, seconds=1200):
    """Wait until a file appears."""
    end = time.time() + seconds
    while not list(folder.glob(pattern)):
        assert process.poll() is None, f"ended before {pattern} was there"
        assert time.time() < end, f"no {pattern} after {seconds} s"
        time.sleep(0.05)


def trainings():
    """Processes that train now, by their arguments."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
    return [line for line in found if "run_training_entry" in line and "_2epochs" in line and " small " in line]


def test_a_report_can_be_asked_for_while_it_runs(protocol, tmp_path):
    home = tmp_path / "out"
    with claimed(home, PROTOCOL, "cpu"), pytest.raises(UserError, match=r"no run in .* is finished yet"):
        main([str(protocol), "--report", "--device", "cpu", "-o", str(home)])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_resumed_and_reported(protocol, tmp_path, fresh_folders, capsys):
    home = tmp_path / "out"
    arguments = [protocol, "--device", "cpu", "-o", home, "-np", 1]

    # a kill in the middle of the first training leaves nothing running
    process = start(*arguments)
    wait_for("runs/steps4/*/results/*/*/fold_0/checkpoint_best.pth", home, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 128 + signal.SIGTERM
    assert not trainings()
    done = {file: os.stat(file).st_mtime_ns for file in home.glob("done/**/*.json")}
    assert {"dataset_2.json", "plan_2.json", "unlabeled_2.json", "measure_cps_2labeled_seed0_0.json"} <= {
        f.name for f in done
    }
    assert not list(home.glob("done/**/train.json"))

    # it goes on where it was
    main([str(a) for a in arguments])
    assert "--c" in (home / "logs" / "steps4" / "labels_only_2labeled_seed0" / "train.txt").read_text()
    assert {file: os.stat(file).st_mtime_ns for file in done} == done
    capsys.readouterr()

    # everything is there
    results = json.loads((home / "results.json").read_text())
    assert results["unfinished"] == []
    equal_steps, equal_time = results["tables"]
    assert [run["steps"] for run in equal_steps["runs"]] == [4, 4]
    labels_only, cps = equal_time["runs"]
    seconds = results["seconds_a_step"]
    assert cps == equal_steps["runs"][1]  # not trained twice
    assert labels_only["steps"] == 2 * max(1, round(2 * seconds["cps"] / seconds["labels_only"]))
    for run in [*equal_steps["runs"], labels_only]:
        assert 0 <= run["metrics"]["Dice"] <= 1
        assert run["minutes"] > 0
    assert set(labels_only["classes"]) == {"liver", "spleen", "kidney", "nodule", "vessel"}
    text = (home / "report.md").read_text(encoding="utf-8")
    assert "| Labels only | 4 |" in text
    assert "| CPS | Labels only | Dice (%) |" in text
    compared = home / "compared" / "steps4_2labeled_seed0" / "comparison.json"
    assert set(json.loads(compared.read_text())["methods"]) == {"Labels only", "CPS"}

    for name in ("cases_1_liver", "entropy", "curves", "boxes"):
        assert f"](figures/steps4_2labeled_seed0/{name}.png)" in text
    assert len(list((home / "figures" / "steps4_2labeled_seed0").glob("cases_*.pdf"))) == 5

    # what the trainings were told, and what was recorded of them
    fold = "results/*/nnUNetTrainerCPS_2epochs__small__3d_fullres/fold_0/ssl_settings.json"
    settings = json.loads(next((home / "runs/steps4/cps_2labeled_seed0").glob(fold)).read_text())["settings"]
    assert (settings["seed"], settings["num_iterations_per_epoch"], settings["cps_weight"]) == (0, 2, 0.5)
    record = json.loads((home / "done" / "steps4" / "cps_2labeled_seed0" / "train.json").read_text())
    assert record["settings"]["cps_weight"] == 0.5
    assert record["attempts"][-1]["device"] == "cpu"
    killed = [json.loads(file.read_text())["attempts"] for file in (home / "done").rglob("train.json")]
    assert max(map(len, killed)) > 1  # the training that was killed with the benchmark

    # nothing is left to do, and another row may come
    main([*map(str, arguments), "--dry-run"])
    assert all(line.startswith(("#", "export")) for line in capsys.readouterr().out.splitlines())
    more = {"name": "CPS again", "trainer": "nnUNetTrainerCPS", "against": "CPS"}
    protocol.write_text(json.dumps(PROTOCOL | {"rows": [*PROTOCOL["rows"], more]}))
    main([*map(str, arguments), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    trained = [line for line in lines if "nnUNetv2_train" in line]
    assert len(trained) == 3  # measured, with equal steps, with equal time
    assert all("cps_again" in line for line in trained)
    protocol.write_text(json.dumps(PROTOCOL | {"epochs": 4}))
    with pytest.raises(UserError, match="begun with 'epochs' 2"):
        main([str(a) for a in arguments])
