"""The queue and the report of ``scripts/hippocampus_parts.py``; the trainings themselves take hours."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from nnunet_ssl import trainers
from nnunet_ssl.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import hippocampus_parts as parts  # noqa: E402


@pytest.fixture
def home(tmp_path):
    """A folder where ``prepare`` has been."""
    for dataset_id in (640, 641):
        (tmp_path / "raw" / f"Dataset{dataset_id}_Hippocampus").mkdir(parents=True)
    return tmp_path


def write_summary(run):
    run.summary.parent.mkdir(parents=True)
    dice = 0.5 + 0.1 * run.seed
    means = {"Dice": dice + 0.05, "HD95": 4.0, "ASD": 1.0}
    summary = {"mean": {"1": {"Dice": dice}, "2": {"Dice": dice + 0.1}}, "foreground_mean": means}
    run.summary.write_text(json.dumps(summary))


def test_queue_has_every_row_for_every_seed(home):
    runs = parts.plan_runs(home, 400, [0, 1], "sasnet_parts", "cpu")
    assert [(run.row.key, run.seed) for run in runs[:2]] == [("sasnet", 0), ("sasnet_without_sar", 0)]
    assert {run.dataset_id for run in runs} == {640, 641}
    assert len({run.folder for run in runs}) == len(runs) == 10  # no two runs share results
    assert runs[0].trainer == "nnUNetTrainerSASNet_40epochs"
    assert runs[0].iterations == 10


def test_steps_must_fill_the_epochs(home):
    with pytest.raises(UserError, match="multiple of 40"):
        parts.plan_runs(home, 1001, [0], "shta_parts", "cpu")


def test_finished_runs_are_not_run_again_and_failed_ones_are_named(home, monkeypatch):
    done, *rest = parts.plan_runs(home, 400, [0], "sasnet_parts", "cpu")[:2]
    write_summary(done)
    (done.model / "validation").mkdir(parents=True)
    (done.model / "validation" / "summary.json").write_text("{}")
    monkeypatch.setattr(parts, "command", lambda *args, **kwargs: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(UserError, match="1 of 2 runs failed: sasnet_without_sar, seed 0"):
        parts.run_queue([done, *rest], 1)


@pytest.mark.parametrize("name", list(parts.TABLES))
def test_report_writes_table_and_results(home, tmp_path, name):
    docs = tmp_path / "docs"
    (docs / "results").mkdir(parents=True)
    page = (ROOT / "docs" / "results" / "parts.md").read_text(encoding="utf-8")
    (docs / "results" / "parts.md").write_text(page)
    runs = parts.plan_runs(home, 400, [0, 1], name, "cpu")
    for run in runs[:-1]:  # one is not finished
        write_summary(run)
    parts.report(parts.collect(runs), docs, name)

    written = (docs / "results" / "parts.md").read_text(encoding="utf-8")
    assert written.startswith(page[: page.index(f"<!-- {name}: written")])
    assert written.endswith(page[page.index(f"<!-- {name}: end") :])
    # Dice of the first class 0.5, 0.6 by seed, of the second 0.1 more
    first, last = parts.TABLES[name][0], parts.TABLES[name][-1]
    assert f"| {first.title} | 0.550 | 0.650 | 0.550 | 0.650 | **0.600** | 4.00 | 1.00 |" in written
    # the seed that is missing stays empty
    assert f"| {last.title} | 0.500 | 0.600 | 0.550 |  | **0.550** | 4.00 | 1.00 |" in written
    assert len(json.loads((docs / "results" / f"{name}.json").read_text())["runs"]) == 9

    parts.report(parts.collect(runs), docs, name)  # a second time replaces the first
    assert (docs / "results" / "parts.md").read_text(encoding="utf-8") == written


def test_settings_are_the_trainers():
    for row in (row for rows in parts.TABLES.values() for row in rows):
        fields = {field.name for field in dataclasses.fields(getattr(trainers, row.trainer).Settings)}
        assert set(row.settings) <= fields, row.key


def test_commands_are_nnunets_own():
    stock = parts.command("nnUNetv2_train", 640, "3d_fullres", 0, device="cuda")
    assert Path(stock[0]).name == "nnUNetv2_train"
    one_thread = parts.command("nnUNetv2_train", 640, "3d_fullres", 0, device="cpu")
    assert "nnunetv2.run.run_training import run_training_entry" in one_thread[-6]
    assert one_thread[-5:] == [*stock[1:-1], "cpu"]
