"""The report of runs whose numbers are known."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from nnunet_ssl.benchmark.numbers import case_differences, case_values
from nnunet_ssl.benchmark.protocol import Row
from nnunet_ssl.benchmark.report import _points, fill, line_styles, write_report
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.metrics import METRICS

CASES = ("case_a", "case_b", "case_c")


def summary(dice, hd95, cases=CASES):
    """A summary as ``nnUNetv2_ssl_evaluate`` writes it; ``dice`` is ``[cases, 2]``, ``hd95`` the same for all."""
    per_case = [
        {
            "reference_file": f"labelsTs/{case}.nii.gz",
            "metrics": {label: {"Dice": row[i], "HD95": hd95} for i, label in enumerate(("1", "2"))},
        }
        for case, row in zip(cases, dice, strict=True)
    ]
    mean = {label: {"Dice": float(np.nanmean([row[i] for row in dice])), "HD95": hd95} for i, label in enumerate("12")}
    return {
        "metric_per_case": per_case[::-1],  # cases come in any order
        "mean": mean,
        "group_mean": {},
        "class_names": {"1": "liver", "2": "spleen"},
        "options": {"spacing": "mm", "tolerance": 1.0, "empty": "nan"},
    }


@pytest.fixture
def benchmark(given, make_benchmark, write_times):
    """Every run with equal steps is finished but one, and none with equal time but the shared one."""
    benchmark = make_benchmark(given)
    (benchmark.raw / "Dataset500_X").mkdir()
    dice = {"Labels only": 0.5, "CPS": 0.6, "CPS + SHTA": 0.62, "More labels": 0.8}
    for run in next(benchmark.tables()).runs:
        if run.row.name == "More labels" and run.seed == 1:
            continue
        write_times(run.folder, [70, 50])
        for epoch in (2, 4):
            value = dice[run.row.name] + 0.1 * run.seed + 0.01 * (epoch - 4)
            rows = [[value, value - 0.1], [value, value - 0.1], [value + 0.1, float("nan")]]
            file = benchmark.summary(run, epoch)
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps(summary(rows, 3.0 if run.row.name == "CPS" else 4.0)))
    return benchmark


def test_tables(benchmark):
    text = write_report(benchmark)
    lines = text.splitlines()
    assert lines[0] == "Five made-up organs"
    head = next(line for line in lines if line.startswith("| Method | Steps"))
    assert head == (
        "| Method | Steps | Minutes | Dice (%) ↑ | HD95 (mm) ↓ | liver | spleen | Dice, seed 0 | Dice, seed 1 |"
    )
    # Dice of labels only, seed 0: the liver's mean (0.5 + 0.5 + 0.6) / 3, the spleen's 0.4, of both 0.46667
    assert "| Labels only | 80 | 2.0 | 51.67 | 4.00 | 58.33 | 45.00 | 46.67 | 56.67 |" in lines
    assert "| CPS | 80 | 2.0 | 61.67 | **3.00** | 68.33 | 55.00 | 56.67 | 66.67 |" in lines
    more = "| More labels (4 labeled, 1 of 2 seeds) | 80 | 2.0 | 76.67 | 4.00 | 83.33 | 70.00 | 76.67 |  |"
    assert more in lines  # no contest
    # what it gains on CPS in brackets, the best in bold
    gain = next(line for line in lines if line.startswith("| CPS + SHTA | 80"))
    assert "| **63.67** (+2.00) | 4.00 (+1.00) |" in gain
    # every case differs by the same
    assert "| CPS | Labels only | Dice (%) | +10.00 | +10.00 | +10.00 | +10.00 to +10.00 | 0.250 |" in lines
    assert "| CPS + SHTA | CPS | Dice (%) | +2.00 | +2.00 | +2.00 | +2.00 to +2.00 | 0.250 |" in lines
    assert "| CPS + SHTA | CPS | HD95 | +1.00 | +1.00 | +1.00 | +1.00 to +1.00 | 0.250 |" in lines
    others = lines[lines.index("<details><summary>Differences in the other metrics</summary>") :]
    assert [line for line in lines if "HD95 | +1.00" in line] == [line for line in others if "HD95 | +1.00" in line]
    assert "| CPS | Labels only | Dice (%) | +10.00 | +10.00 | +10.00 | +10.00 to +10.00 | 0.250 |" not in others
    assert "| More labels | Labels only | Dice (%) | +30.00 |  | +30.00 | +30.00 to +30.00 | 0.250 |" in lines
    assert "| Method | 50 % of the training | 100 % of the training |" in lines
    assert "| CPS | 59.67 | 61.67 |" in lines


def test_the_run_that_two_tables_share_is_in_both(benchmark):
    text = write_report(benchmark)
    assert "### 2 labeled, equal steps (80)" in text
    _, equal_time = text.split("### 2 labeled, equal time (as long as CPS takes for 80 steps)")
    assert "| CPS | 80 |" in equal_time
    assert "| Labels only |" not in equal_time


def test_what_is_not_finished_is_named(benchmark):
    text = write_report(benchmark)
    assert "Not finished and left out above: More labels, 4 labeled, seed 1, steps80; Labels only, 2" in text


def test_files(benchmark):
    write_report(benchmark)
    results = json.loads((benchmark.home / "results.json").read_text())
    assert results["surroundings"] == [{"device": "cpu", "machine": "A processor", "nnunetv2": "2.8.1"}]
    run = results["tables"][0]["runs"][0]
    assert run["curve"] == [
        {"steps": 40, "Dice": pytest.approx(0.44667, abs=1e-5)}, {"steps": 80, "Dice": pytest.approx(0.46667, abs=1e-5)}
    ]  # fmt: skip
    assert (benchmark.home / "report.md").read_text(encoding="utf-8").startswith("# made_up\n\nFive")
    assert (benchmark.home / "curves.png").stat().st_size > 5000


def test_a_training_that_went_on_elsewhere_names_both_machines(benchmark):
    file = next((benchmark.home / "runs").rglob("ssl_settings.json"))
    places = [{"device": "cpu", "machine": machine, "torch": "2.15.0"} for machine in ("One", "Another", "One")]
    file.write_text(json.dumps({"made_on": places}))
    text = write_report(benchmark)
    assert text.index("Made on One (cpu") < text.index("Made on Another (cpu")
    assert text.count("Made on One") == text.count("Made on A processor") == 1


def test_nothing_is_finished(given, make_benchmark):
    with pytest.raises(UserError, match=r"no run in .* is finished yet"):
        write_report(make_benchmark(given))


def test_a_page_gets_the_report_between_its_marks(benchmark, tmp_path):
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- made_up: written by nnUNetv2_ssl_benchmark -->\nold\n<!-- made_up: end -->\nafter\n")
    write_report(benchmark, page)
    text = page.read_text()
    assert text.startswith("before\n<!-- made_up")
    assert text.endswith("<!-- made_up: end -->\nafter\n")
    assert "old" not in text
    assert "| CPS | 80 |" in text
    assert (page.parent / "figures" / "made_up_learning_curves.png").stat().st_size > 5000
    assert "![Learning curves](figures/made_up_learning_curves.png)" in text
    write_report(benchmark, page)
    assert page.read_text() == text  # a second time replaces the first
    page.write_text("no marks")
    with pytest.raises(UserError, match="has no lines '<!-- made_up: written by"):
        fill(page, "made_up", [])


def test_figures_are_shown_and_copied(benchmark, tmp_path):
    benchmark.protocol = replace(benchmark.protocol, figures=("Labels only", "CPS"))
    folder = benchmark.home / "figures" / "steps80_2labeled"
    folder.mkdir(parents=True)
    for name in ("curves", "cases_1_liver"):
        (folder / f"{name}.png").write_text(name)
    (folder / "curves.md").write_text("**Training curves.** A value an epoch.\n\nMore **bold** text.\n")
    page = tmp_path / "results.md"
    page.write_text("<!-- made_up: written by nnUNetv2_ssl_benchmark -->\n<!-- made_up: end -->\n")
    write_report(benchmark, page)
    report = (benchmark.home / "report.md").read_text(encoding="utf-8")
    assert "![Cases 1 liver](figures/steps80_2labeled/cases_1_liver.png)" in report
    assert "![Learning curves](curves.png)\n\n*Learning curves.*" in report
    assert "![Training curves](figures/steps80_2labeled/curves.png)\n\n*Training curves.*" in report
    for name, content in (("training_curves", "curves"), ("cases_1_liver", "cases_1_liver")):
        assert f"(figures/made_up_{name}.png)" in page.read_text()
        assert (tmp_path / "figures" / f"made_up_{name}.png").read_text() == content


def test_what_is_compared_with_a_method_has_its_color_dashed():
    rows = [
        Row(name=name, trainer="X", against=other)
        for name, other in zip("ABCDE", (None, None, "B", "B", "A"), strict=True)
    ]
    (a, a_line), (b, b_line), (b1, b1_line), (b2, b2_line), (a1, a1_line) = line_styles(rows)
    assert a == a1 != b == b1 == b2
    assert (a_line, b_line, b1_line, b2_line, a1_line) == ("-", "-", "--", "-.", "--")


@pytest.mark.parametrize("offline", [0, 3])
def test_minutes_of_the_curves_are_those_of_the_measurement(offline):
    """Offline ones come before."""
    run = {"minutes": 5.0 + offline, "steps": 100}
    run["curve"] = [{"steps": 50, "Dice": 0.5}, {"steps": 100, "Dice": 0.6}]
    for in_steps, seconds, x in ((False, 1.2, [1.0, 2.0]), (False, None, [2.5, 5.0]), (True, 1.2, [50.0, 100.0])):
        x = x if in_steps else [minutes + offline for minutes in x]
        assert _points(run, METRICS["dice"], in_steps, seconds, offline) == (x, [0.5, 0.6])


def test_differences_are_over_the_classes_that_both_have():
    nan = float("nan")
    one, other = np.array([[0.5, 0.9], [0.5, nan], [nan, nan]]), np.array([[0.4, nan], [0.3, 0.1], [0.2, nan]])
    assert case_differences(one, other) == pytest.approx([0.1, 0.2, nan], nan_ok=True)


def test_cases_are_matched_by_name():
    values = case_values(summary([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], 1.0), "Dice")
    assert values.tolist() == [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]


@pytest.fixture
def over_three(given, make_benchmark, write_times, tmp_path):
    """``over_three(groups, cases)``: all runs of three labeled sets, CPS half-way from labels only to more labels."""

    def make(groups=None, cases=CASES):
        given["seeds"] = [0, 1, 2]
        given["budgets"] = [{"minutes": 10}]
        given["gap"] = {"lower": "Labels only", "upper": "More labels"}
        given["rows"][1]["offline"] = 4.5
        given["measure"] = {"seconds": {row["name"]: 0.1 for row in given["rows"]}}
        benchmark = make_benchmark(given)
        folder = tmp_path / "raw" / f"Dataset{min(benchmark.ids.values())}_X"
        folder.mkdir()
        if groups is not None:
            (folder / "groups.json").write_text(json.dumps(groups))
            content = {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
            (folder / "dataset.json").write_text(json.dumps(content))
        rng = np.random.default_rng(0)
        for seed in benchmark.protocol.seeds:
            of_cases = rng.normal(0.4, 0.02, (2, 3, 2))
            ends = of_cases[0], of_cases[1] + 0.2
            dice = {"Labels only": ends[0], "CPS": sum(ends) / 2, "CPS + SHTA": ends[0], "More labels": ends[1]}
            for run in next(benchmark.tables()).runs:
                if run.seed == seed:
                    write_times(run.folder, [30, 30])
                    for epoch in (2, 4):
                        file = benchmark.summary(run, epoch)
                        file.parent.mkdir(parents=True)
                        file.write_text(json.dumps(summary(dice[run.row.name].tolist(), 4.0, cases)))
        return benchmark

    return make


def test_claims_over_labeled_sets(over_three):
    benchmark = over_three()
    text = write_report(benchmark)
    assert "Over 3 labeled sets and 3 cases, Dice: this covers variation between labeled sets" in text
    found = json.loads((benchmark.home / "results.json").read_text())["tables"][0]["over_draws"]
    rows = {line["row"]: line for line in found["rows"]}
    assert [rows["CPS"][key] for key in ("share", "share_low")] == pytest.approx([0.5, 0.5])  # whatever is resampled
    assert rows["CPS"]["low"] < rows["CPS"]["mean"] < rows["CPS"]["high"]
    assert rows["CPS + SHTA"]["against"] == "CPS"
    assert rows["CPS + SHTA"]["share"] == 0  # its share is of the way from labels only
    assert np.isnan(rows["More labels"]["share"])  # of the gap to itself there is none to tell
    p_values = sorted((line["p"], line["p_holm"]) for line in rows.values())
    assert p_values[0][1] == pytest.approx(3 * p_values[0][0])
    line = next(line for line in text.splitlines() if line.startswith("| CPS | Labels only |") and "50 %" in line)
    assert line.endswith("| 50 % | 50 to 50 % |")


def test_cases_of_a_patient_count_as_one(over_three):
    """By hand: the mean over classes of a case, over the cases of a patient, over patients; in both tables."""
    benchmark = over_three({"case_a": "p1", "case_b": "p1", "case_c": "p2"})
    text = write_report(benchmark)
    assert "Over 3 labeled sets and 2 patients" in text
    found = json.loads((benchmark.home / "results.json").read_text())["tables"][0]
    assert {d["cases"] for d in found["differences"]} == {2}
    rng = np.random.default_rng(0)
    expected = []
    for _ in range(3):
        labels, more = rng.normal(0.4, 0.02, (2, 3, 2)).mean(-1)
        a, b, c = (more + 0.2 - labels) / 2
        expected.append(((a + b) / 2 + c) / 2)
    d = next(d for d in found["differences"] if (d["row"], d["metric"]) == ("CPS", "Dice"))
    assert [*d["seeds"].values()] == pytest.approx(expected)
    line = next(line for line in found["over_draws"]["rows"] if line["row"] == "CPS")
    assert d["mean"] == pytest.approx(np.mean(expected))
    assert line["mean"] == pytest.approx(np.mean(expected))
    assert (line["t_low"] + line["t_high"]) / 2 == pytest.approx(np.mean(expected))


def test_runs_that_were_tested_on_other_cases_are_not_compared(benchmark):
    """Case by case they would be averaged with others', without a word."""
    run = next(run for run in next(benchmark.tables()).runs if run.seed == 1)
    file = benchmark.summary(run, 4)
    file.write_text(json.dumps(summary([[0.5, 0.5]] * 3, 3.0, cases=("case_a", "case_b", "case_d"))))
    with pytest.raises(UserError, match=r"labels_only_2labeled_seed1 and .* \(case_c.nii.gz is among those of one"):
        write_report(benchmark)


def test_without_the_datasets_nobody_knows_patients(benchmark):
    (benchmark.raw / "Dataset500_X").rmdir()
    with pytest.raises(UserError, match=r"none of this benchmark's datasets \(500, .* nnUNet_raw"):
        write_report(benchmark)


def test_all_labels_are_one_set(over_three, given):
    """However many seeds: they differ by chance."""
    given["labeled"], given["rows"] = ["all"], given["rows"][:3]
    given["rows"].append({"name": "More labels", "trainer": "nnUNetTrainerURPC"})
    given["data"] = {"published": "la", "order_by_seed": True}
    text = write_report(over_three())
    assert "| CPS | Labels only | Dice (%) |" in text
    assert "labeled sets and" not in text


def test_a_row_without_a_seed_wins_nothing(benchmark):
    """Its mean is over other labeled sets."""
    for run in next(benchmark.tables()).runs:
        if run.row.name == "CPS + SHTA" and run.seed == 0:
            benchmark.summary(run, 4).unlink()
    lines = write_report(benchmark).splitlines()
    assert any(line.startswith("| CPS + SHTA (1 of 2 seeds) | 80 | 2.0 | 68.67 (+2.00)") for line in lines)
    assert any(line.startswith("| CPS | 80 | 2.0 | **61.67** |") for line in lines)
    assert any(line.startswith("| CPS + SHTA (1 of 2 seeds) | 66.67 | 68.67") for line in lines)


@pytest.mark.parametrize(
    ("groups", "told", "units"),
    [
        (None, "3 cases", 3),
        ({"1.2.a": "p1", "1.2.b": "p1", "1.2.c": "p2"}, "2 patients", 2),
    ],
)
def test_names_with_dots_are_names_of_different_cases(over_three, groups, told, units):
    """As DICOM's UIDs are: only the file ending is no part of the name."""
    benchmark = over_three(groups, ("1.2.a", "1.2.b", "1.2.c"))
    assert f"Over 3 labeled sets and {told}" in write_report(benchmark)
    results = json.loads((benchmark.home / "results.json").read_text())
    assert {d["cases"] for d in results["tables"][0]["differences"]} == {units}


def test_a_case_without_a_patient_counts_as_one(over_three):
    assert "Over 3 labeled sets and 2 patients" in write_report(over_three({"case_a": "p1", "case_c": "p1"}))


def test_two_labeled_sets_are_no_claim(benchmark):
    assert "labeled sets and" not in write_report(benchmark)


def test_offline_minutes_are_of_the_budget_and_shown(over_three):
    benchmark = over_three()
    steps = {run.row.name: 4 * run.iterations for run in next(benchmark.tables()).runs}
    assert (steps["Labels only"], steps["CPS"]) == (6000, 3300)  # 10 and 5.5 minutes of 0.1 s
    lines = write_report(benchmark).splitlines()
    assert any(line.startswith("| Method | Steps | Minutes | Of these offline | Dice") for line in lines)
    assert any(line.startswith("| CPS | 3,300 | 5.5 | 4.5 |") for line in lines)
    assert any(line.startswith("| Labels only | 6,000 | 1.0 | 0.0 |") for line in lines)
