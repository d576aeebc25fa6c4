"""Consistency of SASNet's two branches: PLC between their segmentations, SRC between segmentation and regression.

Equation numbers are the SASNet paper's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from nnunet_ssl.losses.branches import Branches
from nnunet_ssl.losses.masked import masked_mean


def pseudo_label_consistency(logits: Branches, temperature: float | None, detach_target: bool = False) -> Tensor:
    """L_plc of Eq. 15: the segmentations of the two branches agree.

    The equation is the plain mean of ``(p_l - p_h)^2``. The authors' code has each branch approach the sharpened
    prediction of the other, through which gradients flow too, and sums the two directions. For two classes their
    sharpening is ``p^(1/T) / sum_k p^(1/T)``, which of ``p = softmax(x)`` is ``softmax(x / T)``.

    Args:
        logits: of both branches, ``[B, K, *spatial]``, any float type.
        temperature: T, positive, for the code's form: 1 changes nothing, towards 0 all goes to the likeliest class.
            None for the equation's form.
        detach_target: whether the sharpened target is a constant. Nothing to the equation's form, which has no target.

    Returns:
        The loss, 0-dim float32: a mean over batch, classes and voxels.
    """
    high, low = (x.float() for x in logits)
    p_high, p_low = high.softmax(1), low.softmax(1)
    if temperature is None:
        return F.mse_loss(p_low, p_high)
    target_for_high, target_for_low = (low / temperature).softmax(1), (high / temperature).softmax(1)
    if detach_target:
        target_for_high, target_for_low = target_for_high.detach(), target_for_low.detach()
    return F.mse_loss(p_high, target_for_high) + F.mse_loss(p_low, target_for_low)


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
