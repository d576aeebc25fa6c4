"""Consistency of SASNet's two branches: PLC between their segmentations, SRC between segmentation and regression.

Equation numbers are the SASNet paper's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_ssl.losses.branches import Branches
from nnunet_ssl.losses.masked import masked_mean


def sharpen(prob: Tensor, temperature: float) -> Tensor:
    """``p^(1/T) / sum_k p^(1/T)``: for two classes, the authors' sharpening of a probability.

    In fp32 and through logarithms: at their T = 0.1, p^10 of a half float is 0 from p = 0.19 down.

    Args:
        prob: ``[B, K, *spatial]`` probabilities over dim 1, any float type.
        temperature: T, positive; 1 changes nothing, towards 0 all goes to the likeliest class.

    Returns:
        ``[B, K, *spatial]`` float32, sums to 1 over dim 1. Gradients are finite everywhere; an exact 0 gets none.
    """
    prob = prob.float()
    return F.softmax(prob.clamp(min=torch.finfo(prob.dtype).tiny).log() / temperature, dim=1)


def pseudo_label_consistency(prob: Branches, temperature: float | None, detach_target: bool = False) -> Tensor:
    """L_plc of Eq. 15: the segmentations of the two branches agree.

    The equation is the plain mean of ``(p_l - p_h)^2``. The authors' code has each branch approach the sharpened
    prediction of the other, through which gradients flow too, and sums the two directions.

    Args:
        prob: probabilities of both branches, ``[B, K, *spatial]``, any float type.
        temperature: T of :func:`sharpen` for the code's form; None for the equation's.
        detach_target: whether the sharpened target is a constant. Nothing to the equation's form, which has no target.

    Returns:
        The loss, 0-dim float32: a mean over batch, classes and voxels.
    """
    high, low = (p.float() for p in prob)
    if temperature is None:
        return F.mse_loss(low, high)
    target_for_high, target_for_low = sharpen(low, temperature), sharpen(high, temperature)
    if detach_target:
        target_for_high, target_for_low = target_for_high.detach(), target_for_low.detach()
    return F.mse_loss(high, target_for_high) + F.mse_loss(low, target_for_low)


def segmentation_regression_consistency(regression: Tensor, sdm: Tensor, present: Tensor) -> Tensor:
    """L_src of Eq. 16 for one branch: the regression head gives the signed distance map of the fused segmentation.

    Args:
        regression: ``[B, K - 1, *spatial]`` output of the head after tanh, one map a foreground class, any float type.
        sdm: ``[B, K - 1, *spatial]`` of :func:`~nnunet_ssl.losses.sdm.signed_distance_maps`.
        present: ``[B, K - 1]`` bool of the same function, which maps have a boundary and count.

    Returns:
        The loss, 0-dim float32: a mean over the voxels of the maps that count; 0, with zero gradients, if none does.
    """
    error = (regression.float() - sdm).square().flatten(2).mean(2)  # maps are of one size: the mean of means is exact
    return masked_mean(error, present)
