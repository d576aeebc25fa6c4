"""Figure 1: the image, the truth's contour and each run's prediction, in the worst, median and best slice of a class.

A picture a class, as Fig. 4 of the SHTA paper, with slices that a rule has chosen (``slices.py``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.metrics import Label
from nnunet_ssl.evaluation.summary import table
from nnunet_ssl.figures.options import FigureOptions
from nnunet_ssl.figures.outlines import TRUTH, draw_outline, overlay, shadow
from nnunet_ssl.figures.page import caption, column_width, panel_grid, paper_style, save_figure
from nnunet_ssl.figures.planes import OpenCase, Plane, Window
from nnunet_ssl.figures.predictions import models_in_words, with_predictions
from nnunet_ssl.figures.runs import TrainedRun
from nnunet_ssl.figures.slices import MIN_SHARE, Slice, choose_slices, measure_all_slices
from nnunet_ssl.figures.test_set import Case, cases_in_words

MAX_PANEL = 1.9  # inches
ZOOM = 2.0  # side of the window, in sizes of the class
MIN_WINDOW = 0.3  # of the image's longer side


def draw_cases(runs: Sequence[TrainedRun], cases: Sequence[Case], out: Path, options: FigureOptions) -> None:
    """Write ``cases_<label>_<class>`` for each chosen class.

    Raises:
        UserError: a file cannot be read, or no case has any of the classes.
    """
    runs = with_predictions(runs, cases, out, options)
    measured = measure_all_slices(runs, cases, options)
    chosen = {label: choose_slices(measured, i) for i, label in enumerate(options.names)}
    if not any(chosen.values()):
        raise UserError(
            f"none of {cases_in_words(cases)} has any of the classes {', '.join(options.names.values())}. Choose "
            "others with --classes."
        )
    planes = read_planes([s for slices in chosen.values() for s in slices], runs, options)
    for label, slices in chosen.items():
        name = options.names[label]
        if not slices:
            print(f"No case has {name}: there is no picture of it.", flush=True)
            continue
        shown = [planes[s.case.name, s.index] for s in slices]
        with paper_style():
            figure = cases_figure(slices, shown, [run.name for run in runs], label, options)
            save_figure(figure, out, file_name(label, name), _caption(slices, runs, cases, name))


def file_name(label: Label, name: str) -> str:
    """``cases_1_anterior``: by label, so that files sort as the classes do and no two have one name."""
    number = "-".join(map(str, label)) if isinstance(label, tuple) else str(label)
    return f"cases_{number}_{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}"


def read_planes(
    slices: Sequence[Slice], runs: Sequence[TrainedRun], options: FigureOptions
) -> dict[tuple[str, int], Plane]:
    """Slices by case and index; each file is read once.

    Raises:
        UserError: an image cannot be read, or is not of the truth's shape.
    """
    planes = {}
    for case in {s.case.name: s.case for s in slices}.values():
        opened = OpenCase(case, runs, options)
        planes |= {(case.name, s.index): opened.plane(s.index) for s in slices if s.case == case}
    return planes


def cases_figure(
    slices: Sequence[Slice], planes: Sequence[Plane], names: Sequence[str], label: Label, options: FigureOptions
) -> Figure:
    """Rows: slices, chosen for a class. Columns: image with the truth's contour, then each run's prediction with it.

    The class is drawn in full color, the others pale.
    """
    num_columns = 1 + len(names)
    width = min(column_width(1 if num_columns <= 2 else 2), 0.25 + MAX_PANEL * num_columns)
    panel = (width - 0.25) / num_columns
    line = min(1.0, 0.7 * panel)  # points; small panels take thin lines and small numbers
    colors = options.colors
    opacity = {cls: 0.65 if cls == label else 0.3 for cls in colors}
    on_top = {cls: (colors[cls], opacity[cls]) for cls in sorted(colors, key=lambda cls: cls == label)}
    windows = [window_around(np.isin(plane.truth, label), plane.size) for plane in planes]
    shown = [p[plane.inside(w)].ravel() for plane, w in zip(planes, windows, strict=True) for p in plane.predictions]
    seen = np.unique(np.concatenate(shown))
    handles = [Line2D([], [], color=TRUTH, lw=1, path_effects=shadow(1), label=f"truth, {options.names[label]}")]
    handles += [
        Patch(color=colors[cls], alpha=opacity[cls], linewidth=0, label=options.names[cls])
        for cls in colors
        if cls == label or np.isin(seen, cls).any()
    ]
    figure, grid = panel_grid(len(slices), ("Image, truth", *names), width, panel, handles)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    for row, chosen, plane, window in zip(grid, slices, planes, windows, strict=True):
        row[0].set_ylabel(chosen.rank)
        for axes in row:
            plane.draw(axes, plane.image, window, cmap="gray", vmin=0, vmax=1)
            draw_outline(axes, np.isin(plane.truth, label), plane.size, line)
        for axes, prediction, dice in zip(row[1:], plane.predictions, chosen.dice, strict=True):
            plane.draw(axes, overlay(prediction, on_top), window)
            axes.text(
                0.04, 0.04, f"{100 * dice:.1f}", transform=axes.transAxes, color=TRUTH, path_effects=shadow(line),
                fontsize=min(8, 8 * line),
            )  # fmt: skip
    return figure


def window_around(mask: np.ndarray, size: tuple[float, float]) -> Window:
    """A square around a class, a mask ``[rows, columns]`` that is not empty, in the unit of ``size``.

    That is the size of a row and of a column. The side is twice the class's extent, at least 30 % and at most all of
    the image's longer side; the square is moved into the image where it would leave it on one side.
    """
    image = np.array(mask.shape) * size
    where = np.argwhere(mask)
    first, last = where.min(0) * size, (where.max(0) + 1) * size
    side = min(max(ZOOM * (last - first).max(), MIN_WINDOW * image.max()), image.max())
    start = (first + last - side) / 2
    # an image narrower than the window lies in its middle
    start = np.where(image >= side, np.clip(start, 0, np.maximum(image - side, 0)), (image - side) / 2)
    return start[1], start[1] + side, start[0] + side, start[0]


def _caption(slices: Sequence[Slice], runs: Sequence[TrainedRun], cases: Sequence[Case], name: str) -> str:
    rows = [["Slice", "Case", "Index", *(f"{run.name}, Dice (%)" for run in runs)]]
    rows += [[s.rank, s.case.name, str(s.index), *(f"{100 * d:.1f}" for d in s.dice)] for s in slices]
    return caption(
        "cases",
        name=name,
        zoom=ZOOM,
        min_window=MIN_WINDOW,
        min_share=MIN_SHARE,
        table="\n".join(table(rows)),
        cases=cases_in_words(cases),
        models=models_in_words(runs),
    )
