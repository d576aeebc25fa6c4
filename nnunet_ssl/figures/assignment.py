"""Figure 4: to which class SHTA's proxies assign foreground tokens, and to which class they belong.

As Fig. 7 of the SHTA paper: flows from the class whose proxy is nearest (left) to the class by the truth (right), as
wide as there are tokens. Where the training kept earlier checkpoints, a panel of the earliest shows the start.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Outline
from sklearn.isotonic import isotonic_regression
from sklearn.metrics import confusion_matrix
from tqdm import tqdm

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.summary import table
from nnunet_ssl.figures.page import class_colors, column_width, new_figure, paper_style, save_figure
from nnunet_ssl.figures.runs import Case, FigureOptions, NotApplicable, TrainedRun, cases_in_words
from nnunet_ssl.figures.shta_tokens import cut_patches, has_branch, load_branch, load_model, read_tokens
from nnunet_ssl.trainers.base import training_state_file

BACKGROUND = "#999999"
GAP = 0.03  # between nodes, of the height that all tokens have
NODE = 0.05  # width of a node, of the panel
LINE = 0.06  # height of a line of text, of the panel
PALE = 0.25  # opacity of flows to the same class


def draw_assignment(runs: Sequence[TrainedRun], cases: Sequence[Case], out: Path, options: FigureOptions) -> None:
    """Write ``assignment``.

    Raises:
        NotApplicable: no run was trained with SHTA.
        UserError: the branch cannot be read, or none of the classes has tokens.
    """
    with_shta = [run for run in runs if has_branch(run)]
    if not with_shta:
        raise NotApplicable("none of the trainers has SHTA's proxies. Add one whose name has SHTA_ with -tr.")
    panels = [panel for run in with_shta for panel in [*earliest_kept(run), run]]
    counts = [count_assignments(run, cases, options) for run in panels]
    if not any(c.sum() for c in counts):
        raise UserError(
            f"{cases_in_words(cases)} have no tokens of the classes {', '.join(options.names.values())}. Name others "
            "with --classes."
        )
    with paper_style():
        figure = assignment_figure([run.name for run in panels], counts, options)
        save_figure(figure, out, "assignment", _caption(panels, counts, cases, options))


def earliest_kept(run: TrainedRun) -> list[TrainedRun]:
    """The same run after the first of the epochs that its setting ``keep_epochs`` kept, or nothing."""
    kept = {}
    for file in run.fold_folder.glob("checkpoint_epoch*.pth"):
        match = re.fullmatch(r"checkpoint_epoch(\d+)\.pth", file.name)
        if match and os.path.isfile(training_state_file(str(file))):
            kept[int(match[1])] = file.name
    if not kept or kept[min(kept)] == run.checkpoint:
        return []
    return [dataclasses.replace(run, name=f"{run.name}, epoch {min(kept)}", checkpoint=kept[min(kept)])]


def count_assignments(run: TrainedRun, cases: Sequence[Case], options: FigureOptions) -> np.ndarray:
    """Count the eligible tokens of all cases by class and by nearest proxy.

    Returns:
        ``[K, K]``: rows are classes by the truth, those not chosen are empty; columns are assigned classes.
    """
    model = load_model(run, options.device)
    branch = load_branch(run, model)
    counts = np.zeros((branch.num_classes, branch.num_classes), int)
    for case in tqdm(cases, f"Counting tokens, {run.name}"):
        patches = cut_patches(model, branch, case)
        if len(patches.images):
            tokens = read_tokens(model, branch, patches, embed=True)
            counts += confusion_matrix(tokens.classes, tokens.assignment.argmax(1), labels=range(branch.num_classes))
    not_chosen = [label for label in range(branch.num_classes) if label not in options.classes]
    counts[not_chosen] = 0
    return counts


# --------------------------------------------------------------------------------------------------------- drawing


def assignment_figure(names: Sequence[str], counts: Sequence[np.ndarray], options: FigureOptions) -> Figure:
    """A panel for each run.

    Args:
        names: of the panels.
        counts: see ``count_assignments``.
        options: names of the classes.
    """
    num_nodes = max(max((c.sum(0) > 0).sum(), (c.sum(1) > 0).sum()) for c in counts)
    num_columns = min(len(names), 2)
    num_rows = -(-len(names) // num_columns)
    height = 0.4 + min(max(1.8, 0.26 * num_nodes), 5.0)
    figure = new_figure(column_width(num_columns), height * num_rows)
    grid = figure.subplots(num_rows, num_columns, squeeze=False).flat
    every = {label: name for name, label in options.labels.items()}
    colors = dict(zip(every, class_colors(len(every)), strict=True)) | {0: BACKGROUND}
    every[0] = "background"
    for axes, name, c in zip(grid, names, counts, strict=False):
        draw_flows(axes, c, every, colors)
        wrong = c.sum() - np.trace(c)
        axes.set_title(f"{name}: {c.sum()} tokens, {wrong} misassigned")
    for axes in list(grid)[len(names) :]:
        axes.set_axis_off()
    return figure


def draw_flows(axes: Axes, counts: np.ndarray, names: dict[int, str], colors: dict[int, str]) -> None:
    """Flows from assigned classes, left, to those by the truth, right; between different ones in full colour.

    A flow has the colour of its class by the truth, so a stripe tells at its left end who took it.

    Args:
        axes: is emptied of its frame.
        counts: ``[K, K]``, rows by truth.
        names, colors: of all labels.
    """
    axes.set_axis_off()
    if not counts.any():
        return
    left, right = node_bottoms(counts.sum(0)), node_bottoms(counts.sum(1))
    top = counts.sum() + GAP * counts.sum() * (max(len(left), len(right)) - 1)
    for truth, assigned, start, end in sorted(flows(counts, left, right), key=lambda f: f[0] != f[1]):
        n = counts[truth, assigned]
        same = truth == assigned
        axes.add_patch(
            PathPatch(
                ribbon(NODE, 1 - NODE, start, end, n),
                facecolor=colors[truth],
                alpha=PALE if same else 0.9,
                edgecolor="none" if same else colors[truth],
                linewidth=0 if same else 0.4,  # a few tokens among many stay visible
                label=f"{assigned}->{truth}",
            )
        )
    lowest, highest = 0.0, top
    for x, bottoms, sums, side in ((0, left, counts.sum(0), "right"), (1 - NODE, right, counts.sum(1), "left")):
        shown = np.flatnonzero(sums)
        for label in shown:
            axes.add_patch(Rectangle((x, bottoms[label]), NODE, sums[label], facecolor=colors[label], linewidth=0))
        middles = np.array([bottoms[label] + sums[label] / 2 for label in shown])
        heights = apart(middles, LINE * top)
        for label, y in zip(shown, heights, strict=True):
            at = x - 0.02 if side == "right" else x + NODE + 0.02
            axes.text(at, y, f"{names[label]} {sums[label]}", ha=side, va="center", fontsize=7)
        lowest, highest = min(lowest, *heights), max(highest, *heights)
    for x, text, side in ((0, "nearest proxy", "left"), (1, "truth", "right")):
        axes.text(x, 1.01 * top, text, ha=side, va="bottom", fontsize=7, style="italic")
    axes.set(xlim=(-0.45, 1.45), ylim=(lowest - LINE / 2 * top, highest + 1.5 * LINE * top))


def node_bottoms(sums: np.ndarray) -> dict[int, float]:
    """Where each node starts; nodes are stacked from the top, lowest label first, empty ones left out."""
    gap = GAP * sums.sum()
    nodes = [int(label) for label in np.flatnonzero(sums)][::-1]
    bottoms, y = {}, 0.0
    for label in nodes:
        bottoms[label] = y
        y += sums[label] + gap
    return bottoms


def flows(counts: np.ndarray, left: dict[int, float], right: dict[int, float]) -> list[tuple[int, int, float, float]]:
    """Every flow with where it starts at its left node and ends at its right one: truth, assigned, start, end.

    Within a node flows keep the order of the nodes at their other end, so they cross as little as they can.
    """
    start, end = dict(left), dict(right)
    found = []
    for truth in sorted(right, reverse=True):
        for assigned in sorted(left, reverse=True):
            n = counts[truth, assigned]
            if n:
                found.append((truth, assigned, start[assigned], end[truth]))
                start[assigned] += n
                end[truth] += n
    return found


def ribbon(x0: float, x1: float, y0: float, y1: float, width: float) -> Outline:
    """A band of constant height from ``(x0, y0)`` to ``(x1, y1)``, its lower corners, level at both ends."""
    middle = (x0 + x1) / 2
    lower = [(x0, y0), (middle, y0), (middle, y1), (x1, y1)]
    upper = [(x, y + width) for x, y in reversed(lower)]
    curve = [Outline.CURVE4] * 3
    return Outline([*lower, *upper, lower[0]], [Outline.MOVETO, *curve, Outline.LINETO, *curve, Outline.CLOSEPOLY])


def apart(places: np.ndarray, distance: float) -> np.ndarray:
    """Places moved as little as needs be so that neighbours are ``distance`` apart, in their order.

    Least squares with that constraint is the regression that only rises, of the places less their share of distance.
    """
    order = np.argsort(places, kind="stable")
    room = distance * np.arange(len(places))
    moved = np.empty(len(places))
    moved[order] = isotonic_regression(places[order] - room) + room
    return moved


def _caption(
    panels: Sequence[TrainedRun], counts: Sequence[np.ndarray], cases: Sequence[Case], options: FigureOptions
) -> str:
    names = {0: "background", **{label: name for name, label in options.labels.items()}}
    lines = [
        "**Assignment of foreground tokens.** Left: the class whose proxy is nearest to a token's embedding (largest q "
        "of Eq. 3). Right: the class that most of the token's foreground has by the truth. Flows and nodes are as wide "
        "as there are tokens, each panel in its own scale. Flows have the colour of the class by the truth; those "
        "between different classes, misassigned tokens, are in full colour, the others pale.",
        "",
        "Rule: all tokens that are eligible by Eq. 7 (share of foreground and of the most frequent class; the run's "
        "own thresholds) and belong to one of the chosen classes. So background is a class that tokens are assigned "
        "to, and none that they belong to.",
    ]
    for run, c in zip(panels, counts, strict=True):
        left, right = np.flatnonzero(c.sum(0)), np.flatnonzero(c.sum(1))
        rows = [["By the truth", *(f"to {names[a]}" for a in left), "all", "misassigned (%)"]]
        for t in right:
            wrong = 100 * (1 - c[t, t] / c[t].sum())
            rows.append([names[t], *(str(c[t, a]) for a in left), str(c[t].sum()), f"{wrong:.2f}"])
        wrong = 100 * (1 - np.trace(c) / max(c.sum(), 1))
        rows.append(["all", *(str(c[:, a].sum()) for a in left), str(c.sum()), f"{wrong:.2f}"])
        lines += ["", f"{run.name}, `{run.checkpoint_file}`:", "", *table(rows)]
    return "\n".join([*lines, "", f"From {cases_in_words(cases)}."])
