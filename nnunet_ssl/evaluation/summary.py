"""What is told about one method: means, ``summary.json`` as nnU-Net writes it, ``cases.csv``, ``summary.md``."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_ssl.evaluation.classes import Dataset
from nnunet_ssl.evaluation.folders import Case
from nnunet_ssl.evaluation.metrics import EMPTY_RULES, METRICS, SURFACE, SURFACE_METRICS, Label, Metric, Options
from nnunet_ssl.files import replacing, write_text

COUNTS = ("TP", "FP", "FN", "TN", "n_pred", "n_ref")


@dataclass(frozen=True)
class Evaluation:
    """All numbers of one method, and what was measured."""

    method: str
    cases: Sequence[Case]  # measured ones, see evaluate_folders; the same list for all methods
    dataset: Dataset
    options: Options

    def of_case(self, case: Case) -> dict[Label, dict[str, float]]:
        """Class -> key -> value."""
        return case.metrics[self.method]

    @property
    def metrics(self) -> list[Metric]:
        """Those that were asked for."""
        return [METRICS[name] for name in self.options.metrics]

    def values(self, key: str) -> np.ndarray:
        """``[cases, classes]``, NaN where undefined."""
        return np.array([[self.of_case(case)[c][key] for c in self.dataset.classes] for case in self.cases], float)

    def class_means(self, key: str) -> dict[Label, float]:
        """Class -> mean over the cases where it is defined; NaN where there is none."""
        return dict(zip(self.dataset.classes, map(nanmean, self.values(key).T), strict=True))

    def mean(self, key: str, classes: Iterable[Label] | None = None) -> float:
        """Mean over classes (all, or the classes of a group) of their means over cases."""
        means = self.class_means(key)
        return nanmean([means[c] for c in (means if classes is None else classes)])

    def empties(self, label: Label) -> dict[str, int]:
        """In how many cases a class is missed (empty prediction), made up (empty truth), or absent from both."""
        sizes = [(self.of_case(case)[label]["n_ref"], self.of_case(case)[label]["n_pred"]) for case in self.cases]
        return {
            "missed": sum(ref > 0 and pred == 0 for ref, pred in sizes),
            "made_up": sum(ref == 0 and pred > 0 for ref, pred in sizes),
            "absent": sum(ref == 0 and pred == 0 for ref, pred in sizes),
        }


def nanmean(values: Iterable[float]) -> float:
    """Mean of what is not NaN; NaN, without a warning, if nothing is left."""
    defined = [float(v) for v in values if not math.isnan(v)]
    return sum(defined) / len(defined) if defined else math.nan


def definitions(options: Options) -> dict[str, str]:
    """The definitions and rules behind the numbers, for people."""
    chosen = {METRICS[name].key: METRICS[name].definition for name in options.metrics}
    lines = {"IoU": METRICS["jaccard"].definition, "Dice": METRICS["dice"].definition, **chosen}
    if set(options.metrics) & set(SURFACE_METRICS):
        lines["surface"] = SURFACE
        lines["unit"] = f"Distances are in {options.unit}."
    if "nsd" in options.metrics:
        lines["NSD"] += f" Tolerance: {options.tolerance:g} {options.unit}."
    lines["empty"] = f"Rule {options.empty}. {EMPTY_RULES[options.empty].meaning}"
    return dict(sorted(lines.items()))


def write_summary(evaluation: Evaluation, folder: str) -> None:
    """Write ``summary.json``, ``cases.csv`` and ``summary.md``; the folder is made where it does not exist."""
    from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key, save_summary_json

    os.makedirs(folder, exist_ok=True)
    method, classes, options = evaluation.method, evaluation.dataset.classes, evaluation.options
    keys = list(evaluation.of_case(evaluation.cases[0])[next(iter(classes))])
    means = {key: evaluation.class_means(key) for key in keys}
    groups = evaluation.dataset.groups.items()
    summary = {  # nnU-Net's keys, for its own writer; what it does not know stands beside them
        "metric_per_case": [
            {"reference_file": c.reference, "prediction_file": c.predictions[method], "metrics": evaluation.of_case(c)}
            for c in evaluation.cases
        ],
        "mean": {label: {key: means[key][label] for key in keys} for label in classes},
        "foreground_mean": {key: evaluation.mean(key) for key in keys},
        "group_mean": {name: {key: evaluation.mean(key, members) for key in keys} for name, members in groups},
        "class_names": {label_or_region_to_key(label): name for label, name in classes.items()},
        "empty_cases": {label_or_region_to_key(label): evaluation.empties(label) for label in classes},
        "definitions": definitions(options),
        "options": {
            "spacing": "mm" if options.in_mm else "voxel",
            "tolerance": options.tolerance,
            "empty": options.empty,
        },
    }
    with replacing(os.path.join(folder, "summary.json")) as temporary:
        save_summary_json(summary, temporary)
    metrics = evaluation.metrics
    rows = [["case", "class", "name", *(metric.title for metric in metrics), *COUNTS]]
    for case in evaluation.cases:
        for label, values in evaluation.of_case(case).items():
            numbers = [values[key] for key in (*(metric.key for metric in metrics), *COUNTS)]
            rows.append([case.name, label, classes[label], *numbers])
    with (
        replacing(os.path.join(folder, "cases.csv")) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as stream,
    ):
        csv.writer(stream).writerows(rows)
    write_text(os.path.join(folder, "summary.md"), summary_markdown(evaluation))


def summary_markdown(evaluation: Evaluation) -> str:
    """A table with a row a class, group and mean, and what its numbers are."""
    metrics, dataset, options = evaluation.metrics, evaluation.dataset, evaluation.options
    rows = [["Class", *(heading(metric, options.unit) for metric in metrics), "Missed", "Made up", "Absent"]]
    for label, name in dataset.classes.items():
        column = list(dataset.classes).index(label)
        cells = [_mean_and_std(metric, evaluation.values(metric.key)[:, column]) for metric in metrics]
        rows.append([name, *cells, *map(str, evaluation.empties(label).values())])
    for name, classes in [*dataset.groups.items(), ("Mean", None)]:
        cells = [shown(metric, evaluation.mean(metric.key, classes)) for metric in metrics]
        rows.append([f"**{name}**", *cells, "", "", ""])
    return "\n".join(
        [
            f"# {evaluation.method}",
            "",
            f"{len(evaluation.cases)} cases. Mean ± standard deviation over cases; groups and mean are means of the "
            "classes' means. Missed, made up, absent: cases in which the class is empty in the prediction, in the "
            "truth, in both.",
            "",
            *table(rows),
            "",
            *(f"- {name}: {text}" for name, text in definitions(options).items()),
            "",
        ]
    )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first row is its head, the first column is flush left."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return [f"| {' | '.join(row)} |" for row in [escaped[0], rule, *escaped[1:]]]


def heading(metric: Metric, unit: str) -> str:
    """Of a metric's column, with the unit of distances and the direction."""
    return f"{metric.title} ({unit if metric.is_distance else '%'}) {'↑' if metric.higher_is_better else '↓'}"


def shown(metric: Metric, value: float) -> str:
    """A value as the papers print it: shares in %, two decimals."""
    return "–" if math.isnan(value) else f"{value * (1 if metric.is_distance else 100):.2f}"


def _mean_and_std(metric: Metric, values: np.ndarray) -> str:
    defined = values[~np.isnan(values)]
    std = f" ± {shown(metric, defined.std(ddof=1))}" if len(defined) > 1 else ""
    return shown(metric, nanmean(defined)) + std
