"""The Dice loss of V-Net codes: squared denominators, all classes, one sum over the batch.

Source: Milletari, Navab, Ahmadi, "V-Net" (3DV 2016); the background counts as a class, as the codes of MagicNet and
GA-CPS have it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_ssl.losses.masked import masked_mean


def squared_dice_loss(
    logits: Tensor, labels: Tensor, mask: Tensor | None = None, smooth: float = 1e-10, regions: bool = False
) -> Tensor:
    """``1 / K sum_k 1 - (2 sum p y + s) / (sum p^2 + sum y^2 + s)``, sums over all voxels of the batch, in fp32.

    Args:
        logits: ``[B, K, *spatial]``, before softmax, of regions before sigmoid.
        labels: ``[B, 1, *spatial]``, integer classes below K; of regions ``[B, K, *spatial]``.
        mask: ``[B, 1, *spatial]`` bool, the voxels that count; None for all. Of regions ``[B, K, *spatial]`` too.
        smooth: s.
        regions: whether the channels are regions, which overlap.

    Returns:
        0-dim float32 in [0, 1].
    """
    p, y = probabilities_and_one_hot(logits, labels, mask, regions)
    return squared_dice_per_class(p, y, smooth).mean()


def squared_dice_of_shown(logits: Tensor, labels: Tensor, mask: Tensor | None = None, regions: bool = False) -> Tensor:
    """``squared_dice_loss``, averaged over the classes that the labels show where they count; 0 where nothing counts.

    For pseudo-labels. Of a class without any the plain loss is ``1 - s / (sum p^2 + s)``: it says nothing until p is
    tiny, and then pulls it to 0, and with nnU-Net's momentum the whole network to background.

    Arguments as in ``squared_dice_loss``.

    Returns:
        0-dim float32 in [0, 1].
    """
    p, y = probabilities_and_one_hot(logits, labels, mask, regions)
    return masked_mean(squared_dice_per_class(p, y), y.any(0).flatten(1).any(1))


def probabilities_and_one_hot(
    logits: Tensor, labels: Tensor, mask: Tensor | None = None, regions: bool = False
) -> tuple[Tensor, Tensor]:
    """p and y of the Dice, both zero where the mask does not hold; arguments as in :func:`squared_dice_loss`.

    Returns:
        ``[B, K, *spatial]`` each: p float32, y bool.

    Raises:
        RuntimeError: if a label is out of range (on a GPU as a device assertion).
    """
    if regions:
        p, y = logits.float().sigmoid(), labels.bool()
        return (p, y) if mask is None else (torch.where(mask, p, 0.0), y & mask)
    p = logits.float().softmax(1)
    y = torch.zeros_like(p, dtype=torch.bool)
    if mask is None:
        return p, y.scatter_(1, labels.long(), True)
    return torch.where(mask, p, 0.0), y.scatter_(1, labels.long(), mask)


def squared_dice_per_class(p: Tensor, y: Tensor, smooth: float = 1e-10) -> Tensor:
    """``1 - (2 sum p y + s) / (sum p^2 + sum y^2 + s)`` of each class.

    Args:
        p: probabilities, ``[B, K, *spatial]`` float32.
        y: one-hot labels, ``[B, K, *spatial]`` bool.
        smooth: s.

    Returns:
        ``[K]`` float32.
    """
    over = [0, *range(2, p.ndim)]
    y_sum = y.sum(over)  # y is 0 or 1, so this is the sum of y^2 too
    return 1 - (2 * (p * y).sum(over) + smooth) / ((p * p).sum(over) + y_sum + smooth)


def squared_dice_to_soft_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """``1 - 2 sum p q / (sum p^2 + sum q^2)``, sums over classes too, 0 if and only if p is q; in fp32.

    A mean over classes would let those that neither shows compare their last digits, with a full vote each.

    Args:
        logits: of p, ``[B, K, *spatial]``, any float type.
        labels: q, ``[B, K, *spatial]`` probabilities.

    Returns:
        0-dim float32 in [0, 1].
    """
    p, q = logits.float().softmax(1), labels.float()
    return F.mse_loss(p, q, reduction="sum") / (p.square().sum() + q.square().sum())  # the same, without cancellation
