"""Ramp-up of the weight of an unsupervised term."""

from __future__ import annotations

import math


def sigmoid_rampup(step: int | float, length: int | float) -> float:
    """The weight that grows from exp(-5) to 1 along ``exp(-5 (1 - t)^2)`` with ``t = step / length`` clipped to [0, 1].

    Source: Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning" (ICLR 2017), and every method here.

    Args:
        step: steps done so far, >= 0.
        length: steps until the full weight; 0 or less means that there is no ramp-up, and the weight is always 1.

    Returns:
        The weight, in (0, 1].
    """
    if length <= 0:
        return 1.0
    t = min(max(step / length, 0.0), 1.0)
    return math.exp(-5.0 * (1.0 - t) ** 2)
