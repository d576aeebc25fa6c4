"""Every file that a benchmark keeps, damaged in every way: a sentence that names it, or nothing happens at all."""

from __future__ import annotations

import json

import pytest
from helpers.damage import JSON_DAMAGE, with_byte_order_mark

from nnunet_ssl.benchmark.folder import begun_with, claimed, known_ids, refuse_other
from nnunet_ssl.benchmark.numbers import read_summary
from nnunet_ssl.benchmark.report import write_report
from nnunet_ssl.benchmark.runs import trainings
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


def test_what_the_folder_was_begun_with(given, make_benchmark):
    benchmark = make_benchmark(given)
    (benchmark.raw / "Dataset500_X").mkdir()
    content = {"device": "cpu", "protocol": given}
    check(benchmark.home / "protocol.json", content, lambda: refuse_other(benchmark.home, given, "cpu"), {"unreadable"})
    check(benchmark.home / "protocol.json", content, lambda: begun_with(benchmark.home), {"unreadable"})
    for part in ("rows", "budgets", "measure"):
        for wrong in (3, [3], None):
            damaged = {"device": "cpu", "protocol": {**given, part: wrong}}
            (benchmark.home / "protocol.json").write_text(json.dumps(damaged))
            with pytest.raises(UserError, match=r"protocol\.json|was started with"):
                refuse_other(benchmark.home, given, "cpu")
    (benchmark.home / "protocol.json").unlink()
    (benchmark.home / "protocol.json").mkdir()
    with pytest.raises(UserError, match="is not a benchmark"), claimed(benchmark.home, given, "cpu"):
        pass


def test_ids(given, make_benchmark):
    home = make_benchmark(given).home
    check(home / "datasets.json", {"a": 501}, lambda: known_ids(home), {"an empty object"})


def test_settings_of_a_run(given, make_benchmark):
    benchmark = make_benchmark(given)
    (benchmark.raw / "Dataset500_X").mkdir()
    file = benchmark.home / "runs/time_of_cps/labels_only_2labeled_seed0/settings.json"
    check(file, {"num_iterations_per_epoch": 7}, benchmark.queue, {"unreadable"})


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


def test_a_report_names_the_file(given, make_benchmark, write_times):
    """Of a run whose evaluation or record is damaged."""
    given["budgets"] = given["budgets"][:1]
    benchmark = make_benchmark(given)
    (benchmark.raw / "Dataset500_X").mkdir()
    run = benchmark.queue()[0]
    write_times(run.folder, [1.0])
    for epoch in benchmark.protocol.curve_epochs:
        benchmark.summary(run, epoch).parent.mkdir(parents=True)
        benchmark.summary(run, epoch).write_text(json.dumps(SUMMARY))
    record = trainings(run.folder)[0] / "ssl_settings.json"
    check(record, json.loads(record.read_text()), lambda: write_report(benchmark))
    check(benchmark.summary(run, benchmark.protocol.epochs), SUMMARY, lambda: write_report(benchmark))
