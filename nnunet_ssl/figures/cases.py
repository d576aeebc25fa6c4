"""Figure 1: the image, the truth's contour and each run's prediction, in the worst, median and best slice of a class.

A picture a class, as Fig. 4 of the SHTA paper, with slices that a rule has chosen (``slices.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.metrics import Label
from nnunet_ssl.evaluation.summary import table
from nnunet_ssl.figures.outlines import TRUTH, draw_outline, overlay, shadow
from nnunet_ssl.figures.page import column_width, legend_columns, new_figure, paper_style, save_figure, wrapped
from nnunet_ssl.figures.runs import (
    Case,
    FigureOptions,
    TrainedRun,
    cases_in_words,
    class_mask,
    models_in_words,
    with_predictions,
)
from nnunet_ssl.figures.slices import (
    RULE,
    Slice,
    choose_slices,
    measure_all_slices,
    read_image,
    read_prediction,
    read_truth,
    slice_axis,
)
from nnunet_ssl.unlabeled.find import channel_names

MAX_PANEL = 1.9  # inches
ZOOM = 2.0  # side of the window, in sizes of the class
MIN_WINDOW = 0.3  # of the image's longer side


@dataclass(frozen=True)
class Plane:
    """A slice as it is drawn: rows downwards, columns to the right.

    Attributes:
        image: float ``[rows, columns]`` or ``[rows, columns, 3]``, from 0 to 1.
        truth: int ``[rows, columns]``.
        predictions: the same of each run.
        size: mm (or what the spacing is in) of a row and of a column.
    """

    image: np.ndarray
    truth: np.ndarray
    predictions: tuple[np.ndarray, ...]
    size: tuple[float, float]


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


# --------------------------------------------------------------------------------------------------------- reading


def read_planes(
    slices: Sequence[Slice], runs: Sequence[TrainedRun], options: FigureOptions
) -> dict[tuple[str, int], Plane]:
    """Slices by case and index; each file is read once.

    Args:
        slices: of any classes.
        runs: predicted.
        options: file ending and channels.

    Raises:
        UserError: an image cannot be read, or is not of the truth's shape.
    """
    cases = {s.case.name: s.case for s in slices}
    return {
        (name, index): plane
        for name, case in cases.items()
        for index, plane in _read_case(case, {s.index for s in slices if s.case == case}, runs, options).items()
    }


def _read_case(
    case: Case, indices: Iterable[int], runs: Sequence[TrainedRun], options: FigureOptions
) -> dict[int, Plane]:
    """Slices of a case, turned as radiologists look at them."""
    reader = runs[0].reader
    truth, properties = read_truth(case, reader)
    image = read_image(case, reader, truth.shape)
    files = [run.predicted / f"{case.name}{options.file_ending}" for run in runs]
    maps = [read_prediction(file, reader, truth, properties) for file in files]
    axis = slice_axis(properties["spacing"], truth.shape)
    flips = upright(properties, axis)
    size = tuple(float(s) for a, s in enumerate(properties["spacing"]) if a != axis)

    def plane(array: np.ndarray, index: int) -> np.ndarray:
        return np.take(array, index, axis)[flips]

    return {
        index: Plane(
            in_grey(np.stack([plane(channel, index) for channel in image]), runs[0], options),
            plane(truth, index),
            tuple(plane(label_map, index) for label_map in maps),
            size,
        )
        for index in indices
    }


def upright(properties: dict, axis: int) -> tuple[slice, slice]:
    """How rows and columns of a slice are turned: front or head up, the patient's left on the right.

    Args:
        properties: nnU-Net's, of SimpleITK's or nibabel's readers; images of others are shown as they are.
        axis: across which the slice lies, in arrays.

    Returns:
        For rows and columns a slice that turns them round, or leaves them.
    """
    if "nibabel_stuff" in properties:
        geometry = properties["nibabel_stuff"]
        affine = geometry.get("reoriented_affine", geometry["original_affine"])
        toward = affine[:3, :3] * [[-1], [-1], [1]]  # from right, front, head to left, back, head
    else:
        direction = properties.get("sitk_stuff", {}).get("direction", ())
        if len(direction) != 9:
            return slice(None), slice(None)
        toward = np.reshape(direction, (3, 3))  # to the left, back and head already
    toward = toward[:, ::-1]  # of the axes x, y, z; arrays have them the other way round
    turns = []
    for array_axis in (a for a in range(3) if a != axis):
        along = toward[:, array_axis]
        space = int(np.abs(along).argmax())
        wanted = -1 if space == 2 else 1  # rows go from head to foot, from front to back; columns to the left
        turns.append(slice(None) if along[space] * wanted > 0 else slice(None, None, -1))
    return turns[0], turns[1]


def in_grey(channels: np.ndarray, run: TrainedRun, options: FigureOptions) -> np.ndarray:
    """Scale the first channel of a slice to 0 to 1, or show the three of a colour image.

    CT is shown in the window that nnU-Net's plans clip it to, all else from the slice's 0.5th to 99.5th percentile.

    Args:
        channels: ``[C, rows, columns]``.
        run: whose plans know the window.
        options: whose ``dataset.json`` names the channels.
    """
    names = [str(name).lower() for name in channel_names(options.dataset_json).values()]
    if len(channels) == 3 and (names == ["r", "g", "b"] or names == ["red", "green", "blue"] or len(names) == 1):
        return np.clip(np.moveaxis(channels, 0, -1) / (255 if channels.max() > 1 else 1), 0, 1)
    image = channels[0].astype(float)
    low, high = np.percentile(image, (0.5, 99.5))
    if names[0] == "ct":
        properties = run.plans.foreground_intensity_properties_per_channel["0"]
        low, high = properties["percentile_00_5"], properties["percentile_99_5"]
    return np.clip((image - low) / max(high - low, 1e-8), 0, 1)


# --------------------------------------------------------------------------------------------------------- drawing


def cases_figure(
    slices: Sequence[Slice], planes: Sequence[Plane], names: Sequence[str], label: Label, options: FigureOptions
) -> Figure:
    """Rows: slices. Columns: image with the truth's contour, then each run's prediction with it.

    Args:
        slices, planes: what to show.
        names: of the runs.
        label: the class that the slices were chosen for; drawn in full colour, the others pale.
        options: classes and names.
    """
    num_columns = 1 + len(names)
    width = min(column_width(1 if num_columns <= 2 else 2), 0.25 + MAX_PANEL * num_columns)
    panel = (width - 0.25) / num_columns
    titles = [wrapped(title, panel) for title in ("Image, truth", *names)]
    line = min(1.0, 0.7 * panel)  # points; small panels take thin lines and small numbers
    colors = options.colors
    windows = [window_around(class_mask(plane.truth, label), plane.size) for plane in planes]
    seen = {cls for plane, window in zip(planes, windows, strict=True) for cls in _classes_in(plane, window, colors)}
    handles = [Line2D([], [], color=TRUTH, lw=1, path_effects=shadow(1), label=f"truth, {options.names[label]}")]
    handles += [
        Patch(color=colors[cls], alpha=_opacity(cls, label), linewidth=0, label=options.names[cls])
        for cls in colors
        if cls == label or cls in seen
    ]
    in_legend = legend_columns([handle.get_label() for handle in handles], width)
    lines_of_text = max(title.count("\n") for title in titles) + -(-len(handles) // in_legend)
    figure = new_figure(width, 0.35 + 0.14 * lines_of_text + panel * len(slices))
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    grid = figure.subplots(len(slices), num_columns, squeeze=False)
    for row, chosen, plane, window in zip(grid, slices, planes, windows, strict=True):
        row[0].set_ylabel(chosen.rank)
        for axes, prediction, dice in zip(row, (None, *plane.predictions), (None, *chosen.dice), strict=True):
            _panel(axes, plane, prediction, label, colors, window, line)
            if prediction is not None:
                axes.text(
                    0.04, 0.04, f"{100 * dice:.1f}", transform=axes.transAxes, color=TRUTH, path_effects=shadow(line),
                    fontsize=min(8, 8 * line),
                )  # fmt: skip
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title)
    figure.legend(handles=handles, loc="outside lower center", ncols=in_legend)
    return figure


def _classes_in(plane: Plane, window: tuple[float, float, float, float], classes: Iterable[Label]) -> set[Label]:
    """The classes that any prediction has within a window."""
    left, right, bottom, top = window
    height, width = plane.size
    rows = slice(max(0, math.floor(top / height)), math.ceil(bottom / height))
    columns = slice(max(0, math.floor(left / width)), math.ceil(right / width))
    return {cls for cls in classes if any(class_mask(p[rows, columns], cls).any() for p in plane.predictions)}


def window_around(mask: np.ndarray, size: tuple[float, float]) -> tuple[float, float, float, float]:
    """A square around a class: left, right, bottom, top, in the unit of ``size``.

    Its side is twice the class's extent, at least 30 % and at most all of the image's longer side; it is moved into
    the image where it would leave it on one side.

    Args:
        mask: ``[rows, columns]``, not empty.
        size: of a row and of a column.
    """
    image = np.array(mask.shape) * size
    where = np.argwhere(mask)
    first, last = where.min(0) * size, (where.max(0) + 1) * size
    side = min(max(ZOOM * (last - first).max(), MIN_WINDOW * image.max()), image.max())
    start = (first + last - side) / 2
    # an image narrower than the window lies in its middle
    start = np.where(image >= side, np.clip(start, 0, np.maximum(image - side, 0)), (image - side) / 2)
    return start[1], start[1] + side, start[0] + side, start[0]


def _panel(
    axes: Axes,
    plane: Plane,
    prediction: np.ndarray | None,
    label: Label,
    colors: dict[Label, str],
    window: tuple[float, float, float, float],
    line: float,
) -> None:
    rows, columns = plane.truth.shape
    extent = (0, columns * plane.size[1], rows * plane.size[0], 0)
    axes.imshow(plane.image, cmap="gray", vmin=0, vmax=1, extent=extent)
    if prediction is not None:
        on_top = sorted(colors, key=lambda cls: cls == label)
        axes.imshow(overlay(prediction, {cls: (colors[cls], _opacity(cls, label)) for cls in on_top}), extent=extent)
    axes.set(xlim=window[:2], ylim=window[2:], xticks=[], yticks=[], facecolor="black", aspect="equal")
    axes.spines[:].set_visible(False)
    draw_outline(axes, class_mask(plane.truth, label), plane.size, line)


def _opacity(cls: Label, label: Label) -> float:
    return 0.65 if cls == label else 0.3


def _caption(slices: Sequence[Slice], runs: Sequence[TrainedRun], cases: Sequence[Case], name: str) -> str:
    rows = [["Slice", "Case", "Index", *(f"{run.name}, Dice (%)" for run in runs)]]
    rows += [[s.rank, s.case.name, str(s.index), *(f"{100 * d:.1f}" for d in s.dice)] for s in slices]
    return "\n".join(
        [
            f"**Worst, median and best slice of {name}.** Outline: the truth's {name}. Colours: predictions, {name} in "
            "full colour and other chosen classes pale. Numbers: Dice (%) of the class in the slice. The window is a "
            f"square of {ZOOM:g} times the class's extent, at least {MIN_WINDOW:.0%} of the image. Grey values: CT in "
            "the window of nnU-Net's plans, other images from their 0.5th to 99.5th percentile; of several channels "
            "the first.",
            "",
            RULE,
            "",
            *table(rows),
            "",
            f"Chosen from {cases_in_words(cases)}. Predictions and models:",
            "",
            *models_in_words(runs),
        ]
    )
