"""Entropy of predictions, as a share of the largest that it can be."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def entropy(prob: Tensor, regions: bool = False) -> Tensor:
    """How unsure each voxel is: 0 where one class has all, 1 where all have the same.

    No loss: the gradient at a probability of 0 is infinite. See :func:`entropy_of_logits`.

    Args:
        prob: ``[B, K, *spatial]`` probabilities, any float type: over dim 1, or of each region for itself.
        regions: whether the channels are regions, which overlap.

    Returns:
        ``[B, *spatial]`` float32: over ln K; of regions the mean of their binary entropies, over ln 2.
    """
    prob = prob.float()
    if regions:
        return (torch.special.entr(prob) + torch.special.entr(1 - prob)).mean(1) / math.log(2)
    return torch.special.entr(prob).sum(1) / math.log(prob.shape[1])


def entropy_of_logits(logits: Tensor, regions: bool = False) -> Tensor:
    """:func:`entropy` of what logits say, with a finite gradient everywhere.

    Args:
        logits: ``[B, K, *spatial]``, any float type.
        regions: whether the channels are regions.

    Returns:
        ``[B, *spatial]`` float32.
    """
    logits = logits.float()
    if regions:  # -ln p = softplus(-x), -ln (1 - p) = softplus(x)
        surprise = logits.sigmoid() * F.softplus(-logits) + (-logits).sigmoid() * F.softplus(logits)
        return surprise.mean(1) / math.log(2)
    log_prob = logits.log_softmax(1)
    return -(log_prob.exp() * log_prob).sum(1) / math.log(logits.shape[1])
