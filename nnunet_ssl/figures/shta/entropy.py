"""Figure 2: where a baseline and SHTA are sure, and where they are not, in the windows in which they differ most.

As Fig. 5 of the SHTA paper, a row a class. Case, slice and window are chosen by a rule that favours neither run.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from scipy.ndimage import uniform_filter
from scipy.special import entr
from tqdm import tqdm

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.summary import table
from nnunet_ssl.figures.cases import in_grey, upright
from nnunet_ssl.figures.outlines import TRUTH, draw_outline, overlay, shadow
from nnunet_ssl.figures.page import column_width, legend_columns, new_figure, paper_style, save_figure, wrapped
from nnunet_ssl.figures.runs import (
    Case,
    FigureOptions,
    NotApplicable,
    TrainedRun,
    cases_in_words,
    predict,
    prediction_folder,
    with_predictions,
)
from nnunet_ssl.figures.shta.branch import baseline_and_shta
from nnunet_ssl.figures.slices import read_prediction, read_truth, slice_axis
from nnunet_ssl.files import replacing

MAX_ROWS = 4
WINDOW = 0.25  # side of the window, of the slice's longer side
MIN_WINDOW = 24  # voxels
OUTLINE = 0.8  # points
RULE = (
    f"A row a class: of the chosen ones the {MAX_ROWS} on which the two runs disagree most, in voxels that only one of "
    "them gives to the class, for each voxel of the class in the truth of all cases. Case: the one with most such "
    "voxels. In it slice and window: where the sum of the absolute difference of the two entropies is largest, over "
    "voxels that the truth or either run gives to the class. Slices lie across the axis with the largest spacing; the "
    f"window's side is {WINDOW:.0%} of the slice's longer side and at least {MIN_WINDOW} voxels. Neither run is "
    "favoured: differences count whoever is right."
)


@dataclass(frozen=True)
class Zoom:
    """A window of one slice of one case.

    Attributes:
        case: where it is from.
        axis, index: of the slice.
        start, side: first row and column, and their number, in the slice as it lies in the array.
    """

    case: Case
    axis: int
    index: int
    start: tuple[int, int]
    side: tuple[int, int]


@dataclass(frozen=True)
class Row:
    """What a row of the figure shows: a slice, and a window of it; rows downwards, columns to the right.

    Attributes:
        label: the class.
        zoom: where.
        image: float ``[rows, columns]`` or ``[rows, columns, 3]``, the whole slice.
        truth, predictions, entropies: ``[rows, columns]``, of the whole slice; the last two of each run.
        corner: first row and column of the window.
        side: rows and columns of the window.
        size: mm (or what the spacing is in) of a row and of a column.
    """

    label: int
    zoom: Zoom
    image: np.ndarray
    truth: np.ndarray
    predictions: tuple[np.ndarray, np.ndarray]
    entropies: tuple[np.ndarray, np.ndarray]
    corner: tuple[int, int]
    side: tuple[int, int]
    size: tuple[float, float]


def draw_entropy(runs: Sequence[TrainedRun], cases: Sequence[Case], out: Path, options: FigureOptions) -> None:
    """Write ``entropy``.

    Raises:
        NotApplicable: fewer than two runs, labels in regions, or the two runs predict the same everywhere.
        UserError: a file cannot be read.
    """
    if len(runs) < 2:
        raise NotApplicable("entropy compares two runs. Add a second one with -tr.")
    if any(isinstance(label, tuple) for label in options.labels.values()):
        raise NotApplicable("entropy needs classes that exclude each other, and these labels are regions.")
    first, second = baseline_and_shta(runs)
    pair = (first, second) if first is not None and second is not None else tuple(runs[:2])
    chosen = choose_cases(pair, cases, out, options)
    if not chosen:
        raise NotApplicable(f"{pair[0].name} and {pair[1].name} predict the same classes everywhere.")
    wanted = list(dict.fromkeys(chosen.values()))
    for run in pair:
        predict_entropy(run, wanted, out, options)
    rows = [read_row(label, case, pair, out, options) for label, case in chosen.items()]
    with paper_style():
        figure = entropy_figure(rows, [run.name for run in pair], options)
        save_figure(figure, out, "entropy", _caption(rows, pair, cases, out, options))


# ---------------------------------------------------------------------------------------------------------- choice


def choose_cases(
    pair: Sequence[TrainedRun], cases: Sequence[Case], out: Path, options: FigureOptions
) -> dict[int, Case]:
    """The classes on which two runs disagree most, each with the case in which they do; by ``RULE``.

    Returns:
        label -> case, in the dataset's order; only classes on which they disagree at all.
    """
    folders = [run.predicted for run in with_predictions(pair, cases, out, options)]
    reader = pair[0].reader
    labels = list(options.names)
    differing = np.zeros((len(cases), len(labels)), int)
    size = np.zeros(len(labels), int)
    ordered = sorted(cases, key=lambda case: case.name)
    for i, case in enumerate(tqdm(ordered, "Comparing predictions")):
        truth, properties = read_truth(case, reader)
        files = [folder / f"{case.name}{options.file_ending}" for folder in folders]
        one, other = (read_prediction(file, reader, truth, properties) for file in files)
        counted = _counted(truth, options)
        for j, label in enumerate(labels):
            differing[i, j] = ((one == label) != (other == label))[counted].sum()
            size[j] += (truth == label).sum()
    share = differing.sum(0) / np.maximum(size, 1)
    most = [int(j) for j in np.argsort(-share, kind="stable")[:MAX_ROWS] if share[j] > 0]
    return {labels[j]: ordered[int(differing[:, j].argmax())] for j in sorted(most)}


def _counted(truth: np.ndarray, options: FigureOptions) -> np.ndarray:
    """Voxels that are not marked to be ignored."""
    return np.ones(truth.shape, bool) if options.ignore_label is None else truth != options.ignore_label


def normalized_entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy of the classes' probabilities ``[K, *spatial]``, from 0 (sure) to 1 (all classes alike)."""
    entropy = np.zeros(probabilities.shape[1:], np.float32)
    for channel in probabilities:  # one at a time: all together take as much memory again
        entropy += entr(channel.astype(np.float32))
    return entropy / np.log(len(probabilities))


def predict_entropy(run: TrainedRun, cases: Sequence[Case], out: Path, options: FigureOptions) -> None:
    """Predict cases with probabilities, and keep of these no more than their entropy, in ``CASE.npz``.

    nnU-Net keeps 4 bytes a voxel for each class, the entropy is 2 bytes a voxel. The file takes the probabilities'
    place, so it is predicted again when they would be.

    Raises:
        UserError: a case cannot be predicted, or its file cannot be read.
    """
    folder = prediction_folder(run, out)
    predict(run, cases, folder, True, options.device, options.tta, options.num_processes)
    for case in cases:
        file = folder / f"{case.name}.npz"
        stored = read_arrays(file)
        if "probabilities" in stored:
            entropy = normalized_entropy(stored["probabilities"]).astype(np.float16)
            with replacing(str(file)) as temporary, open(temporary, "wb") as stream:
                np.savez_compressed(stream, entropy=entropy)
            (folder / f"{case.name}.pkl").unlink(missing_ok=True)


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """All that a ``.npz`` holds.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with np.load(file) as stored:
            return dict(stored)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file} cannot be read ({error}). Remove it, and it is predicted again.") from error


def window_side(shape: Sequence[int], spacing: Sequence[float]) -> tuple[int, int]:
    """Rows and columns of a window that is square in mm, by ``WINDOW`` and ``MIN_WINDOW``, and fits the slice."""
    side = max(WINDOW * max(n * s for n, s in zip(shape, spacing, strict=True)), MIN_WINDOW * min(spacing))
    rows, columns = (min(n, max(1, round(side / s))) for n, s in zip(shape, spacing, strict=True))
    return rows, columns


def best_window(values: np.ndarray, side: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """The window with the largest sum.

    Args:
        values: ``[slices, rows, columns]``, nowhere negative.
        side: rows and columns of the window, at most those of a slice.

    Returns:
        The slice, and the window's first row and column. Of equal sums the first.
    """
    # a window beyond the edge holds zeros there; moved inside, it holds the same and more
    sums = uniform_filter(values.astype(np.float64), (1, *side), mode="constant")
    index, *center = (int(i) for i in np.unravel_index(sums.argmax(), sums.shape))
    row, column = (min(max(c - n // 2, 0), size - n) for c, n, size in zip(center, side, values.shape[1:], strict=True))
    return index, (row, column)


# --------------------------------------------------------------------------------------------------------- reading


def read_row(label: int, case: Case, pair: Sequence[TrainedRun], out: Path, options: FigureOptions) -> Row:
    """Find slice and window in a case, and read what they hold, turned as radiologists look at it."""
    reader = pair[0].reader
    truth, properties = read_truth(case, reader)
    maps, entropies = [], []
    for run in pair:
        folder = prediction_folder(run, out)
        entropies.append(read_arrays(folder / f"{case.name}.npz")["entropy"].astype(np.float32))
        maps.append(read_prediction(folder / f"{case.name}{options.file_ending}", reader, truth, properties))
    for run, array in zip(pair, entropies, strict=True):
        if array.shape != truth.shape:
            raise UserError(f"{case.label} has the shape {truth.shape}, {run.name}'s prediction {array.shape}.")

    axis = slice_axis(properties["spacing"], truth.shape)
    size = tuple(float(s) for a, s in enumerate(properties["spacing"]) if a != axis)
    concerned = ((truth == label) | (maps[0] == label) | (maps[1] == label)) & _counted(truth, options)
    difference = np.moveaxis(np.abs(entropies[0] - entropies[1]) * concerned, axis, 0)
    side = window_side(difference.shape[1:], size)
    index, start = best_window(difference, side)

    turns = upright(properties, axis)
    shape = difference.shape[1:]
    corner = tuple(
        first if turn.step is None else n - first - length
        for first, length, n, turn in zip(start, side, shape, turns, strict=True)
    )

    def plane(array: np.ndarray) -> np.ndarray:
        return np.take(array, index, axis)[turns]

    image = reader.read_images([str(file) for file in case.images])[0]
    return Row(
        label,
        Zoom(case, axis, index, start, side),
        in_grey(np.stack([plane(channel) for channel in image]), pair[0], options),
        plane(truth),
        (plane(maps[0]), plane(maps[1])),
        (plane(entropies[0]), plane(entropies[1])),
        corner,
        side,
        size,
    )


# --------------------------------------------------------------------------------------------------------- drawing


def entropy_figure(rows: Sequence[Row], names: Sequence[str], options: FigureOptions) -> Figure:
    """Rows: classes. Columns: slice, truth, both predictions and both entropies in the window."""
    width = column_width(2)
    panel = (width - 0.7) / 6
    names = [wrapped(name, 0.9 * panel) for name in names]
    titles = ["Slice", "Truth", *names, *(f"{name},\nentropy" for name in names)]
    colors = {label: (color, 0.6) for label, color in options.colors.items()}
    shown = np.concatenate([_window(array, row).ravel() for row in rows for array in (row.truth, *row.predictions)])
    handles = [
        Patch(color=color, linewidth=0, label=options.names[label]) for label, color in colors.items() if label in shown
    ]
    handles.append(Line2D([], [], color=TRUTH, label="truth, the row's class", path_effects=shadow(OUTLINE)))
    in_legend = legend_columns([handle.get_label() for handle in handles], width)
    text = 0.13 * (1 + max(title.count("\n") for title in titles)) + 0.12 * -(-len(handles) // in_legend)
    figure = new_figure(width, (panel + 0.02) * len(rows) + text + 0.2)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    cells = figure.add_gridspec(len(rows), len(titles) + 1, width_ratios=[*[1] * len(titles), 0.06])
    # at the top of their cells, or the layout reckons with titles that are lower than they end up
    grid = [[figure.add_subplot(cells[i, j], anchor="N") for j in range(len(titles))] for i in range(len(rows))]
    highest = max(_window(entropy, row).max() for row in rows for entropy in row.entropies)
    for axes, row in zip(grid, rows, strict=True):
        _slice_panel(axes[0], row)
        axes[0].set_ylabel(wrapped(options.names[row.label].replace("_", " "), panel))
        extent = _extent(row)
        for each, label_map in zip(axes[1:4], (row.truth, *row.predictions), strict=True):
            each.imshow(_window(row.image, row), cmap="gray", vmin=0, vmax=1, extent=extent)
            each.imshow(overlay(_window(label_map, row), colors), extent=extent)
        for each, entropy in zip(axes[4:], row.entropies, strict=True):
            drawn = each.imshow(_window(entropy, row), cmap="magma", vmin=0, vmax=highest, extent=extent)
        for each in axes[1:]:
            draw_outline(each, row.truth == row.label, row.size, OUTLINE)
            each.set(xticks=[], yticks=[])
            each.spines[:].set_visible(False)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title)
    figure.colorbar(drawn, cax=figure.add_subplot(cells[:, -1]), label="entropy / log K")
    figure.legend(handles=handles, loc="outside lower center", ncols=in_legend)
    return figure


def _window(array: np.ndarray, row: Row) -> np.ndarray:
    (r, c), (rows, columns) = row.corner, row.side
    return array[r : r + rows, c : c + columns]


def _extent(row: Row) -> tuple[float, float, float, float]:
    """Of the window within the slice: left, right, bottom, top, in the unit of ``row.size``."""
    top, left = np.multiply(row.corner, row.size)
    bottom, right = np.add(row.corner, row.side) * row.size
    return left, right, bottom, top


def _slice_panel(axes: Axes, row: Row) -> None:
    """The whole slice in the middle of a square, so that all panels are of one size."""
    height, width = np.multiply(row.image.shape[:2], row.size)
    axes.imshow(row.image, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    left, right, bottom, top = _extent(row)
    frame = {"fill": False, "edgecolor": TRUTH, "linewidth": 1.0, "path_effects": shadow(1.0), "clip_on": False}
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, **frame))
    half = max(height, width) / 2
    axes.set(xlim=(width / 2 - half, width / 2 + half), ylim=(height / 2 + half, height / 2 - half))
    axes.set(xticks=[], yticks=[], facecolor="black")
    axes.spines[:].set_visible(False)


def _caption(
    rows: Sequence[Row], pair: Sequence[TrainedRun], cases: Sequence[Case], out: Path, options: FigureOptions
) -> str:
    cells = [["Class", "Case", "Slice (axis)", "Window, first row and column", "rows x columns",
              *(f"mean entropy, {run.name}" for run in pair)]]  # fmt: skip
    for row in rows:
        zoom = row.zoom
        means = [f"{_window(entropy, row).mean():.4f}" for entropy in row.entropies]
        cells.append([options.names[row.label], zoom.case.name, f"{zoom.index} ({zoom.axis})",
                      "{}, {}".format(*zoom.start), "{} x {}".format(*zoom.side), *means])  # fmt: skip
    return "\n".join(
        [
            f"**Entropy of {pair[0].name} and {pair[1].name} where they differ most.** From the left: the slice with "
            "the window, then in the window truth, both predictions and the entropy of their probabilities over the "
            "classes, divided by log K (0 sure, 1 all classes alike; one scale for all). Outline: the truth's class of "
            "the row.",
            "",
            RULE,
            "",
            *table(cells),
            "",
            f"Chosen from {cases_in_words(cases)}. Probabilities by nnU-Net's predictor, "
            f"{'with' if options.tta else 'without'} mirroring; their entropy is kept in `CASE.npz`. Indices count "
            "from 0 in the arrays that nnU-Net reads:",
            "",
            *(f"- {run.name}: `{prediction_folder(run, out)}`, `{run.checkpoint_file}`" for run in pair),
        ]
    )
