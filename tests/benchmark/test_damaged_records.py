"""Every file that a benchmark keeps, damaged in every way: a sentence that names it, or nothing happens at all."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from damage import JSON_DAMAGE, with_byte_order_mark

from nnunet_ssl.benchmark.plan import SECONDS, Step, kept_seconds
from nnunet_ssl.benchmark.report import read_summary, write_report
from nnunet_ssl.benchmark.run import Benchmark, begun_with, claimed, known_ids, refuse_other
from nnunet_ssl.errors import UserError

SUMMARY = {
    "metric_per_case": [
        {"reference_file": f"labelsTs/{case}.nii.gz", "metrics": {"1": {"Dice": 0.5, "HD95": 3.0}}} for case in "ab"
    ],
    "mean": {"1": {"Dice": 0.5, "HD95": 3.0}},
    "group_mean": {"all": {"Dice": 0.5, "HD95": 3.0}},
    "class_names": {"1": "liver"},
    "options": {"spacing": "mm", "tolerance": 1.0, "empty": "nan"},
}


def check(file, content, read, harmless=()):
    """``read`` works with the file, also with a byte order mark; damaged it is named, but for what is ``harmless``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for name, damage in JSON_DAMAGE.items():
        file.write_text(json.dumps(content))
        read()
        with_byte_order_mark(file)
        read()
        damage(file)
        if name in harmless:
            read()
        else:
            with pytest.raises(UserError) as error:
                read()
            assert str(file) in str(error.value), name
            assert len(str(error.value).splitlines()) == 1
        if file.is_dir():
            file.rmdir()
    file.write_text(json.dumps(content))


def test_what_the_folder_was_begun_with(given, make_plan):
    plan = make_plan(given)
    content = {"device": "cpu", "protocol": given}
    check(plan.home / "protocol.json", content, lambda: refuse_other(plan.home, given, "cpu"), {"unreadable"})
    check(plan.home / "protocol.json", content, lambda: begun_with(plan.home), {"unreadable"})
    for part in ("rows", "budgets", "measure"):
        for wrong in (3, [3], None):
            damaged = {"device": "cpu", "protocol": {**given, part: wrong}}
            (plan.home / "protocol.json").write_text(json.dumps(damaged))
            with pytest.raises(UserError, match=r"protocol\.json|was begun with"):
                refuse_other(plan.home, given, "cpu")
    (plan.home / "protocol.json").unlink()
    (plan.home / "protocol.json").mkdir()
    with pytest.raises(UserError, match="holds no benchmark"), claimed(plan.home, given, "cpu"):
        pass


def test_ids_and_seconds(given, make_plan):
    plan = make_plan(given)
    check(plan.home / "datasets.json", {"a": 501}, lambda: known_ids(plan.home), {"an empty object"})
    check(plan.home / SECONDS, {"cps": 0.25}, lambda: kept_seconds(plan.home), {"an empty object"})


def test_records_of_steps(given, make_plan):
    benchmark = Benchmark(make_plan(given))
    step = Step("a/b", "Step", ("python", "-c", "pass"), settings=(benchmark.home / "settings.json", {"seed": 0}))
    record = {"words": list(step.words), "settings": {"seed": 0}, "attempts": []}
    check(benchmark.home / "done/a/b.json", record, lambda: benchmark.is_done(step), {"unreadable"})
    going_on = replace(step, words=(*step.words, "--c"))

    def begin():
        with benchmark._attempt(going_on, goes_on=True):
            pass

    attempts = [{"started": "2026", "seconds": 1.5}]
    check(benchmark.home / "attempts/a/b.json", attempts, begin)


def test_settings_of_a_run(given, make_plan):
    plan = make_plan(given)
    row, budget = plan.protocol.rows[1], plan.protocol.budgets[1]
    folder = plan.home / "runs/x"
    content = {"num_iterations_per_epoch": 7}
    check(folder / "settings.json", content, lambda: plan._iterations(row, budget, folder), {"unreadable"})


def test_summaries(tmp_path):
    file = tmp_path / "summary.json"
    check(file, SUMMARY, lambda: read_summary(file, ["Dice", "HD95"]))
    for changes in (
        {"mean": {"1": {"Dice": 0.5}}},
        {"mean": {"2": SUMMARY["mean"]["1"]}},
        {"mean": {"1": 3}},
        {"metric_per_case": [3]},
        {"metric_per_case": [{"reference_file": "a", "metrics": {"1": {"Dice": "good", "HD95": 3.0}}}]},
        {"group_mean": {"all": {}}},
        {"class_names": {}},
    ):
        file.write_text(json.dumps({**SUMMARY, **changes}))
        with pytest.raises(UserError, match=f"{file} is not as nnUNetv2_ssl_evaluate writes it"):
            read_summary(file, ["Dice", "HD95"])


def test_a_report_names_the_file(given, make_plan, write_times):
    """Of a run whose evaluation or record is damaged."""
    given["budgets"] = given["budgets"][:1]
    plan = make_plan(given)
    run = next(iter(plan.queue()))
    write_times(run.folder, [1.0])
    for epoch in plan.protocol.curve_epochs:
        plan.summary(run, epoch).parent.mkdir(parents=True)
        plan.summary(run, epoch).write_text(json.dumps(SUMMARY))
    place = {"started": "2026", "device": "cpu", "machine": "A processor", "versions": {"torch": "2.8"}}
    check(plan.home / "done/x/train.json", {"attempts": [place]}, lambda: write_report(plan))
    check(plan.summary(run, plan.protocol.epochs), SUMMARY, lambda: write_report(plan))
