"""Paired comparison against scipy called directly, and the papers' table."""

from __future__ import annotations

import csv
import itertools
import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nnunet_ssl.evaluation.classes import Dataset
from nnunet_ssl.evaluation.compare import (
    EXPLANATION,
    bootstrap_interval,
    compare,
    holm,
    methods_table,
    signed_rank_p,
    write_comparison,
)
from nnunet_ssl.evaluation.folders import Case
from nnunet_ssl.evaluation.metrics import Options
from nnunet_ssl.evaluation.summary import Evaluation

CLASSES = {1: "liver", 2: "aorta", 3: "esophagus"}
GROUPS = {"Large": (1, 2), "Small": (3,)}


def evaluations(options=None, **values):
    """Evaluations from ``method=(Dice [cases, classes], HD95 [cases, classes])``."""
    options = options or Options(("dice", "hd95"))
    first = next(iter(values.values()))[0]
    cases = []
    for i in range(len(first)):
        metrics = {
            method: {
                c: {"Dice": dice[i][j], "HD95": hd95[i][j], "n_ref": 1, "n_pred": 1} for j, c in enumerate(CLASSES)
            }
            for method, (dice, hd95) in values.items()
        }
        cases.append(Case(f"case_{i}", "", {}, metrics))
    dataset = Dataset(CLASSES, ".nii.gz", type, None, GROUPS)
    return [Evaluation(method, cases, dataset, options) for method in values]


def random_values(seed, num_cases=12, gain=0.0):
    """Dice and HD95 of every case and class."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0.4, 0.8, (num_cases, 3)) + gain, rng.uniform(1, 9, (num_cases, 3)) - 5 * gain


def one(differences, metric, target, method="b"):
    """The only difference of a metric and a target."""
    [found] = [d for d in differences.itertuples() if (d.metric, d.target, d.method) == (metric, target, method)]
    return found


def test_a_class_is_compared_as_scipy_does():
    a, b = random_values(0), random_values(1, gain=0.05)
    differences = compare(evaluations(a=a, b=b), seed=3)
    p_values = []
    for j, name in enumerate(CLASSES.values()):
        d = b[0][:, j] - a[0][:, j]
        found = one(differences, "Dice", name)
        interval = stats.bootstrap((d,), np.mean, n_resamples=9999, rng=np.random.default_rng(3)).confidence_interval
        assert (found.n, found.baseline, found.kind) == (12, "a", "class")
        assert found.difference == pytest.approx(d.mean())
        assert found.method_mean - found.baseline_mean == pytest.approx(d.mean())
        assert (found.low, found.high) == pytest.approx(tuple(interval))
        assert found.p == pytest.approx(stats.wilcoxon(b[0][:, j], a[0][:, j]).pvalue)
        assert (found.wins, found.ties, found.losses) == ((d > 0).sum(), 0, (d < 0).sum())
        p_values.append(found.p)
    assert [one(differences, "Dice", name).p_holm for name in CLASSES.values()] == pytest.approx(holm(p_values))
    assert len(differences) == 2 * 6  # metrics; mean, groups, classes


def test_mean_and_groups_are_compared_case_by_case():
    a, b = random_values(0), random_values(1)
    differences = compare(evaluations(a=a, b=b))
    for target, columns in {"Mean": [0, 1, 2], "Large": [0, 1], "Small": [2]}.items():
        d = (b[1] - a[1])[:, columns].mean(1)
        found = one(differences, "HD95", target)
        assert found.difference == pytest.approx(d.mean())
        assert found.p == pytest.approx(stats.wilcoxon(d).pvalue)
        assert found.p_holm == found.p  # of one method
        assert (found.wins, found.losses) == ((d < 0).sum(), (d > 0).sum())  # less is better


def test_means_and_groups_are_corrected_over_the_methods():
    others = {name: random_values(seed, gain=0.05) for seed, name in enumerate("bcd", 1)}
    differences = compare(evaluations(a=random_values(0), **others))
    for metric in ("Dice", "HD95"):
        for target in ("Mean", "Large", "Small"):
            found = differences[(differences.metric == metric) & (differences.target == target)]
            assert list(found.method) == list("bcd")
            assert list(found.p_holm) == pytest.approx(holm(found.p))


def test_only_pairs_that_are_defined_on_both_sides_count():
    a, b = random_values(0), random_values(1)
    a[0][0, 0] = b[0][1, 0] = a[0][1, 0] = math.nan
    b[0][2] = math.nan
    differences = compare(evaluations(a=a, b=b))
    d = b[0] - a[0]
    assert one(differences, "Dice", "liver").n == 9
    assert one(differences, "Dice", "liver").difference == pytest.approx(d[3:, 0].mean())
    found = one(differences, "Dice", "Mean")
    assert found.n == 11  # case 2 has no pair at all
    assert found.difference == pytest.approx(np.mean([np.nanmean(d[i]) for i in range(12) if i != 2]))


def test_every_other_method_is_compared_with_the_first():
    differences = compare(evaluations(a=random_values(0), b=random_values(1), c=random_values(2)))
    assert set(zip(differences.baseline, differences.method, strict=True)) == {("a", "b"), ("a", "c")}
    alone = compare(evaluations(a=random_values(0), c=random_values(2)))
    ours = differences[differences.method == "c"].reset_index(drop=True)
    corrected = ours.kind == "class"  # the others are, over the methods
    pd.testing.assert_frame_equal(ours[corrected], alone[corrected])
    pd.testing.assert_frame_equal(ours.drop(columns="p_holm"), alone.drop(columns="p_holm"))


@pytest.mark.parametrize("num_cases", [1, 2, 3])
@pytest.mark.parametrize("kind", ["equal", "shifted", "random", "undefined"])
def test_few_cases_and_equal_values_do_not_crash(num_cases, kind, tmp_path):
    a = random_values(0, num_cases)
    b = {
        "equal": a,
        "shifted": (a[0] + 0.125, a[1]),
        "random": random_values(1, num_cases),
        "undefined": (a[0] * math.nan, a[1] * math.nan),
    }[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = write_comparison(evaluations(a=a, b=b), str(tmp_path))
    found = one(compare(evaluations(a=a, b=b)), "Dice", "Mean")
    assert "nan" not in text.split(EXPLANATION)[0]
    if kind == "equal":
        assert (found.difference, found.p, found.ties) == (0, 1, num_cases)
        assert "+0.00" in text
    if kind == "undefined":
        assert (found.n, found.wins, found.ties, found.losses) == (0, 0, 0, 0)


def test_rounding_is_no_difference():
    a = random_values(0)
    b = (a[0] + 1e-12 * np.where(np.arange(12) % 2, 1, -1)[:, None], a[1])
    found = one(compare(evaluations(a=a, b=b)), "Dice", "Mean")
    assert (found.ties, found.p) == (12, 1)


def test_interval_and_p_of_what_has_no_spread():
    assert bootstrap_interval(np.full(5, 0.25)) == (0.25, 0.25)
    assert np.isnan(bootstrap_interval(np.array([0.25]))).all()
    assert signed_rank_p(np.zeros(5)) == 1
    assert math.isnan(signed_rank_p(np.array([])))
    few = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    assert signed_rank_p(few) == pytest.approx(2 / 32)  # both signs, of 2^5
    assert signed_rank_p(np.concatenate([few, np.zeros(30)])) == pytest.approx(2 / 32)  # equal cases say nothing


def test_interval_depends_on_the_seed_alone():
    d = np.random.default_rng(0).normal(size=8)
    assert bootstrap_interval(d, 1) == bootstrap_interval(d, 1) != bootstrap_interval(d, 2)


def test_holm_of_an_example_worked_by_hand():
    # times 4, 3, 2, 1 in order of size, and never less than the one before
    assert holm([0.03, 0.01, 0.04, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1, 1]
    np.testing.assert_equal(holm([math.nan, 0.02]), [math.nan, 0.02])
    assert holm([]) == []


@pytest.mark.parametrize("p_values", itertools.permutations([0.012, 0.013, 0.04, 0.2]))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values):
    for level in (0.05, 0.1):
        rejected = set()
        for rank, i in enumerate(sorted(range(4), key=lambda i: p_values[i])):
            if p_values[i] > level / (4 - rank):
                break
            rejected.add(i)
        assert {i for i, p in enumerate(holm(p_values)) if p <= level} == rejected


def test_table_has_gains_in_brackets_and_the_best_in_bold():
    a = (np.array([[0.80, 0.60, 0.40]] * 2), np.array([[2.0, 3.0, 4.0]] * 2))
    b = (np.array([[0.70, 0.70, 0.70]] * 2), np.array([[2.0, 3.0, 7.0]] * 2))
    assert methods_table(evaluations(CPS=a, SHTA=b)) == [
        "| Method | Mean Dice (%) ↑ | Mean HD95 (mm) ↓ | Large | Small | liver | aorta | esophagus |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| CPS | 60.00 | **3.00** | **70.00** | 40.00 | **80.00** | 60.00 | 40.00 |",
        "| SHTA | **70.00** (+10.00) | 4.00 (+1.00) | **70.00** (+0.00) | **70.00** (+30.00) | 70.00 | **70.00** "
        "| **70.00** |",
    ]


def test_without_dice_the_classes_show_the_first_metric():
    a, b = random_values(0), random_values(1)
    head, _, row, _ = methods_table(evaluations(Options(("hd95",)), a=a, b=b))
    assert head == "| Method | Mean HD95 (mm) ↓ | Large | Small | liver | aorta | esophagus |"
    assert f"{a[1][:, 0].mean():.2f}" in row


def test_files_hold_the_same_differences(tmp_path):
    found = evaluations(a=random_values(0), b=random_values(1))
    text = write_comparison(found, str(tmp_path / "new"), seed=5)
    differences = compare(found, seed=5)
    content = json.loads((tmp_path / "new" / "comparison.json").read_text())
    with open(tmp_path / "new" / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (tmp_path / "new" / "comparison.md").read_text(encoding="utf-8") == text
    assert len(rows) == len(differences) == len(content["differences"])
    for d, row, entry in zip(differences.itertuples(), rows, content["differences"], strict=True):
        assert (row["target"], entry["target"]) == (d.target, d.target)
        assert float(row["low"]) == entry["low"] == d.low
    assert content["methods"]["b"]["Dice"] == found[1].mean("Dice")
    liver = one(differences, "Dice", "liver")
    assert (
        f"| b | liver | {100 * liver.difference:+.2f} | {100 * liver.low:+.2f} to {100 * liver.high:+.2f} "
        f"| {liver.p:.3f} | {liver.p_holm:.3f} | {liver.wins} | 0 | {liver.losses} |"
    ) in text
