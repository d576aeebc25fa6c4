"""SAR: the Scale-aware Adaptive Reweight of SASNet (section 3.2, Eq. 5 to 8).

Where a branch has been right, its prediction weighs more in the fused one. How right it has been is remembered by
``trainers/sasnet/memory.py``. Equation numbers are the paper's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_ssl.losses.branches import Branches

NEUTRAL = 0.5  # the confidence where nothing is known


def true_class_confidence(prob: Tensor, labels: Tensor) -> Tensor:
    """C_i of Eq. 7 and 8: the probability that a branch gives to the true class, for any number of classes.

    Args:
        prob: ``[B, K, *spatial]``, of any float type.
        labels: ``[B, *spatial]`` of any integer type. Values outside ``0 .. K - 1``, such as an ignore label, name no
            class.

    Returns:
        ``[B, *spatial]`` float32; 0.5, which is neutral, where the label names no class.
    """
    labels, num_classes = labels.long(), prob.shape[1]
    known = (labels >= 0) & (labels < num_classes)
    confidence = prob.gather(1, labels.clamp(0, num_classes - 1)[:, None])[:, 0].float()
    return torch.where(known, confidence, NEUTRAL)


def reweight(prob: Branches, confidence: Branches, alpha: float) -> Tensor:
    """P'_l + P'_h of Eq. 4 to 6, before any softmax.

    The fused prediction is the argmax over the classes of what is returned. Eq. 6 puts a softmax on top; being
    monotone it does not change the argmax, but its input ends at 2 (1 + alpha), so that with many classes no
    probability passes the threshold of 0.5 that the released code applies (with 22 classes or more none can).

    Args:
        prob: of both branches, ``[B, K, *spatial]``.
        confidence: of both branches, ``[B, *spatial]`` in [0, 1], averaged over the previous visits.
        alpha: the residual coefficient, 0.5 in the paper.

    Returns:
        ``[B, K, *spatial]`` float32.
    """
    high, low = ((1 + alpha * c.float()[:, None]) * p.float() for p, c in zip(prob, confidence, strict=True))
    return high + low
