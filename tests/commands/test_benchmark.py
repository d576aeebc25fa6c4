"""``nnUNetv2_ssl_benchmark``: from a made-up dataset to the report, killed and resumed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from nnunet_ssl.benchmark.folder import claimed
from nnunet_ssl.commands.benchmark import main, run
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


def test_the_real_command_lists_the_protocols(run_nnunet):
    assert [line.split()[0] for line in run_nnunet("nnUNetv2_ssl_benchmark", "--list").stdout.splitlines()] == [
        "acdc", "acdc_shapes", "amos", "brats2019", "demo_choices", "demo_hosts", "hippocampus", "hippocampus_shapes",
        "la", "la_equal_time", "la_shapes", "pancreas_ct", "sasnet_parts", "shta_parts", "synapse",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a protocol: a JSON file, or one of acdc, acdc_shapes, amos"),
        (["no_such"], "no_such does not exist"),
        (["la", "--jobs", "0"], "--jobs: '0' must be"),
        (["la", "-np", "0"], "-np: '0' must be"),
        (["la", "-device", "cpu", "--data", "nowhere", "-o", "out"], "nowhere is not a folder"),
        (["la", "-device", "cpu", "--report", "-o", "out"], "no run in .* is finished yet"),
    ],
)
def test_what_is_refused(arguments, message, fresh_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_without_snakemake(protocol, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "snakemake", None)
    with pytest.raises(UserError, match=r"nnunet-ssl\[benchmark\]"):
        main([str(protocol), "-device", "cpu", "-o", str(tmp_path / "out")])


def start(*arguments):
    """The command in a process of its own."""
    words = [sys.executable, "-m", "nnunet_ssl.commands", "benchmark", *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL)


def wait_for(pattern, folder, process, seconds=1200):
    """Wait until a file appears."""
    end = time.time() + seconds
    while not list(folder.glob(pattern)):
        assert process.poll() is None, f"ended before {pattern} was there"
        assert time.time() < end, f"no {pattern} after {seconds} s"
        time.sleep(0.05)


def trainings(home):
    """Processes that work for this benchmark."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
    return [line for line in found if "_2epochs" in line and "nnUNetv2_train" in line]


def test_relative_folders_mean_the_same_in_the_workflow(tmp_path, monkeypatch):
    """It runs in the folder of the benchmark."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("nnUNet_raw", "raw")
    (tmp_path / "home").mkdir()
    code = "import os; os.chdir('home'); open('found', 'w').write(os.path.abspath(os.environ['nnUNet_raw']))"
    assert run([sys.executable, "-c", code]) == 0
    assert (tmp_path / "home" / "found").read_text() == str(tmp_path / "raw")


def test_a_report_can_be_asked_for_while_it_runs(protocol, tmp_path):
    home = tmp_path / "out"
    with claimed(home, PROTOCOL, "cpu"), pytest.raises(UserError, match=r"no run in .* is finished yet"):
        main([str(protocol), "--report", "-device", "cpu", "-o", str(home)])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_resumed_and_reported(protocol, tmp_path, fresh_folders, capfd):
    pytest.importorskip("snakemake", reason="Snakemake needs Python 3.11")
    home = tmp_path / "out"
    arguments = [protocol, "-device", "cpu", "-o", home, "-np", 1]

    # a kill in the middle of a training leaves nothing running, and its checkpoint where it is
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = start(*arguments)
        wait_for("runs/steps4/*/results/*/*/fold_0/checkpoint_best.pth", home, process)
        process.send_signal(number)
        assert process.wait(300) == (128 + number if number == signal.SIGTERM else -number)
        end = time.time() + 30
        while trainings(home) and time.time() < end:
            time.sleep(0.2)
        assert not trainings(home)
    assert list(home.glob("runs/steps4/*/results/*/*/fold_0/checkpoint_best.pth"))
    done = {file: os.stat(file).st_mtime_ns for file in home.glob("done/*") if file.is_file()}
    assert {"dataset_2", "plan_2", "prepare_2"} <= {file.name for file in done}

    # a row that fails does not stop the others, and is named
    fails = {"name": "Fails", "trainer": "nnUNetTrainerMagicNet", "settings": {"magicnet_cubes": [7, 7, 7]}}
    protocol.write_text(json.dumps(PROTOCOL | {"rows": [*PROTOCOL["rows"], fails], "budgets": [{"steps": 4}]}))
    with pytest.raises(UserError, match=f"its log is in {home}"):
        main([str(a) for a in arguments])
    assert "Not finished and left out above: Fails" in (home / "report.md").read_text()
    log = (home / "logs" / "steps4" / "fails_2labeled_seed0" / "train.txt").read_text()
    assert "magicnet_cubes" in log

    # it goes on where it was
    home_protocol = json.loads((home / "protocol.json").read_text())
    assert [row["name"] for row in home_protocol["protocol"]["rows"]] == ["Labels only", "CPS", "Fails"]
    protocol.write_text(json.dumps(PROTOCOL))
    main([str(a) for a in arguments])
    assert {file: os.stat(file).st_mtime_ns for file in done} == done
    capfd.readouterr()

    # everything is there
    results = json.loads((home / "results.json").read_text())
    assert results["unfinished"] == []
    equal_steps, equal_time = results["tables"]
    assert [run["steps"] for run in equal_steps["runs"]] == [4, 4]
    labels_only, cps = equal_time["runs"]
    seconds = results["seconds_per_step"]
    assert cps == equal_steps["runs"][1]  # not trained twice
    assert labels_only["steps"] == 2 * max(1, round(2 * seconds["cps"] / seconds["labels_only"]))
    for result in [*equal_steps["runs"], labels_only]:
        assert 0 <= result["metrics"]["Dice"] <= 1
        assert result["minutes"] > 0
    assert set(labels_only["classes"]) == {"liver", "spleen", "kidney", "nodule", "vessel"}
    text = (home / "report.md").read_text(encoding="utf-8")
    assert "| Labels only | 4 |" in text
    assert "| CPS | Labels only | Dice (%) |" in text
    compared = home / "compared" / "steps4_2labeled_seed0" / "comparison.json"
    assert set(json.loads(compared.read_text())["methods"]) == {"Labels only", "CPS"}

    for name in ("cases_1_liver", "entropy", "curves", "boxes"):
        assert f"](figures/steps4_2labeled/{name}.png)" in text
    assert len(list((home / "figures" / "steps4_2labeled").glob("cases_*.pdf"))) == 5

    # what the trainings were told
    fold = "results/*/nnUNetTrainerCPS_2epochs__small__3d_fullres/fold_0/ssl_settings.json"
    record = json.loads(next((home / "runs/steps4/cps_2labeled_seed0").glob(fold)).read_text())
    settings = record["settings"]
    assert (settings["seed"], settings["num_iterations_per_epoch"], settings["cps_weight"]) == (0, 2, 0.5)
    assert record["made_on"][0]["device"] == "cpu"

    # nothing is left to do, and another row may come
    main([*map(str, arguments), "--dry-run"])
    commands = [line for line in "".join(capfd.readouterr()).splitlines() if line.startswith("Shell command:")]
    assert len(commands) == 1
    assert "--report" in commands[0]
    more = {"name": "CPS again", "trainer": "nnUNetTrainerCPS", "against": "CPS"}
    protocol.write_text(json.dumps(PROTOCOL | {"rows": [*PROTOCOL["rows"], more]}))
    main([*map(str, arguments), "--dry-run"])
    text = "".join(capfd.readouterr())
    trained = [line for line in text.splitlines() if "nnUNetv2_train" in line]
    assert len(trained) == 2  # measured and with equal steps; with equal time is known once it is measured
    assert all("cps_again" in line or "/measure/" in line for line in trained)
    protocol.write_text(json.dumps(PROTOCOL | {"epochs": 4}))
    with pytest.raises(UserError, match="started with epochs 2"):
        main([str(a) for a in arguments])
