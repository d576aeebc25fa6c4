"""Dice, Jaccard, HD95, ASD, ASSD and NSD of one case, on arrays.

Published definitions of surface metrics differ by half on the same masks, so each is written out in ``METRICS`` and
travels with the numbers. They are medpy's, which the code of most semi-supervised papers calls: the surface
is a set of voxels, a distance runs between voxel centers, and HD95 pools the distances of both directions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

Label = int | tuple[int, ...]  # a class, or a region of several labels

SURFACE = (
    "Surface: the voxels of a mask with a face neighbor outside it; everything beyond the image is outside. Distances "
    "are exact, between voxel centers. P: surface of the prediction, T: surface of the truth."
)


class Metric(NamedTuple):
    """How a metric is called and read."""

    key: str  # in summary.json; nnU-Net's own where it has one
    title: str  # in tables
    higher_is_better: bool  # whether a larger value wins
    is_distance: bool  # given in mm or voxels; the others are shares from 0 to 1
    definition: str  # in words


METRICS = {
    "dice": Metric("Dice", "Dice", True, False, "2 TP / (2 TP + FP + FN), counted in voxels."),
    "jaccard": Metric("IoU", "Jaccard", True, False, "TP / (TP + FP + FN), counted in voxels."),
    "hd95": Metric(
        "HD95", "HD95", False, True,
        "95th percentile (linear interpolation) of the distances from each voxel of P to T and from each voxel of T "
        "to P, pooled.",
    ),
    "asd": Metric("ASD", "ASD", False, True, "Mean distance from the voxels of P to T; one direction only."),
    "assd": Metric("ASSD", "ASSD", False, True, "Mean of ASD from P to T and ASD from T to P."),
    "nsd": Metric(
        "NSD", "NSD", True, False,
        "Share of the voxels of P and T together that lie within the tolerance of the other surface.",
    ),
}  # fmt: skip
SURFACE_METRICS = ("hd95", "asd", "assd", "nsd")


class EmptyRule(NamedTuple):
    """What is given where truth, prediction or both have no voxel of a class: shares, and distances."""

    both_share: float
    both_distance: float
    one_share: float
    one_distance: float
    meaning: str


EMPTY_RULES = {
    "nan": EmptyRule(
        math.nan, math.nan, 0.0, math.nan,
        "Both empty: not counted. One empty: Dice, Jaccard and NSD 0; distances undefined and not counted.",
    ),
    "medpy": EmptyRule(0.0, 0.0, 0.0, 0.0, "One or both empty: everything 0, distances too."),
    "128": EmptyRule(
        1.0, 0.0, 0.0, 128.0,
        "Both empty: Dice, Jaccard and NSD 1, distances 0. One empty: Dice, Jaccard and NSD 0, distances 128.",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What is measured, and how."""

    # keys of METRICS. Dice and Jaccard cost nothing once the counts are known
    metrics: tuple[str, ...] = tuple(METRICS)
    in_mm: bool = True  # distances in mm (the image's spacing), or in voxels
    tolerance: float = 1.0  # of NSD, in the unit of the distances
    empty: str = "nan"  # key of EMPTY_RULES

    @property
    def unit(self) -> str:
        """Of the distances."""
        return "mm" if self.in_mm else "voxels"


def case_metrics(
    reference: np.ndarray,
    prediction: np.ndarray,
    classes: Collection[Label],
    spacing: Sequence[float],
    options: Options,
    ignore_label: int | None = None,
) -> dict[Label, dict[str, float]]:
    """Measure every class of a case.

    Args:
        reference: ``[*spatial]`` integers, the truth.
        prediction: ``[*spatial]`` integers.
        classes: labels, or regions as tuples of labels; without the background.
        spacing: mm per voxel along each axis.
        options: what to measure.
        ignore_label: voxels that have it in the truth count as background on both sides, and not at all in TN.

    Returns:
        class -> key -> value: nnU-Net's keys (Dice, IoU, FP, TP, FN, TN, n_pred, n_ref) and the keys of the surface
        metrics that were asked for.
    """
    labels = sorted({label for members in map(labels_of, classes) for label in members})
    position = {label: i for i, label in enumerate(labels, start=1)}  # 0 is everything that belongs to no class
    truth, guess = positions(reference, labels), positions(prediction, labels)
    num_counted = truth.size
    if ignore_label is not None:
        ignored = reference == ignore_label
        truth[ignored] = guess[ignored] = 0
        num_counted -= int(np.count_nonzero(ignored))

    # the smallest box with all classes; one voxel where there are none
    [box] = ndimage.find_objects(np.logical_or(truth, guess).view(np.uint8), 1)
    box = box or (slice(1),) * truth.ndim
    truth, guess = truth[box], guess[box]
    # In an axis with one voxel (2D images have one) there is nothing to be a border against.
    axes = [axis for axis, size in enumerate(reference.shape) if size > 1] or [0]
    shape = [truth.shape[axis] for axis in axes]
    step = tuple(float(spacing[axis]) if options.in_mm else 1.0 for axis in axes)
    counts = _joint_counts(truth, guess, len(labels) + 1)
    truth, guess = truth.reshape(shape), guess.reshape(shape)
    boxes_truth = ndimage.find_objects(truth, len(labels))
    boxes_guess = ndimage.find_objects(guess, len(labels))

    results = {}
    for cls in classes:
        of_class = np.zeros(len(labels) + 1, bool)
        members = [position[label] for label in labels_of(cls)]
        of_class[members] = True
        tp = int(counts[of_class][:, of_class].sum())
        fn = int(counts[of_class].sum()) - tp
        fp = int(counts[:, of_class].sum()) - tp
        values = {"FP": fp, "TP": tp, "FN": fn, "TN": num_counted - tp - fp - fn, "n_pred": fp + tp, "n_ref": fn + tp}
        if fp + tp and fn + tp:
            values.update(Dice=2 * tp / (2 * tp + fp + fn), IoU=tp / (tp + fp + fn))
            if set(options.metrics) & set(SURFACE_METRICS):
                window = _union([boxes[i - 1] for boxes in (boxes_truth, boxes_guess) for i in members])
                values.update(surface_metrics(of_class[guess[window]], of_class[truth[window]], step, options))
        else:
            values.update(_of_empty(options, both=fp + fn == 0))
        results[cls] = values
    return results


def surface_metrics(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], options: Options
) -> dict[str, float]:
    """The surface metrics of two masks, neither of them empty.

    Args:
        prediction, reference: ``[*spatial]`` bool, 1D to 3D. What lies beyond them counts as outside, so the bounding
            box of both is enough.
        spacing: distance between voxels along each axis.
        options: which metrics, and the tolerance.

    Returns:
        key -> value, in the unit of ``spacing``; NSD is a share.
    """
    to_truth, to_prediction = surface_distances(prediction, reference, spacing)
    values = {}
    if "hd95" in options.metrics:
        values["HD95"] = float(np.percentile(np.concatenate([to_truth, to_prediction]), 95))
    if "asd" in options.metrics:
        values["ASD"] = float(to_truth.mean())
    if "assd" in options.metrics:
        values["ASSD"] = float((to_truth.mean() + to_prediction.mean()) / 2)
    if "nsd" in options.metrics:
        tolerance = options.tolerance * (1 + 1e-5)  # three steps of 0.1 mm are within 0.3 mm, despite float rounding
        near = int((to_truth <= tolerance).sum() + (to_prediction <= tolerance).sum())
        values["NSD"] = near / (len(to_truth) + len(to_prediction))
    return values


def surface_distances(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Distances between the surfaces of two masks, neither of them empty; the arguments are :func:`surface_metrics`'s.

    Returns:
        Of each surface voxel of the prediction to the nearest one of the reference, and the other way round; float64.
    """
    # Trees of the surfaces' voxels are as exact as distance transforms of the box, and cost by the surface. Plain
    # splits, since on a grid many coordinates are equal, which the balanced ones are slow with.
    points = [np.argwhere(_surface(mask)) * np.asarray(spacing, float) for mask in (prediction, reference)]
    trees = [cKDTree(p, balanced_tree=False, compact_nodes=False) for p in points]
    return trees[1].query(points[0])[0], trees[0].query(points[1])[0]


def _surface(mask: np.ndarray) -> np.ndarray:
    """As ``SURFACE`` says. The same as scipy's mask ^ binary_erosion(mask), several times as fast."""
    inside = mask.copy()
    for axis in range(mask.ndim):
        along, from_inside = np.moveaxis(mask, axis, 0), np.moveaxis(inside, axis, 0)
        from_inside[1:] &= along[:-1]
        from_inside[:-1] &= along[1:]
        from_inside[[0, -1]] = False
    return mask & ~inside


def _of_empty(options: Options, both: bool) -> dict[str, float]:
    """What is given where one mask has no voxel, or both."""
    rule = EMPTY_RULES[options.empty]
    share, distance = (rule.both_share, rule.both_distance) if both else (rule.one_share, rule.one_distance)
    chosen = [METRICS[name] for name in METRICS if name in ("dice", "jaccard", *options.metrics)]
    return {metric.key: distance if metric.is_distance else share for metric in chosen}


def labels_of(cls: Label) -> tuple[int, ...]:
    """The labels of a class: one, or several for a region."""
    return cls if isinstance(cls, tuple) else (cls,)


def positions(labels: np.ndarray, known: Sequence[int]) -> np.ndarray:
    """Replace each label by its place among the known ones, from 1; 0 for all others. Small integers."""
    table = np.zeros(known[-1] + 3, np.uint8 if len(known) < 256 else np.uint16)
    table[np.array(known) + 1] = np.arange(1, len(known) + 1)
    return table[np.clip(labels, -1, known[-1] + 1) + 1]


def _joint_counts(truth: np.ndarray, guess: np.ndarray, num: int) -> np.ndarray:
    """How many voxels have each pair of places: ``[num, num]``, truth first."""
    counts = np.zeros(num * num, np.int64)
    for of_truth, of_guess in zip(truth, guess, strict=True):  # slices fit into the cache
        counts += np.bincount((of_truth.astype(np.intp) * num + of_guess).ravel(), minlength=num * num)
    return counts.reshape(num, num)


def _union(boxes: Sequence[tuple[slice, ...] | None]) -> tuple[slice, ...]:
    """The smallest box around those that are not None."""
    there = [box for box in boxes if box is not None]
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*there, strict=True))
