"""Means over a part of a tensor that may be empty."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of ``values`` where ``mask`` holds; 0, with zero gradients, where it holds nowhere.

    Args:
        values: of any shape, floating point.
        mask: bool, of the same shape.

    Returns:
        0-dim, dtype of ``values``; the count is not read on the CPU.
    """
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
