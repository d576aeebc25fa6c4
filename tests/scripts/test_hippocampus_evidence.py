"""The queue and the report of ``scripts/hippocampus_evidence.py``; the trainings themselves take hours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nnunet_ssl.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import hippocampus_evidence as evidence  # noqa: E402


@pytest.fixture
def home(tmp_path):
    """A folder where ``prepare`` and ``measure`` have been."""
    for dataset_id in (640, 641, 649):
        (tmp_path / "raw" / f"Dataset{dataset_id}_Hippocampus").mkdir(parents=True)
    measured = [
        ("nnUNetTrainer", None, 0.04),
        ("nnUNetTrainerLabeledOnly", None, 0.04),
        ("nnUNetTrainerCPS", "lean", 0.12),
        ("nnUNetTrainerSHTA_CPS", "lean", 0.13),
        ("nnUNetTrainerSHTA_CPS", "joint", 0.10),
    ]
    trainers = [
        {
            "trainer": trainer,
            "passes": passes,
            "seconds_a_step": seconds,
            "seconds_of_the_step": seconds - 0.02,
            "seconds_a_batch": 0.02,
            "peak_mib": 1000 * seconds,
            "parameters": round(1000 * seconds),
        }
        for trainer, passes, seconds in measured
    ]
    speed = {"device": "cpu", "machine": "1 CPU thread(s)", "clock": "CPU time", "trainers": trainers}
    (tmp_path / "speed.json").write_text(json.dumps(speed))
    return tmp_path


def all_rows():
    return evidence.TABLES["hippocampus"]


def write_summaries(run):
    for epoch in run.curve:
        run.summary(epoch).parent.mkdir(parents=True)
        dice = 0.5 + 0.1 * run.seed + 0.001 * epoch
        means = {"Dice": dice + 0.05, "HD95": 4.0, "ASD": 1.0}
        summary = {"mean": {"1": {"Dice": dice}, "2": {"Dice": dice + 0.1}}, "foreground_mean": means}
        run.summary(epoch).write_text(json.dumps(summary))


def test_queue_has_every_row_for_every_seed_and_the_longest_last(home):
    runs = evidence.plan_runs(home, 400, [0, 1], all_rows(), "cpu")
    assert [(run.row.key, run.seed) for run in runs[:4]] == [
        ("labeled_only", 0), ("cps", 0), ("shta_cps", 0), ("sasnet", 0),
    ]  # fmt: skip
    assert [run.row.key for run in runs[-2:]] == ["labeled_only_equal_time"] * 2
    assert {run.dataset_id for run in runs} == {640, 641, 649}
    assert len({run.folder for run in runs}) == len(runs)  # no two runs share results


def test_equal_time_is_the_measured_ratio_of_the_lean_trainers(home):
    run = evidence.plan_runs(home, 400, [0], ["labeled_only_equal_time"], "cpu")[0]
    assert run.epochs == 130  # 40 * 0.13 / 0.04
    assert run.curve == (32, 65, 130)
    assert run.trainer == "nnUNetTrainerLabeledOnly_130epochs"


def test_a_run_with_equal_time_that_was_started_keeps_its_epochs(home):
    """Times measured again would otherwise look for a run of another length."""
    run = evidence.plan_runs(home, 400, [0], ["labeled_only_equal_time"], "cpu")[0]
    run.model.mkdir(parents=True)
    speed = json.loads((home / "speed.json").read_text())
    for entry in speed["trainers"]:
        entry["seconds_a_step"] = 1.0
    (home / "speed.json").write_text(json.dumps(speed))
    assert evidence.plan_runs(home, 400, [0], ["labeled_only_equal_time"], "cpu")[0].epochs == run.epochs
    assert evidence.plan_runs(home, 800, [0], ["labeled_only_equal_time"], "cpu")[0].epochs == 40


def test_steps_must_fill_the_epochs(home):
    with pytest.raises(UserError, match="multiple of 40"):
        evidence.plan_runs(home, 1001, [0], ["cps"], "cpu")


def test_equal_time_needs_a_measurement(home):
    (home / "speed.json").unlink()
    with pytest.raises(UserError, match="measure"):
        evidence.plan_runs(home, 400, [0], all_rows(), "cpu")


def test_finished_runs_are_not_run_again_and_failed_ones_are_named(home, monkeypatch):
    runs = evidence.plan_runs(home, 400, [0], ["labeled_only", "cps"], "cpu")
    done = runs[0]
    write_summaries(done)
    (done.model / "validation").mkdir(parents=True)
    (done.model / "validation" / "summary.json").write_text("{}")
    monkeypatch.setattr(evidence, "command", lambda *args, **kwargs: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(UserError, match="1 of 2 runs failed: cps, seed 0"):
        evidence.run_queue(runs, 1)


def test_report_writes_table_figure_and_results(home, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    page = (ROOT / "docs" / "results.md").read_text()
    (docs / "results.md").write_text(page)
    runs = evidence.plan_runs(home, 400, [0, 1], all_rows(), "cpu")
    for run in runs[:-1]:  # one is not finished
        write_summaries(run)
    evidence.report(evidence.collect(runs), docs)

    written = (docs / "results.md").read_text()
    assert written.startswith(page[: page.index("<!-- hippocampus")])
    assert written.endswith(page[page.index("<!-- benchmark: end") :])
    # Dice after 40 epochs: 0.54, 0.64 by seed for the first class, 0.1 more for the second
    assert "| 400 | 0.590 | 0.690 | 0.590 | 0.690 | **0.640** | 4.00 | 1.00 |" in written
    # the seed that is missing stays empty
    assert "| 1,300 | 0.630 | 0.730 | 0.680 |  | **0.680** | 4.00 | 1.00 |" in written
    assert "| `nnUNetTrainerSHTA_CPS` | lean | 0.1100 | 5.50 | 0.0200 | 0.1300 | 3.25 | 130 | 3.25 | 130 |" in written
    assert (docs / "figures" / "hippocampus_curves.png").stat().st_size > 5000
    assert len(json.loads((docs / "results" / "hippocampus.json").read_text())["runs"]) == 2 * len(all_rows()) - 1

    evidence.report(evidence.collect(runs), docs)  # a second time replaces the first
    assert (docs / "results.md").read_text() == written


def test_every_row_is_in_a_table_and_its_settings_are_the_trainers(home):
    import dataclasses

    from nnunet_ssl import trainers

    assert {row.key for row in evidence.ROWS} == set().union(*evidence.TABLES.values())
    for row in evidence.ROWS:
        fields = {field.name for field in dataclasses.fields(getattr(trainers, row.trainer).Settings)}
        assert set(row.settings) <= fields, row.key


def test_pairs_are_differences_of_the_same_seed(home):
    runs = [
        {"row": row, "seed": seed, "curve": [{"anterior": dice, "posterior": dice + 0.2, "mean": dice + 0.1}]}
        for row, seed, dice in (("cps", 0, 0.5), ("shta_cps", 0, 0.6), ("cps", 1, 0.7), ("shta_cps", 1, 0.65),
                                ("urpc", 0, 0.1))
    ]  # fmt: skip
    lines = list(evidence.pairs_table({"runs": runs}))
    assert lines[2:] == ["| `nnUNetTrainerCPS` | +0.025 | +0.025 | +0.100 | -0.050 | **+0.025** |"]


def test_commands_are_nnunets_own(home):
    stock = evidence.command("nnUNetv2_train", 640, "3d_fullres", 0, device="cuda")
    assert Path(stock[0]).name == "nnUNetv2_train"
    one_thread = evidence.command("nnUNetv2_train", 640, "3d_fullres", 0, device="cpu")
    assert "nnunetv2.run.run_training import run_training_entry" in one_thread[2]
    assert one_thread[3:] == [*stock[1:-1], "cpu"]
