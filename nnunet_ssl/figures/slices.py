"""Which slices a figure shows: the worst, the median and the best of a class, by a rule and never by hand.

At the tips of an organ a voxel or two decide, so they are no candidates. The mean over all runs that are drawn favors
none. The median is the lower one in the middle. Of equal scores, at either end, the slice with more truth is taken,
then the case that is first by name, then the lower slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_ssl.evaluation.metrics import Options, case_metrics
from nnunet_ssl.figures.options import FigureOptions
from nnunet_ssl.figures.planes import OpenCase
from nnunet_ssl.figures.runs import TrainedRun
from nnunet_ssl.figures.test_set import Case
from nnunet_ssl.pools import all_outcomes

MIN_SHARE = 0.25  # of the largest cross-section


@dataclass(frozen=True)
class Slice:
    """One slice that was chosen."""

    rank: str  # worst, median or best
    case: Case
    index: int  # along the slicing axis, from 0
    dice: tuple[float, ...]  # of each run, in the class that it was chosen for


@dataclass(frozen=True)
class Measured:
    """Slices of one case."""

    case: Case
    areas: np.ndarray  # [classes, slices], voxels of the truth
    dice: np.ndarray  # [classes, runs, slices]; NaN where truth and prediction are empty


def measure_slices(case: Case, runs: Sequence[TrainedRun], options: FigureOptions) -> Measured:
    """Dice of each class, run and slice of a case, as ``nnunet_ssl.evaluation`` measures it.

    Raises:
        UserError: a file cannot be read, or lies on another grid than the truth.
    """
    opened = OpenCase(case, runs, options)
    found = [
        [
            case_metrics(truth, guess, options.names, (1, 1), Options(metrics=("dice",)), options.ignore_label)
            for truth, guess in zip(opened.truth, prediction, strict=True)
        ]
        for prediction in opened.predictions
    ]
    areas = np.array([[values[label]["n_ref"] for values in found[0]] for label in options.names])
    dice = np.array([[[values[label]["Dice"] for values in of_run] for of_run in found] for label in options.names])
    return Measured(case, areas, dice)


def measure_all_slices(runs: Sequence[TrainedRun], cases: Sequence[Case], options: FigureOptions) -> list[Measured]:
    """``measure_slices`` of every case by predicted runs; cases by name."""
    jobs = [(case, runs, options) for case in cases]
    measured = all_outcomes(measure_slices, jobs, options.num_processes, "Looking for slices")
    return sorted(measured, key=lambda m: m.case.name)


def choose_slices(measured: Sequence[Measured], class_index: int) -> list[Slice]:
    """Worst, median and best slice of a class, the index of which is given, by the rule at the top of this file.

    Returns:
        Three; fewer if there are fewer candidates, none if the class is in no case.
    """
    candidates = []  # score, area, place
    for m in measured:
        areas, dice = m.areas[class_index], m.dice[class_index]
        for index in np.flatnonzero((areas > 0) & (areas >= MIN_SHARE * areas.max(initial=0))).tolist():
            candidates.append((float(dice[:, index].mean()), -int(areas[index]), m.case.name, index, m))
    candidates.sort(key=lambda c: c[:4])
    if len(candidates) > 1:  # the best goes to the end; where all are alike, it is the second
        best = min(candidates[1:], key=lambda c: (-c[0], *c[1:4]))
        candidates.remove(best)
        candidates.append(best)
    last = len(candidates) - 1
    # with fewer than three a slice would be shown twice: the median goes first, then the best
    ranks = {last: "best", last // 2: "median", 0: "worst"} if candidates else {}
    return [
        Slice(ranks[place], m.case, index, tuple(m.dice[class_index, :, index].tolist()))
        for place in sorted(ranks)
        for *_, index, m in [candidates[place]]
    ]
