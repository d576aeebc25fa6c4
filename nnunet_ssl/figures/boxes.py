"""Figure 6: Dice of every case, as boxes side by side, with the cases paired by lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.classes import Dataset, declared_labels
from nnunet_ssl.evaluation.compare import compare, comparison_markdown
from nnunet_ssl.evaluation.folders import Case as EvaluatedCase
from nnunet_ssl.evaluation.folders import evaluate_case
from nnunet_ssl.evaluation.metrics import Options
from nnunet_ssl.evaluation.summary import Evaluation, nanmean, summary_markdown
from nnunet_ssl.figures import page
from nnunet_ssl.figures.options import FigureOptions
from nnunet_ssl.figures.predictions import models_in_words, with_predictions
from nnunet_ssl.figures.runs import TrainedRun
from nnunet_ssl.figures.test_set import Case, cases_in_words
from nnunet_ssl.pools import all_outcomes

BOXES_A_ROW = 36  # with the gaps between the groups
MAX_HEIGHT = 8.5  # inches, as long as each row has
LEAST_HEIGHT = 0.8
LINES_UP_TO = 60  # cases; more lines would be a gray area
MEAN = "Mean"


def draw_boxes(runs: Sequence[TrainedRun], cases: Sequence[Case], out: Path, options: FigureOptions) -> None:
    """Write ``boxes``: a group of boxes a class and one of the mean over the classes, a box a run.

    Raises:
        UserError: a file cannot be read, or lies on another grid than the truth.
    """
    runs = with_predictions(runs, cases, out, options)
    evaluations = evaluate(runs, cases, options)
    with page.paper_style():
        figure = boxes_figure(evaluations, options.seed)
        page.save_figure(figure, out, "boxes", _caption(evaluations, runs, cases, options))


def evaluate(runs: Sequence[TrainedRun], cases: Sequence[Case], options: FigureOptions) -> list[Evaluation]:
    """Dice of each predicted run, as ``nnUNetv2_ssl_evaluate --metrics dice`` gives it."""
    dataset = Dataset(
        options.names,
        options.file_ending,
        type(runs[0].reader),
        options.ignore_label,
        declared=declared_labels(options.labels.values(), options.ignore_label),
    )
    measure = Options(metrics=("dice",))
    jobs = []
    for case in cases:
        files = {run.name: str(run.predicted / f"{case.name}{options.file_ending}") for run in runs}
        jobs.append((EvaluatedCase(case.name, str(case.label), files), dataset, measure))
    outcomes = all_outcomes(evaluate_case, jobs, options.num_processes, "Evaluating")
    measured = sorted((case for case in outcomes if isinstance(case, EvaluatedCase)), key=lambda case: case.name)
    if problems := [outcome[0] for outcome in outcomes if not isinstance(outcome, EvaluatedCase)]:
        raise UserError(f"{problems[0]}. Replace it, or remove it if it is a prediction that was made for the figures.")
    return [Evaluation(run.name, measured, dataset, measure) for run in runs]


def boxes_figure(evaluations: Sequence[Evaluation], seed: int = 0) -> Figure:
    """Rows of panels, each with the boxes of some classes; ``seed`` places the points within a box's width."""
    names = list(evaluations[0].dataset.classes.values())
    dice = np.stack([e.values("Dice") for e in evaluations]) * 100  # [runs, cases, classes]
    groups = list(np.moveaxis(dice, 2, 0))
    if len(names) > 1:  # a case's mean is over the classes that are defined in it for all runs
        defined = np.where(np.isnan(dice).any(0), np.nan, dice)
        groups.append(np.apply_along_axis(nanmean, 2, defined))
        names.append(MEAN)
    num_runs = len(evaluations)
    a_row = max(1, BOXES_A_ROW // (num_runs + 1))
    num_rows = -(-len(names) // a_row)
    a_row = -(-len(names) // num_rows)  # rows alike
    width = page.column_width(1 if a_row * (num_runs + 1) <= 12 else 2)
    figure = page.new_figure(width, 0.35 + max(min(2.2 * num_rows, MAX_HEIGHT), LEAST_HEIGHT * num_rows))
    names = [page.wrapped(name, 0.9 * (width - 0.5) / a_row) for name in names]
    colors = page.class_colors(num_runs)
    rng = np.random.default_rng(seed)
    shift = rng.uniform(-0.22, 0.22, dice.shape[1])  # of a case, in all boxes: lines stay parallel
    for row, axes in enumerate(figure.subplots(num_rows, 1, squeeze=False, sharey=True)[:, 0]):
        part = slice(row * a_row, (row + 1) * a_row)
        first = np.arange(len(names[part])) * (num_runs + 1)
        for start, values in zip(first, groups[part], strict=True):
            places = start + np.arange(num_runs)
            boxes = axes.boxplot(
                [run[~np.isnan(run)] for run in values], positions=places, widths=0.75, showfliers=False,
                patch_artist=True, manage_ticks=False, medianprops={"color": "black", "linewidth": 1.2},
                whiskerprops={"linewidth": 0.7}, capprops={"linewidth": 0.7}, boxprops={"linewidth": 0.7},
            )  # fmt: skip
            for box, color in zip(boxes["boxes"], colors, strict=True):
                box.set_facecolor((*to_rgb(color), 0.55))
            x = places[:, None] + shift
            if values.shape[1] <= LINES_UP_TO:
                axes.plot(x, values, color="0.5", linewidth=0.3, alpha=0.5, zorder=2.5)
            axes.plot(x.T, values.T, ".", color="0.2", markersize=2, alpha=0.6, markeredgewidth=0, zorder=3)
        axes.set_xticks(first + (num_runs - 1) / 2, names[part])
        axes.tick_params("x", length=0)
        axes.set(xlim=(-0.6, a_row * (num_runs + 1) - 1.4), ylabel="Dice (%)", axisbelow=True)
        axes.grid(axis="y", alpha=0.4)
    handles = [Patch(color=color, alpha=0.6, linewidth=0, label=e.method)
               for color, e in zip(colors, evaluations, strict=True)]  # fmt: skip
    page.add_legend(figure, "upper", handles)
    return figure


def _caption(
    evaluations: Sequence[Evaluation], runs: Sequence[TrainedRun], cases: Sequence[Case], options: FigureOptions
) -> str:
    if len(evaluations) > 1:
        tables = comparison_markdown(evaluations, compare(evaluations, options.seed))
    else:
        tables = summary_markdown(evaluations[0])
    return page.caption(
        "boxes",
        cases=cases_in_words(cases),
        lines_up_to=LINES_UP_TO,
        mean=MEAN,
        models=models_in_words(runs),
        tables=re.sub(r"^#", "##", tables, flags=re.MULTILINE),
    )
