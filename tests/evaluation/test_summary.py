"""Means and files of one method: nnU-Net's numbers where nnU-Net has them."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
from helpers.datasets import threads_for_processes
from helpers.label_maps import labels, write, write_dataset
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder, load_summary_json

from nnunet_ssl.evaluation.classes import read_dataset
from nnunet_ssl.evaluation.folders import evaluate_folders
from nnunet_ssl.evaluation.metrics import Options
from nnunet_ssl.evaluation.summary import Evaluation, nanmean, summary_markdown, write_summary

REGIONS = {
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": 3},
    "regions_class_order": [1, 2, 3],
}
IGNORE = {"labels": {"background": 0, "one": 1, "two": 2, "ignore": 3}}


def evaluate(home, options=None):
    """Evaluate the method "a" of ``write_dataset``."""
    dataset = read_dataset(str(home / "labels"), [])
    options = options or Options()
    cases = evaluate_folders(str(home / "labels"), {"a": str(home / "a")}, dataset, options)
    return Evaluation("a", cases, dataset, options)


def without_class(home, folder, case, label):
    """Take a class out of a label map."""
    array = labels(10 * case + (folder != "labels"))
    array[array == label] = 0
    write(home / folder / f"case_{case}.nii.gz", array)


@pytest.mark.parametrize("kind", ["labels", "regions", "ignore"])
def test_summary_json_has_nnunets_numbers(tmp_path, kind):
    write_dataset(tmp_path, **{"labels": {}, "regions": REGIONS, "ignore": IGNORE}[kind])
    without_class(tmp_path, "a", 0, 1)  # missed in case 0, in neither in case 1
    without_class(tmp_path, "a", 1, 1)
    without_class(tmp_path, "labels", 1, 1)
    evaluation = evaluate(tmp_path)
    write_summary(evaluation, str(tmp_path / "out"))
    ours = load_summary_json(str(tmp_path / "out" / "summary.json"))

    dataset, files = evaluation.dataset, (str(tmp_path / "labels"), str(tmp_path / "a"), str(tmp_path / "theirs.json"))
    with threads_for_processes():
        compute_metrics_on_folder(
            *files, dataset.reader(), ".nii.gz", list(dataset.classes), dataset.ignore_label, num_processes=1
        )
    theirs = load_summary_json(str(tmp_path / "theirs.json"))

    keys = theirs["foreground_mean"].keys()
    assert keys == {"Dice", "IoU", "TP", "FP", "FN", "TN", "n_pred", "n_ref"}
    assert {key: ours["foreground_mean"][key] for key in keys} == pytest.approx(theirs["foreground_mean"])
    for label in dataset.classes:
        assert {key: ours["mean"][label][key] for key in keys} == pytest.approx(theirs["mean"][label])
    assert [c["reference_file"] for c in ours["metric_per_case"]] == [
        c["reference_file"] for c in theirs["metric_per_case"]
    ]
    for own, their in zip(ours["metric_per_case"], theirs["metric_per_case"], strict=True):
        assert own["prediction_file"] == their["prediction_file"]
        for label, values in their["metrics"].items():
            np.testing.assert_equal({key: own["metrics"][label][key] for key in keys}, values)
        assert {"HD95", "ASD", "ASSD", "NSD"} <= own["metrics"][label].keys()


def test_means_leave_out_what_is_undefined(tmp_path):
    write_dataset(tmp_path, class_groups={"First two": [1, 2]})
    without_class(tmp_path, "a", 0, 1)
    evaluation = evaluate(tmp_path)
    values = evaluation.values("ASD")
    assert np.isnan(values).sum() == 1
    means = [values[1:, 0].mean(), values[:, 1].mean(), values[:, 2].mean()]
    assert list(evaluation.class_means("ASD").values()) == pytest.approx(means)
    assert evaluation.mean("ASD") == pytest.approx(np.mean(means))
    assert evaluation.mean("ASD", [1, 2]) == pytest.approx(np.mean(means[:2]))
    assert evaluation.class_means("Dice")[1] == pytest.approx(evaluation.values("Dice")[:, 0].mean())  # 0 counts
    assert evaluation.empties(1) == {"missed": 1, "made_up": 0, "absent": 0}


def test_class_that_occurs_nowhere_does_not_undo_the_mean(tmp_path):
    write_dataset(tmp_path, num_cases=2)
    for case in range(2):
        without_class(tmp_path, "a", case, 2)
        without_class(tmp_path, "labels", case, 2)
    evaluation = evaluate(tmp_path)
    assert math.isnan(evaluation.class_means("Dice")[2])
    assert evaluation.mean("Dice") == pytest.approx(nanmean(evaluation.class_means("Dice").values()))
    assert not math.isnan(evaluation.mean("Dice"))
    assert "| two | – | – |" in summary_markdown(evaluation)


def test_summary_json_says_what_its_numbers_are(tmp_path):
    write_dataset(tmp_path, class_groups={"Large": ["one", "two"]})
    evaluation = evaluate(tmp_path, Options(in_mm=False, tolerance=2.5, empty="128"))
    write_summary(evaluation, str(tmp_path / "out"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["options"] == {"spacing": "voxel", "tolerance": 2.5, "empty": "128"}
    assert summary["class_names"] == {"1": "one", "2": "two", "3": "three"}
    assert summary["group_mean"]["Large"]["HD95"] == pytest.approx(evaluation.mean("HD95", [1, 2]))
    assert "pooled" in summary["definitions"]["HD95"]
    assert "2.5 voxels" in summary["definitions"]["NSD"]
    assert "128" in summary["definitions"]["empty"]
    assert "surface" in summary["definitions"]


def test_without_surface_metrics_there_is_no_word_of_them(tmp_path):
    write_dataset(tmp_path)
    evaluation = evaluate(tmp_path, Options(("dice", "jaccard")))
    write_summary(evaluation, str(tmp_path / "out"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["definitions"].keys() == {"Dice", "IoU", "empty"}
    assert "HD95" not in (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")


def test_csv_has_a_row_for_each_case_and_class(tmp_path):
    write_dataset(tmp_path)
    without_class(tmp_path, "a", 0, 1)
    evaluation = evaluate(tmp_path)
    write_summary(evaluation, str(tmp_path / "out"))
    with open(tmp_path / "out" / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["class"], row["name"]) for row in rows[:4]] == [
        ("case_0", "1", "one"), ("case_0", "2", "two"), ("case_0", "3", "three"), ("case_1", "1", "one"),
    ]  # fmt: skip
    assert len(rows) == 12
    for title, key in {"Dice": "Dice", "Jaccard": "IoU", "HD95": "HD95", "NSD": "NSD"}.items():
        np.testing.assert_equal([float(row[title]) for row in rows], evaluation.values(key).ravel())
    assert (rows[0]["n_pred"], rows[0]["HD95"], rows[0]["Dice"]) == ("0", "nan", "0.0")


def test_markdown_shows_means_groups_and_empties(tmp_path):
    write_dataset(tmp_path, class_groups={"Large": ["one", "two"]})
    without_class(tmp_path, "a", 0, 1)
    evaluation = evaluate(tmp_path, Options(("dice", "hd95")))
    lines = summary_markdown(evaluation).splitlines()
    assert "| Class | Dice (%) ↑ | HD95 (mm) ↓ | Missed | Made up | Absent |" in lines
    dice, hd95 = evaluation.values("Dice")[:, 0] * 100, evaluation.values("HD95")[1:, 0]
    cells = [f"{dice.mean():.2f} ± {dice.std(ddof=1):.2f}", f"{hd95.mean():.2f} ± {hd95.std(ddof=1):.2f}"]
    assert f"| one | {cells[0]} | {cells[1]} | 1 | 0 | 0 |" in lines
    large = [100 * evaluation.mean("Dice", [1, 2]), evaluation.mean("HD95", [1, 2])]
    assert f"| **Large** | {large[0]:.2f} | {large[1]:.2f} |  |  |  |" in lines
    assert any(line.startswith("| **Mean** |") for line in lines)


def test_what_is_missed_made_up_and_absent(tmp_path):
    write_dataset(tmp_path)
    without_class(tmp_path, "a", 0, 1)
    evaluation = evaluate(tmp_path, Options(("dice",)))
    counts = {"missed": 1, "made_up": 0, "absent": 0}
    assert evaluation.empties(1) == counts
    for n_ref, n_pred, name in ((0, 5, "made_up"), (0, 0, "absent")):
        case = evaluation.of_case(evaluation.cases[-1])[1]
        case["n_ref"], case["n_pred"] = n_ref, n_pred
        assert evaluation.empties(1) == counts | {name: 1}
