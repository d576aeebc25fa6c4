"""Paired comparison of methods on the same cases: differences to the first, intervals, tests, and the papers' table."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from nnunet_ssl.evaluation.metrics import METRICS, Metric
from nnunet_ssl.evaluation.summary import Evaluation, definitions, heading, nanmean, shown, table
from nnunet_ssl.files import replacing, write_json, write_text

EQUAL = 1e-9  # differences up to this are rounding
RESAMPLES = 9999
EXPLANATION = (
    "Differences are means over the cases in which both methods are defined. Interval: 95 % bootstrap over cases "
    f"(BCa, {RESAMPLES} resamples, seeded). p: two-sided Wilcoxon signed-rank test, ties dropped. p (Holm): corrected, "
    "for a class over the classes of its metric and method, for the mean or a group over the methods."
)


def compare(evaluations: Sequence[Evaluation], seed: int = 0) -> pd.DataFrame:
    """Compare every method with the first.

    There are two evaluations or more, of the same cases in the same order; the seed is the bootstrap's. A case's value
    of the mean (or of a group) is the mean over the classes that are defined for both methods, so that both are judged
    by the same classes.

    Returns:
        A row for each metric, method and target (mean, groups, classes), with the columns

        - metric, method, baseline, target: by name; ``kind`` of target: class, group or mean;
        - n: cases in which both are defined;
        - baseline_mean, method_mean: over these cases;
        - difference: mean of method - baseline; ``low`` and ``high``: its 95 % interval;
        - p: of the Wilcoxon signed-rank test; ``p_holm``: corrected over the classes, or for a mean or a group over the
          methods;
        - wins, ties, losses: cases in which the method is better, equal, worse.
    """
    baseline, *others = evaluations
    classes, groups = baseline.dataset.classes, baseline.dataset.groups
    targets = [("mean", "Mean", tuple(classes)), *(("group", name, members) for name, members in groups.items())]
    targets += [("class", name, (label,)) for label, name in classes.items()]
    column = {label: i for i, label in enumerate(classes)}
    rows = []
    for metric in baseline.metrics:
        for other in others:
            a, b = baseline.values(metric.key), other.values(metric.key)
            unpaired = np.isnan(a) | np.isnan(b)
            a[unpaired] = b[unpaired] = np.nan
            names = {"metric": metric.title, "method": other.method, "baseline": baseline.method}
            for kind, target, members in targets:
                columns = [column[label] for label in members]
                pair = [np.array([nanmean(row[columns]) for row in values]) for values in (a, b)]
                rows.append({**names, "kind": kind, "target": target, **_difference(metric, *pair, seed)})
    found = pd.DataFrame(rows)
    # the classes of a method are a family of tests, and so is a mean or a group of all methods
    family = found["method"].where(found["kind"] == "class", found["target"])
    found["p_holm"] = found.groupby(["metric", "kind", family])["p"].transform(holm)
    return found


def _difference(metric: Metric, a: np.ndarray, b: np.ndarray, seed: int) -> dict[str, float]:
    """Compare values ``[cases]`` of the baseline and of the method, NaN in both where there is no pair."""
    paired = ~np.isnan(a)
    a, b = a[paired], b[paired]
    d = b - a
    d[np.abs(d) <= EQUAL] = 0
    low, high = bootstrap_interval(d, seed)
    gain = d if metric.higher_is_better else -d
    outcomes = {"wins": int((gain > 0).sum()), "ties": int((gain == 0).sum()), "losses": int((gain < 0).sum())}
    means = {"baseline_mean": nanmean(a), "method_mean": nanmean(b), "difference": nanmean(d)}
    return {"n": len(d), **means, "low": low, "high": high, "p": signed_rank_p(d), "p_holm": math.nan, **outcomes}


def bootstrap_interval(differences: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of differences ``[cases]`` by scipy's bootstrap (BCa), which is seeded.

    Returns:
        low, high; NaN for fewer than two cases; both the common value where all cases have the same.
    """
    if len(differences) < 2:
        return math.nan, math.nan
    if np.ptp(differences) == 0:
        return float(differences[0]), float(differences[0])
    result = stats.bootstrap(
        (differences,), np.mean, n_resamples=RESAMPLES, batch=1000, rng=np.random.default_rng(seed)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def signed_rank_p(differences: np.ndarray) -> float:
    """Two-sided p of scipy's Wilcoxon signed-rank test of differences ``[cases]``, of which zeros are dropped.

    It is 1 where all are zero, NaN where there is no case.
    """
    if len(differences) == 0:
        return math.nan
    differences = differences[differences != 0]  # scipy drops them too, but then leaves the exact test
    if len(differences) == 0:
        return 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of few cases, which the table shows
        return float(stats.wilcoxon(differences).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (Scand. J. Statist. 6:65-70, 1979) of a family of tests; NaN are no tests and stay NaN."""
    corrected = [math.nan] * len(p_values)
    tests = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    so_far = 0.0
    for rank, (p, i) in enumerate(tests):
        so_far = max(so_far, min(1.0, (len(tests) - rank) * p))
        corrected[i] = so_far
    return corrected


def write_comparison(evaluations: Sequence[Evaluation], folder: str, seed: int = 0) -> str:
    """Write ``comparison.md``, ``comparison.csv`` and ``comparison.json``; returns the Markdown.

    The first evaluation, of at least two, is the baseline. The folder is made where it does not exist.
    """
    os.makedirs(folder, exist_ok=True)
    differences = compare(evaluations, seed)
    markdown = comparison_markdown(evaluations, differences)
    with replacing(os.path.join(folder, "comparison.csv")) as temporary:
        differences.to_csv(temporary, index=False, na_rep="nan")
    content = {
        "methods": {e.method: {m.title: e.mean(m.key) for m in e.metrics} for e in evaluations},
        "differences": differences.to_dict("records"),
        "definitions": {**definitions(evaluations[0].options), "comparison": EXPLANATION},
        "seed": seed,
    }
    write_json(os.path.join(folder, "comparison.json"), content)
    write_text(os.path.join(folder, "comparison.md"), markdown)
    return markdown


def comparison_markdown(evaluations: Sequence[Evaluation], differences: pd.DataFrame) -> str:
    """The papers' table, then the differences with their intervals and tests."""
    baseline = evaluations[0]
    lines = [
        f"# Comparison with {baseline.method}",
        "",
        f"{len(baseline.cases)} cases. Brackets: difference to {baseline.method}. Bold: best value.",
        "",
        *methods_table(evaluations),
    ]
    for metric in baseline.metrics:
        title = heading(metric, baseline.options.unit)
        rows = [["Method", "Class", title, "95 % interval", "p", "p (Holm)", "Wins", "Ties", "Losses"]]
        for d in differences[differences["metric"] == metric.title].itertuples():
            cells = [d.method, d.target if d.kind == "class" else f"**{d.target}**", signed(metric, d.difference)]
            cells += [interval(metric, d.low, d.high), p_value(d.p), p_value(d.p_holm)]
            rows.append([*cells, *map(str, (d.wins, d.ties, d.losses))])
        lines += ["", f"## {metric.title}: difference to {baseline.method}", "", *table(rows)]
    lines += ["", EXPLANATION, ""]
    lines += [f"- {name}: {text}" for name, text in definitions(baseline.options).items()]
    return "\n".join([*lines, ""])


def methods_table(evaluations: Sequence[Evaluation]) -> list[str]:
    """Lines of a Markdown table with a row a method, as Table I of the SHTA paper.

    Columns: the mean of each metric, then groups and classes in Dice (or the first metric, where Dice was not asked
    for). Means and groups have the difference to the first method in brackets.
    """
    baseline = evaluations[0]
    dataset, options = baseline.dataset, baseline.options
    leading = METRICS["dice"] if "dice" in options.metrics else baseline.metrics[0]
    # heading, metric, classes, whether the difference is shown
    wanted = [(f"Mean {heading(m, options.unit)}", m, tuple(dataset.classes), True) for m in baseline.metrics]
    wanted += [(name, leading, classes, True) for name, classes in dataset.groups.items()]
    wanted += [(name, leading, (label,), False) for label, name in dataset.classes.items()]
    columns = [["Method", *(e.method for e in evaluations)]]
    for title, metric, classes, with_difference in wanted:
        values = [e.mean(metric.key, classes) for e in evaluations]
        first, *others = best_in_bold(metric, values)
        if with_difference:
            others = [with_gain(metric, *cell) for cell in zip(others, np.subtract(values[1:], values[0]), strict=True)]
        columns.append([title, first, *others])
    return table([*zip(*columns, strict=True)])


def best_in_bold(metric: Metric, values: Sequence[float], competes: Sequence[bool] | None = None) -> list[str]:
    """A column of values as they are printed, the best in bold, of those that compete (all, with None)."""
    texts = [shown(metric, value) for value in values]
    rivals = [i for i, value in enumerate(values) if not math.isnan(value) and (competes is None or competes[i])]
    best = (max if metric.higher_is_better else min)((values[i] for i in rivals), default=math.nan)
    return [f"**{t}**" if i in rivals and t == shown(metric, best) else t for i, t in enumerate(texts)]


def with_gain(metric: Metric, cell: str, gain: float) -> str:
    """A cell with what it has more than another in brackets, where that is known."""
    return cell if math.isnan(gain) else f"{cell} ({signed(metric, gain)})"


def signed(metric: Metric, value: float) -> str:
    """A difference as it is printed, with its sign."""
    text = shown(metric, value)
    return text if text.startswith(("-", "–")) else f"+{text}"


def interval(metric: Metric, low: float, high: float) -> str:
    """An interval as it is printed."""
    return "–" if math.isnan(low) else f"{signed(metric, low)} to {signed(metric, high)}"


def p_value(p: float) -> str:
    """A p value as it is printed; nothing where there was no test."""
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
