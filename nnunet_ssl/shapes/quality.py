"""Whether a registration is good enough to train on, judged without the label of the image that it goes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from nnunet_ssl.errors import UserError
from nnunet_ssl.shapes.registration import MOST_FOLDING, Registration

LEAST_SIMILARITY = 0.4  # correlation around the labeled structures
LEAST_COVERED = 0.5  # of the fixed image
LEAST_LEFT = 0.2  # of the volume of a class
TOO_FEW = 0.25  # of the pairs: then the images do not show the same


def volumes(labels: np.ndarray, voxel: float, structures: Sequence[int]) -> dict[int, float]:
    """Structure -> volume in mm^3, of those that are there."""
    values, counts = np.unique(labels[np.isin(labels, structures)], return_counts=True)
    return {int(value): float(count * voxel) for value, count in zip(values, counts, strict=True)}


def why_not(registration: Registration, before: dict[int, float], after: dict[int, float]) -> str | None:
    """What stands against a warp, in words that can be counted; None for a good one.

    Args:
        registration: of the pair.
        before, after: ``volumes`` of the labels, and of the warped labels.
    """
    if registration.covered < LEAST_COVERED:
        return "show another field of view"
    if registration.folding > MOST_FOLDING:
        return "fold"
    if registration.after < max(LEAST_SIMILARITY, registration.before):
        return "are not alike after registration"
    if any(after.get(label, 0.0) < LEAST_LEFT * volume for label, volume in before.items()):
        return "lose a class"
    return None


def refuse_few(folder: str, good: int, bad: Counter[str], remedy: str) -> None:
    """Refuse to learn from the few pairs that look good where most do not.

    Args:
        folder: that the message is about.
        good: pairs with nothing against them.
        bad: what stands against the others, and how often.
        remedy: the end of the sentence, and what to do.

    Raises:
        UserError: the images do not show the same.
    """
    pairs = good + bad.total()
    if good == 0 or good < TOO_FEW * pairs:
        told = ", ".join(f"{count} {why}" for why, count in bad.most_common())
        raise UserError(f"{folder}: of {pairs} pairs of images only {good} register well ({told}), {remedy}")
