"""How far a prediction can be trusted, and whose predictions become labels.

How confident a teacher is of a case: for each foreground class, the mean of its probability over the voxels that are
predicted as that class (with softmax this is the largest probability of each of them); of these the mean over the
classes that are predicted at all, so that a small organ weighs as much as a large one. A case without any predicted
foreground has confidence 0 and is never kept: an empty label map is what a teacher that has failed predicts, with
certainty.

How much two teachers agree on a case: the Dice of their label maps, the mean over the foreground classes that one of
them sees. A class that the other does not see counts 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager


class Measured(NamedTuple):
    """What the prediction of one case says of itself, by the names of the foreground classes or regions."""

    voxels: dict[str, int]  # how many are predicted as the class
    # the mean of the class's probability over these voxels; None where there are none
    probability: dict[str, float | None]
    # of the class, between two teachers; None where neither sees it. Empty with one teacher
    dice: dict[str, float | None] = {}

    @property
    def confidence(self) -> float:
        """The mean over the classes that are predicted; 0 if none is."""
        return _mean_of_present(self.probability)

    @property
    def agreement(self) -> float:
        """The mean over the classes that a teacher sees; 0 if none does, and where there is nobody to agree with."""
        return _mean_of_present(self.dice)


def _mean_of_present(values: Mapping[str, float | None]) -> float:
    present = [value for value in values.values() if value is not None]
    return float(np.mean(present)) if present else 0.0


def foreground_channels(label_manager: LabelManager) -> dict[str, int]:
    """Name of each foreground class or region -> its channel in nnU-Net's probabilities."""
    named = {
        name: np.unique(value)
        for name, value in label_manager.label_dict.items()
        if name != "ignore" and np.any(np.unique(value) != 0)
    }
    if label_manager.has_regions:  # a sigmoid each, in the order of dataset.json
        return {name: channel for channel, name in enumerate(named)}
    return {name: int(labels[0]) for name, labels in named.items()}


def measure(probabilities: np.ndarray, label_manager: LabelManager) -> Measured:
    """Measure how confident a prediction is, by the definition at the top of this file.

    The probabilities, float ``[C, *image]``, are as nnU-Net saves them: softmax over classes, or a sigmoid for each
    region.
    """
    voxels: dict[str, int] = {}
    probability: dict[str, float | None] = {}
    for name, channel, inside in _foreground(probabilities, label_manager):
        voxels[name] = int(np.count_nonzero(inside))
        mean = probabilities[channel].mean(where=inside, dtype=np.float64) if voxels[name] else None
        probability[name] = None if mean is None else float(mean)
    return Measured(voxels, probability)


def dice_between(one: np.ndarray, other: np.ndarray, label_manager: LabelManager) -> dict[str, float | None]:
    """Dice of each foreground class or region of two teachers' ``[C, *image]``, float; None where neither sees it."""
    found: dict[str, float | None] = {}
    pairs = zip(_foreground(one, label_manager), _foreground(other, label_manager), strict=True)
    for (name, _, here), (_, _, there) in pairs:
        total = np.count_nonzero(here) + np.count_nonzero(there)
        found[name] = float(2 * np.count_nonzero(here & there) / total) if total else None
    return found


def _foreground(probabilities: np.ndarray, label_manager: LabelManager) -> Iterator[tuple[str, int, np.ndarray]]:
    """Name, channel and predicted voxels of each foreground class or region."""
    if not label_manager.has_regions:
        predicted = label_manager.convert_probabilities_to_segmentation(probabilities)
    for name, channel in foreground_channels(label_manager).items():
        yield name, channel, probabilities[channel] > 0.5 if label_manager.has_regions else predicted == channel


def choose(scores: dict[str, float], at_least: float | None, keep: float | None) -> list[str]:
    """Choose the cases whose predictions become labels, by the score of every case, confidence or agreement; sorted.

    Kept are those that reach ``at_least``, or ``keep``, a fraction of all cases, the best ones, at least one. Cases
    with 0 are never chosen.
    """
    order = sorted((case for case in scores if scores[case] > 0), key=lambda case: (-scores[case], case))
    if keep is not None:
        return sorted(order[: max(1, round(keep * len(scores)))])
    return sorted(case for case in order if at_least is None or scores[case] >= at_least)
