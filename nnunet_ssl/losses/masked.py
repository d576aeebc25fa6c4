"""Losses of a part of the voxels, which may be empty."""

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


def labels_and_valid(target: Tensor, ignore_label: int | None) -> tuple[Tensor, Tensor | None]:
    """Labels as int64, ignored ones and nnU-Net's padding as background, and where they are not ignored.

    Args:
        target: of any shape and integer type.
        ignore_label: its value, None where there is none.

    Returns:
        int64 and bool, both of that shape; None in place of the second where there is no ignore label.
    """
    if ignore_label is None:
        return target.long().clamp(min=0), None
    valid = target != ignore_label
    return target.long().masked_fill(~valid, 0).clamp(min=0), valid
