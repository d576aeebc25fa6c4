"""Which slices a figure shows: the worst, the median and the best of a class, by a rule and never by hand.

The slices lie across the axis with the largest spacing (the first, where all are alike): those in which the image was
taken. Candidates of a class are the slices of all cases in which the truth has at least a quarter of the class's
largest cross-section in that case; at the tips of an organ a voxel or two decide. A candidate's score is the Dice of
its class in that slice, in the mean over all the runs that are drawn, so that no run is favoured. Worst and best are
the candidates with the lowest and the highest score, the median is the lower one in the middle. Of equal scores, at
either end, the slice with more truth is taken, then the case that is first by name, then the lower slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.label_maps import grid_difference, grid_of, read_label_map
from nnunet_ssl.evaluation.metrics import Label, labels_of
from nnunet_ssl.figures.runs import Case, FigureOptions, TrainedRun, reason
from nnunet_ssl.pools import all_outcomes
from nnunet_ssl.volumes import VolumeError

RANKS = ("worst", "median", "best")
MIN_SHARE = 0.25  # of the largest cross-section
RULE = (
    "Slices lie across the axis with the largest spacing. Candidates are the slices in which the truth has at least "
    f"{MIN_SHARE:.0%} of the class's largest cross-section in the case. Worst, median and best are by the Dice of the "
    "class in the slice, in the mean over the runs shown; of equal ones the slice with more truth."
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


def read_truth(case: Case, reader: BaseReaderWriter) -> tuple[np.ndarray, dict[str, Any]]:
    """Read the true label map of a case.

    Returns:
        int32 ``[*spatial]``, and nnU-Net's properties.

    Raises:
        UserError: it cannot be read.
    """
    return _read(case.label, reader)


def read_prediction(file: Path, reader: BaseReaderWriter, truth: np.ndarray, properties: dict[str, Any]) -> np.ndarray:
    """Read a predicted label map.

    Args:
        file: its name.
        reader: nnU-Net's.
        truth, properties: of :func:`read_truth`.

    Returns:
        int32 ``[*spatial]``.

    Raises:
        UserError: it cannot be read, or lies on another grid than the truth.
    """
    labels, own = _read(file, reader)
    if difference := grid_difference(grid_of(labels, own), grid_of(truth, properties)):
        raise UserError(
            f"{file} {difference}. Replace it, or remove it if it is a prediction that was made for the figures."
        )
    return labels


def _read(file: Path, reader: BaseReaderWriter) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        return read_label_map(str(file), reader)
    except VolumeError as error:
        raise UserError(f"{error}. Replace it.") from error


def read_image(case: Case, reader: BaseReaderWriter, shape: Sequence[int]) -> np.ndarray:
    """Read all channels of a case.

    Args:
        case: its files.
        reader: nnU-Net's.
        shape: of its truth.

    Returns:
        float32 ``[C, *spatial]``.

    Raises:
        UserError: it cannot be read, or is not of the truth's shape.
    """
    try:
        image, _ = reader.read_images([str(file) for file in case.images])
    except Exception as error:
        raise UserError(
            f"{', '.join(map(str, case.images))} cannot be read ({reason(error)}). It may be damaged: replace it."
        ) from error
    if image.shape[1:] != tuple(shape):
        raise UserError(f"{case.images[0]} has the shape {image.shape[1:]}, the truth {tuple(shape)}. Replace one.")
    return image


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
    known = sorted({value for label in classes for value in labels_of(label)})
    positions = [[1 + known.index(value) for value in labels_of(label)] for label in classes]
    dice = []
    try:
        truth, properties = read_truth(case, reader)
        axis = slice_axis(properties["spacing"], truth.shape)
        for file in files:
            prediction = read_prediction(file, reader, truth, properties)
            counts = confusion_of_slices(truth, prediction, axis, known, ignore_label)
            # [classes, slices] each
            areas = np.array([counts[:, m].sum((1, 2)) for m in positions])
            guesses = np.array([counts[:, :, m].sum((1, 2)) for m in positions])
            both = np.array([counts[:, m][:, :, m].sum((1, 2)) for m in positions])
            sizes = areas + guesses
            dice.append(np.divide(2 * both, sizes, out=np.full(sizes.shape, np.nan), where=sizes > 0))
    except UserError as error:
        return str(error).removeprefix("nnunet_ssl: ")
    return Measured(case, areas, np.stack(dice, 1))


def confusion_of_slices(
    truth: np.ndarray, prediction: np.ndarray, axis: int, labels: Sequence[int], ignore_label: int | None
) -> np.ndarray:
    """How often each pair of true and predicted label occurs in each slice: all classes in one pass.

    Args:
        truth, prediction: int ``[*spatial]``, of one shape.
        axis: across which the slices lie.
        labels: positive, in ascending order; all others count as one.
        ignore_label: voxels with it in the truth are not counted.

    Returns:
        ``[slices, 1 + labels, 1 + labels]``, truth before prediction; 0 stands for all other labels.
    """
    number = 1 + len(labels)
    place = np.zeros(labels[-1] + 2, int)  # the last for what is larger
    place[labels] = np.arange(1, number)
    counts = []
    for t, p in zip(np.moveaxis(truth, axis, 0), np.moveaxis(prediction, axis, 0), strict=True):
        pairs = number * place[t.clip(0, len(place) - 1)] + place[p.clip(0, len(place) - 1)]
        pairs = pairs.ravel() if ignore_label is None else pairs[t != ignore_label]
        counts.append(np.bincount(pairs, minlength=number**2).reshape(number, number))
    return np.array(counts)


def measure_all_slices(runs: Sequence[TrainedRun], cases: Sequence[Case], options: FigureOptions) -> list[Measured]:
    """``measure_slices`` of every case by predicted runs; cases by name.

    Raises:
        UserError: a file cannot be read, or lies on another grid than the truth.
    """
    jobs = [
        (
            case,
            [run.predicted / f"{case.name}{options.file_ending}" for run in runs],
            list(options.names),
            runs[0].reader,
            options.ignore_label,
        )
        for case in cases
    ]
    measured = all_outcomes(measure_slices, jobs, options.num_processes, "Looking for slices")
    for outcome in measured:
        if isinstance(outcome, str):
            raise UserError(outcome)
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
    if last > 0:  # of the highest scores the one with most truth goes to the end; where all are alike, the second
        best = next(i for i, c in enumerate(candidates) if c[0] == candidates[last][0])
        candidates.append(candidates.pop(max(best, 1)))
    # with fewer than three a slice would be shown twice: the median goes first, then the best
    places = {place: rank for rank, place in zip(RANKS[::-1], (last, last // 2, 0), strict=True)} if candidates else {}
    return [
        Slice(places[place], m.case, index, tuple(map(float, m.dice[class_index, :, index])))
        for place in sorted(places)
        for *_, index, m in [candidates[place]]
    ]
