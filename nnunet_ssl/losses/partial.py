"""Dice and cross-entropy of the voxels that count: how labels and pseudo-labels in one mixed image are learned."""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_ssl.losses.masked import masked_mean
from nnunet_ssl.losses.pseudo_labels import cross_entropy_map
from nnunet_ssl.losses.squared_dice import squared_dice_of_shown


def partial_dice_and_cross_entropy(
    logits: Tensor, labels: Tensor, counts: Tensor, regions: bool = False, over_all: bool = False
) -> Tensor:
    """The squared Dice of the classes that are shown plus the cross-entropy, in fp32; 0 where nothing counts.

    Args:
        logits: ``[B, K, *spatial]``.
        labels: ``[B, 1, *spatial]`` integer classes below K; of regions ``[B, K, *spatial]`` bool.
        counts: bool, ``[B, 1, *spatial]``; of regions ``[B, K, *spatial]`` too.
        regions: whether the channels are regions.
        over_all: the cross-entropy is divided by the number of all voxels rather than of those that count, so that it
            weighs less where few do.

    Returns:
        0-dim float32.
    """
    each = cross_entropy_map(logits, labels, regions)
    counts = counts.expand_as(each)
    ce = torch.where(counts, each, 0.0).mean() if over_all else masked_mean(each, counts)
    return ce + squared_dice_of_shown(logits, labels, counts, regions)
