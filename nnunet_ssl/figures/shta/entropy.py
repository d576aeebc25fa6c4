"""Figure 2: where a baseline and SHTA are sure, and where they are not, in the windows in which they differ most.

As Fig. 5 of the SHTA paper, a row a class. Case, slice and window are chosen by the rule in
``captions/entropy.md``, which favors neither run.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from scipy.ndimage import uniform_filter
from scipy.special import entr
from tqdm import tqdm

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.summary import table
from nnunet_ssl.figures.options import FigureOptions, NotApplicable
from nnunet_ssl.figures.outlines import TRUTH, draw_outline, overlay, shadow
from nnunet_ssl.figures.page import caption, column_width, panel_grid, paper_style, save_figure, wrapped
from nnunet_ssl.figures.planes import OpenCase, Plane
from nnunet_ssl.figures.predictions import (
    current_folder,
    models_in_words,
    predicting,
    prediction_folder,
    with_predictions,
)
from nnunet_ssl.figures.runs import TrainedRun, load_predictor
from nnunet_ssl.figures.shta.branch import baseline_and_shta
from nnunet_ssl.figures.test_set import Case, cases_in_words
from nnunet_ssl.files import replacing
from nnunet_ssl.volumes import read_volume

MAX_ROWS = 4
WINDOW = 0.25  # side of the window, of the slice's longer side
MIN_WINDOW = 24  # voxels
OUTLINE = 0.8  # points


@dataclass(frozen=True)
class Row:
    """What a row of the figure shows: a slice, and a window of it."""

    label: int
    plane: Plane
    entropies: list[np.ndarray]  # [rows, columns] of the whole slice, of each run
    window: tuple[slice, slice]  # its rows and columns
    place: list[str]  # case, slice and window in words, as they lie in the file


def draw_entropy(runs: Sequence[TrainedRun], cases: Sequence[Case], out: Path, options: FigureOptions) -> None:
    """Write ``entropy``.

    Raises:
        NotApplicable: fewer than two runs, labels in regions, or the two runs predict the same everywhere.
        UserError: a file cannot be read, or a case cannot be predicted.
    """
    if len(runs) < 2:
        raise NotApplicable("entropy compares two runs. Add a second one with -tr.")
    if any(isinstance(label, tuple) for label in options.labels.values()):
        raise NotApplicable("entropy needs classes that exclude each other, and these labels are regions.")
    pair = baseline_and_shta(runs)
    pair = with_predictions(runs[:2] if None in pair else pair, cases, out, options)
    chosen = choose_cases(pair, cases, options)
    if not chosen:
        raise NotApplicable(f"{pair[0].name} and {pair[1].name} predict the same classes everywhere.")
    wanted = list(dict.fromkeys(chosen.values()))
    for run in pair:
        predict_entropy(run, wanted, out, options)
    rows = [read_row(label, case, pair, out, options) for label, case in chosen.items()]
    with paper_style():
        figure = entropy_figure(rows, [run.name for run in pair], options)
        save_figure(figure, out, "entropy", _caption(rows, pair, cases, out, options))


def choose_cases(pair: Sequence[TrainedRun], cases: Sequence[Case], options: FigureOptions) -> dict[int, Case]:
    """The classes on which two predicted runs disagree most, each with the case in which they do.

    Returns:
        label -> case, in the dataset's order; only classes that the truth has and on which they disagree at all.
    """
    labels = list(options.names)
    cases = sorted(cases, key=lambda case: case.name)
    differing, size = np.zeros((2, len(cases), len(labels)), int)
    for i, case in enumerate(tqdm(cases, "Comparing predictions")):
        opened = OpenCase(case, pair, options)
        one, other = opened.predictions
        for j, label in enumerate(labels):
            differing[i, j] = (((one == label) != (other == label)) & opened.counted).sum()
            size[i, j] = (opened.truth == label).sum()
    share = np.where(size.any(0), differing.sum(0) / np.maximum(size.sum(0), 1), 0)
    most = [j for j in np.argsort(-share, kind="stable")[:MAX_ROWS].tolist() if share[j] > 0]
    return {labels[j]: cases[differing[:, j].argmax()] for j in sorted(most)}


def normalized_entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy of the classes' probabilities ``[K, *spatial]``, from 0 (sure) to 1 (all classes alike)."""
    # one class at a time: all together take as much memory again
    return sum(entr(channel) for channel in probabilities) / math.log(len(probabilities))


def predict_entropy(run: TrainedRun, cases: Sequence[Case], out: Path, options: FigureOptions) -> None:
    """Predict cases whose entropy is not there yet; it is kept in ``CASE.npz``, 2 bytes a voxel.

    Raises:
        UserError: a case cannot be predicted.
    """
    folder = current_folder(run, cases, out, options)
    missing = [case for case in cases if not (folder / f"{case.name}.npz").is_file()]
    predictor = load_predictor(run, options.device, options.tta) if missing else None
    for case in missing:
        with predicting(run, [case]):
            image, properties = read_volume(run.reader.read_images, list(map(str, case.images)))
            _, probabilities = predictor.predict_single_npy_array(image, properties, None, None, True)
        with replacing(folder / f"{case.name}.npz") as temporary, open(temporary, "wb") as stream:
            np.savez_compressed(stream, entropy=normalized_entropy(probabilities).astype(np.float16))


def window_side(shape: Sequence[int], spacing: Sequence[float]) -> tuple[int, int]:
    """Rows and columns of a window that is square in mm, by ``WINDOW`` and ``MIN_WINDOW``, and fits the slice."""
    side = max(WINDOW * max(n * s for n, s in zip(shape, spacing, strict=True)), MIN_WINDOW * min(spacing))
    rows, columns = (min(n, max(1, round(side / s))) for n, s in zip(shape, spacing, strict=True))
    return rows, columns


def best_window(values: np.ndarray, side: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """The window of ``side`` rows and columns with the largest sum of values ``[slices, rows, columns]``.

    Returns:
        The slice, and the window's first row and column.
    """
    # the origin makes each sum belong to the window that begins there
    sums = uniform_filter(
        values.astype(float), (1, *side), mode="constant", origin=(0, -(side[0] // 2), -(side[1] // 2))
    )
    sums = sums[:, : values.shape[1] - side[0] + 1, : values.shape[2] - side[1] + 1]
    index, row, column = np.unravel_index(sums.argmax(), sums.shape)
    return int(index), (int(row), int(column))


def read_row(label: int, case: Case, pair: Sequence[TrainedRun], out: Path, options: FigureOptions) -> Row:
    """Find slice and window in a case, and read what they hold.

    Raises:
        UserError: a file cannot be read, or does not fit the truth.
    """
    opened = OpenCase(case, pair, options)
    entropies = []
    for run in pair:
        file = prediction_folder(run, out) / f"{case.name}.npz"
        try:
            with np.load(file) as stored:
                entropies.append(opened.slices(stored["entropy"].astype(np.float32)))
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{file} cannot be read ({error}). Remove it, and it is predicted again.") from error
        if entropies[-1].shape != opened.truth.shape:
            raise UserError(f"{file} has another shape than {case.label}. Remove it, and it is predicted again.")
    concerned = np.any([labels == label for labels in (opened.truth, *opened.predictions)], axis=0) & opened.counted
    difference = np.abs(entropies[0] - entropies[1]) * concerned
    shape = difference.shape[1:]
    side = window_side(shape, opened.size)
    index, start = best_window(difference, side)
    window = tuple(slice(first, first + length) for first, length in zip(start, side, strict=True))
    firsts = [w.start if turn.step is None else n - w.stop
              for w, turn, n in zip(window, opened.turns, shape, strict=True)]  # fmt: skip
    in_file = sorted(zip(opened.axes, firsts, side, strict=True))  # where rows may be columns
    place = [case.name, f"{index} ({opened.axis})", "{}, {}".format(*(first for _, first, _ in in_file)),
             "{} x {}".format(*(length for *_, length in in_file))]  # fmt: skip
    return Row(label, opened.plane(index), [entropy[index].copy() for entropy in entropies], window, place)


def entropy_figure(rows: Sequence[Row], names: Sequence[str], options: FigureOptions) -> Figure:
    """Rows: classes. Columns: slice, truth, both predictions and both entropies in the window."""
    width = column_width(2)
    panel = (width - 0.7) / 6
    colors = {label: (color, 0.6) for label, color in options.colors.items()}
    shown = {cls for row in rows for a in (row.plane.truth, *row.plane.predictions) for cls in np.unique(a[row.window])}
    handles = [
        Patch(color=color, linewidth=0, label=options.names[label]) for label, color in colors.items() if label in shown
    ]
    handles.append(Line2D([], [], color=TRUTH, label="truth, the row's class", path_effects=shadow(OUTLINE)))
    titles = ["Slice", "Truth", *names, *(f"{name},\nentropy" for name in names)]
    figure, grid = panel_grid(len(rows), titles, width, panel, handles)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    highest = max(entropy[row.window].max() for row in rows for entropy in row.entropies)
    gray = {"cmap": "gray", "vmin": 0, "vmax": 1}
    for axes, row in zip(grid, rows, strict=True):
        plane = row.plane
        (top, left), (bottom, right) = (np.multiply([getattr(w, end) for w in row.window], plane.size)
                                        for end in ("start", "stop"))  # fmt: skip
        height, across = np.multiply(plane.truth.shape, plane.size) / 2
        half = max(height, across)  # the whole slice in a square, so that all panels are of one size
        plane.draw(axes[0], plane.image, (across - half, across + half, height + half, height - half), **gray)
        frame = {"fill": False, "edgecolor": TRUTH, "linewidth": 1.0, "path_effects": shadow(1.0), "clip_on": False}
        axes[0].add_patch(Rectangle((left, top), right - left, bottom - top, **frame))
        axes[0].set_ylabel(wrapped(options.names[row.label].replace("_", " "), panel))
        window = (left, right, bottom, top)
        for each, label_map in zip(axes[1:4], (plane.truth, *plane.predictions), strict=True):
            plane.draw(each, plane.image, window, **gray)
            plane.draw(each, overlay(label_map, colors), window)
        for each, entropy in zip(axes[4:], row.entropies, strict=True):
            drawn = plane.draw(each, entropy, window, cmap="magma", vmin=0, vmax=highest)
        for each in axes[1:]:
            draw_outline(each, plane.truth == row.label, plane.size, OUTLINE)
    figure.colorbar(
        drawn, ax=grid, label="entropy / log K", fraction=0.01, pad=0.005, aspect=17 * len(rows), panchor=False
    )
    return figure


def _caption(
    rows: Sequence[Row], pair: Sequence[TrainedRun], cases: Sequence[Case], out: Path, options: FigureOptions
) -> str:
    means = [f"mean entropy, {run.name}" for run in pair]
    cells = [["Class", "Case", "Slice (axis)", "Window, first row and column", "rows x columns", *means]]
    for row in rows:
        means = [f"{entropy[row.window].mean():.4f}" for entropy in row.entropies]
        cells.append([options.names[row.label], *row.place, *means])
    return caption(
        "entropy",
        names=[run.name for run in pair],
        max_rows=MAX_ROWS,
        window=WINDOW,
        min_window=MIN_WINDOW,
        table="\n".join(table(cells)),
        cases=cases_in_words(cases),
        how="with" if options.tta else "without",
        models=models_in_words(pair),
        entropies="\n".join(f"- {run.name}: `{prediction_folder(run, out)}`" for run in pair),
    )
