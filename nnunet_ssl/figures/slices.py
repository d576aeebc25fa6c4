"""Which slices a figure shows: the worst, the median and the best of a class, by a rule and never by hand.

The slices lie across the axis with the largest spacing (the first, where all are alike): those in which the image was
taken. Candidates of a class are the slices of all cases in which the truth has at least a quarter of the class's
largest cross-section in that case; at the tips of an organ a voxel or two decide. A candidate's score is the Dice of
its class in that slice, in the mean over all the runs that are drawn, so that no run is favoured. Worst and best are
the candidates with the lowest and the highest score, the median is the lower one in the middle. Of equal scores the
slice with more truth comes first, then the case that is first by name, then the lower slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from tqdm import tqdm

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.metrics import Label
from nnunet_ssl.figures.runs import Case, FigureOptions, TrainedRun, class_mask, predictions
from nnunet_ssl.pools import outcomes

RANKS = ("worst", "median", "best")
MIN_SHARE = 0.25  # of the largest cross-section
RULE = (
    "Slices lie across the axis with the largest spacing. Candidates are the slices in which the truth has at least "
    f"{MIN_SHARE:.0%} of the class's largest cross-section in the case. Worst, median and best are by the Dice of the "
    "class in the slice, in the mean over the runs shown."
)


@dataclass(frozen=True)
class Slice:
    """One slice that was chosen.

    Attributes:
        rank: of ``RANKS``.
        case: where it is from.
        index: along the slicing axis, from 0.
        dice: of each run, in the class that it was chosen for.
    """

    rank: str
    case: Case
    index: int
    dice: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """Slices of one case.

    Attributes:
        case: the case.
        areas: ``[classes, slices]``, voxels of the truth.
        dice: ``[classes, runs, slices]``; NaN where truth and prediction are empty.
    """

    case: Case
    areas: np.ndarray
    dice: np.ndarray


def slice_axis(spacing: Sequence[float], shape: Sequence[int]) -> int:
    """The axis across which an image is shown in slices: the one with the largest spacing, the first of equals.

    An image with a single slice is shown as that slice.
    """
    if 1 in shape:
        return list(shape).index(1)
    spacing = np.asarray(spacing, float)
    return int(np.argmax(spacing > spacing.max() * (1 - 1e-3)))  # headers round


def read_label_map(file: Path, reader: BaseReaderWriter) -> tuple[np.ndarray, dict]:
    """Read a label map.

    Returns:
        int32 ``[*spatial]``, and nnU-Net's properties.

    Raises:
        UserError: it cannot be read.
    """
    try:
        array, properties = reader.read_seg(str(file))
    except Exception as error:
        reason = str(error).strip().splitlines()[-1:] or [repr(error)]
        raise UserError(f"{file} cannot be read ({reason[0]}). It may be damaged: replace it.") from error
    return array[0].astype(np.int32), properties


def measure_slices(
    case: Case, files: Sequence[Path], classes: Sequence[Label], reader: BaseReaderWriter, ignore_label: int | None
) -> Measured | str:
    """Dice of each class, run and slice of a case.

    Args:
        case: whose truth is read.
        files: its label map by each run.
        classes: labels or regions.
        reader: nnU-Net's.
        ignore_label: voxels with it in the truth do not count.

    Returns:
        What was measured, or what is wrong with a file: raising would end the other processes.
    """
    try:
        truth, properties = read_label_map(case.label, reader)
        axis = slice_axis(properties["spacing"], truth.shape)
        counted = np.ones(truth.shape, bool) if ignore_label is None else truth != ignore_label
        in_plane = tuple(a for a in range(truth.ndim) if a != axis)
        masks = [class_mask(truth, label) & counted for label in classes]
        areas = np.array([mask.sum(in_plane) for mask in masks])
        dice = np.full((len(classes), len(files), truth.shape[axis]), np.nan)
        for r, file in enumerate(files):
            prediction, _ = read_label_map(file, reader)
            if prediction.shape != truth.shape:
                return f"{file} has the shape {prediction.shape}, the truth {truth.shape}: remove it to predict again."
            for k, label in enumerate(classes):
                guess = class_mask(prediction, label) & counted
                sizes = areas[k] + guess.sum(in_plane)
                np.divide(2 * (guess & masks[k]).sum(in_plane), sizes, out=dice[k, r], where=sizes > 0)
    except UserError as error:
        return str(error).removeprefix("nnunet_ssl: ")
    return Measured(case, areas, dice)


def measure_all_slices(
    runs: Sequence[TrainedRun], cases: Sequence[Case], out: Path, options: FigureOptions
) -> list[Measured]:
    """``measure_slices`` of every case, by name; predicts what is not there yet.

    Raises:
        UserError: a file cannot be read, or lies on another grid than the truth.
    """
    folders = [predictions(run, cases, out, options) for run in runs]
    jobs = [
        (
            case,
            [folder / f"{case.name}{options.file_ending}" for folder in folders],
            list(options.names),
            runs[0].reader,
            options.ignore_label,
        )
        for case in cases
    ]
    measured = []
    for outcome in tqdm(outcomes(measure_slices, jobs, options.num_processes), "Looking for slices", len(jobs)):
        if isinstance(outcome, str):
            raise UserError(outcome)
        measured.append(outcome)
    return sorted(measured, key=lambda m: m.case.name)


def choose_slices(measured: Sequence[Measured], class_index: int) -> list[Slice]:
    """Worst, median and best slice of a class, by the rule at the top of this file.

    Args:
        measured: of all cases.
        class_index: of the class among those measured.

    Returns:
        Three; fewer if there are fewer candidates, none if the class is in no case.
    """
    candidates = []
    for m in measured:
        areas, dice = m.areas[class_index], m.dice[class_index]
        for index in np.flatnonzero((areas > 0) & (areas >= MIN_SHARE * areas.max(initial=0))):
            candidates.append((float(dice[:, index].mean()), -int(areas[index]), m.case.name, int(index), m))
    candidates.sort(key=lambda c: c[:4])
    last = len(candidates) - 1
    # with fewer than three a slice would be shown twice: the median goes first, then the best
    places = {place: rank for rank, place in zip(RANKS[::-1], (last, last // 2, 0), strict=True)} if candidates else {}
    return [
        Slice(places[place], m.case, index, tuple(map(float, m.dice[class_index, :, index])))
        for place in sorted(places)
        for *_, index, m in [candidates[place]]
    ]
