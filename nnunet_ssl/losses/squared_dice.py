"""The Dice loss of V-Net codes: squared denominators, all classes, one sum over the batch."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_dice_loss(logits: Tensor, labels: Tensor, mask: Tensor | None = None, smooth: float = 1e-10) -> Tensor:
    """``1 / K sum_k 1 - (2 sum p y + s) / (sum p^2 + sum y^2 + s)``, sums over all voxels of the batch, in fp32.

    Source: Milletari, Navab, Ahmadi, "V-Net" (3DV 2016); the background counts as a class, as MagicNet's code has it.

    Args:
        logits: ``[B, K, *spatial]``, before softmax.
        labels: ``[B, 1, *spatial]``, integer classes below K.
        mask: ``[B, 1, *spatial]`` bool, the voxels that count; None for all.
        smooth: s.

    Returns:
        0-dim float32 in [0, 1].
    """
    p = logits.float().softmax(1)
    y = torch.zeros_like(p).scatter_(1, labels.long(), 1.0)
    if mask is not None:
        p, y = p * mask, y * mask
    axes = [0, *range(2, p.ndim)]
    overlap, size = (p * y).sum(axes), (p * p).sum(axes) + y.sum(axes)
    return (1 - (2 * overlap + smooth) / (size + smooth)).mean()
