"""Figure 4: to which class SHTA's proxies assign foreground tokens, and to which class they belong.

As Fig. 7 of the SHTA paper: flows from the class whose proxy is nearest (left) to the class by the truth (right), as
wide as there are tokens. Where the training kept earlier checkpoints, the earliest has a panel as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Outline

from nnunet_ssl.evaluation.summary import table
from nnunet_ssl.figures.options import FigureOptions, NotApplicable
from nnunet_ssl.figures.page import CHARACTER, caption, column_width, new_figure, paper_style, save_figure, wrapped
from nnunet_ssl.figures.runs import TrainedRun
from nnunet_ssl.figures.shta.branch import BACKGROUND
from nnunet_ssl.figures.shta.survey import RULE, survey
from nnunet_ssl.figures.test_set import Case, cases_in_words

NOT_CHOSEN = "#dddddd"
GAP = 0.35  # between nodes at least, of a line of text
NODE = 0.04  # width of a node, of the flows'
LINE = 0.13  # inches, height of a line of text
MIN_FLOWS = 1.2  # inches from left nodes to right ones
PALE = 0.25  # opacity of flows to the same class


def draw_assignment(runs: Sequence[TrainedRun], cases: Sequence[Case], out: Path, options: FigureOptions) -> None:
    """Write ``assignment``.

    Raises:
        NotApplicable: no run was trained with SHTA, or none of the classes has tokens.
        UserError: a model or its branch cannot be read.
    """
    counts = survey(tuple(runs), tuple(cases), tuple(options.names), options.device, options.seed).counts
    if not any(c.any() for c in counts.values()):
        raise NotApplicable(
            f"{cases_in_words(cases)} have no tokens of the classes {', '.join(options.names.values())}. Name others "
            "with --classes."
        )
    with paper_style():
        figure = assignment_figure([run.name for run in counts], list(counts.values()), options)
        save_figure(figure, out, "assignment", _caption(counts, cases, options))


def assignment_figure(names: Sequence[str], counts: Sequence[np.ndarray], options: FigureOptions) -> Figure:
    """A panel for each name, with its counts, see ``Survey``."""
    every = {0: "background", **{label: name for name, label in options.labels.items()}}
    colors = {0: BACKGROUND, **dict.fromkeys(options.labels.values(), NOT_CHOSEN), **options.colors}
    num_nodes = max(max((c.sum(0) > 0).sum(), (c.sum(1) > 0).sum()) for c in counts)
    margin = CHARACTER * max(len(f"{every[k]} {c.max()}") for c in counts for k in every if c[k].any() or c[:, k].any())
    narrow, wide = column_width(1), column_width(2)
    enough = narrow - 2 * margin >= MIN_FLOWS  # for the flows themselves, next to long names
    num_columns = min(len(names), 2 if enough else 1)
    num_rows = -(-len(names) // num_columns)
    height = max(1.6, 2 * LINE * (num_nodes + 2))
    width = narrow if len(names) == 1 and enough else wide
    titles = [
        f"{wrapped(name, width / num_columns)}\n{c.sum()} tokens, {c.sum() - np.trace(c)} misassigned"
        for name, c in zip(names, counts, strict=True)
    ]
    lines_of_text = 1 + max(title.count("\n") for title in titles)
    figure = new_figure(width, (height + 0.15 + 0.15 * lines_of_text) * num_rows)
    grid = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axes in grid:
        axes.set_axis_off()
    for axes, title, c in zip(grid, titles, counts, strict=False):
        draw_flows(axes, c, every, colors, LINE / height)
        axes.set_title(title)
        share = margin / (figure.get_figwidth() / num_columns - 2 * margin)
        axes.set_xlim(-share, 1 + share)
    return figure


def draw_flows(
    axes: Axes, counts: np.ndarray, names: Mapping[int, str], colors: Mapping[int, str], line: float
) -> None:
    """Flows from assigned classes, left, to those by the truth, right; between different ones in full color.

    A flow has the color of its class by the truth, so a stripe tells at its left end who took it. The flows reach from
    0 to 1 in x; labels lie outside.

    Args:
        counts: ``[K, K]``, rows by truth.
        line: height of a line of text, of the panel's; above all nodes there are two.
    """
    if not counts.any():
        return
    sides = {"left": counts.sum(0), "right": counts.sum(1)}
    num_nodes = max(int((sums > 0).sum()) for sums in sides.values())
    # of L tokens' height, so that all of it, at most N + (nodes + 2) L, holds a line for each node and the head
    room = line * counts.sum() / (1 - line * (num_nodes + 2))
    bottoms = {side: node_bottoms(sums, room) for side, sums in sides.items()}
    top = max(bottoms[side][label] + sums[label] for side, sums in sides.items() for label in bottoms[side])
    for truth, assigned, start, end in sorted(flows(counts, **bottoms), key=lambda flow: flow[0] != flow[1]):
        same = truth == assigned
        axes.add_patch(
            PathPatch(
                ribbon(NODE, 1 - NODE, start, end, counts[truth, assigned]),
                facecolor=colors[truth],
                alpha=PALE if same else 0.9,
                edgecolor="none" if same else colors[truth],
                linewidth=0 if same else 0.4,  # a few tokens among many stay visible
                label=f"{assigned}->{truth}",
            )
        )
    for side, head, x in (("left", "nearest proxy", 0), ("right", "truth", 1 - NODE)):
        text = {
            "x": x - 0.02 if side == "left" else x + NODE + 0.02,
            "ha": "right" if side == "left" else "left",
            "va": "center",
            "fontsize": 7,
        }
        for label, y in bottoms[side].items():
            n = sides[side][label]
            axes.add_patch(Rectangle((x, y), NODE, n, facecolor=colors[label], linewidth=0))
            axes.text(y=y + n / 2, s=f"{names[label]} {n}", **text)
        axes.text(y=top + room, s=head, style="italic", **text)
    axes.set_ylim(-room / 2, top + 1.5 * room)


def node_bottoms(sums: np.ndarray, room: float) -> dict[int, float]:
    """Where each node starts: label -> its lower end.

    Nodes, as high as ``sums`` ``[K]``, are stacked from the top, lowest label first, empty ones left out. There is a
    gap between them, and their middles are a line of text apart, which ``room`` is the height of.
    """
    bottoms: dict[int, float] = {}
    top, middle = 0.0, -np.inf
    for label in np.flatnonzero(sums)[::-1].tolist():
        bottoms[label] = 0.0 if not bottoms else max(top + GAP * room, middle + room - sums[label] / 2)
        top, middle = bottoms[label] + sums[label], bottoms[label] + sums[label] / 2
    return bottoms


def flows(
    counts: np.ndarray, left: Mapping[int, float], right: Mapping[int, float]
) -> list[tuple[int, int, float, float]]:
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


def _caption(counts: Mapping[TrainedRun, np.ndarray], cases: Sequence[Case], options: FigureOptions) -> str:
    names = {0: "background", **{label: name for name, label in options.labels.items()}}
    tables = []
    for run, c in counts.items():
        left, right = np.flatnonzero(c.sum(0)), np.flatnonzero(c.sum(1))
        rows = [["By the truth", *(f"to {names[a]}" for a in left), "all", "misassigned (%)"]]
        for t in right:
            wrong = 100 * (1 - c[t, t] / c[t].sum())
            rows.append([names[t], *(str(c[t, a]) for a in left), str(c[t].sum()), f"{wrong:.2f}"])
        wrong = 100 * (1 - np.trace(c) / max(c.sum(), 1))
        rows.append(["all", *(str(c[:, a].sum()) for a in left), str(c.sum()), f"{wrong:.2f}"])
        tables.append("\n".join([f"{run.name}, `{run.checkpoint_file}`:", "", *table(rows)]))
    return caption("assignment", rule=RULE, tables="\n\n".join(tables), cases=cases_in_words(cases))
