"""Consistency between what is said of the same images: by branches of a network, by segmentation and regression.

Equation numbers are the SASNet paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_ssl.losses.masked import masked_mean


def pseudo_label_consistency(
    logits: Sequence[Tensor], temperature: float | None, detach_target: bool = False, regions: bool = False
) -> Tensor:
    """L_plc of Eq. 15, and MC-Net+'s mutual consistency: the segmentations of all branches agree.

    The equation is the plain mean of ``(p_l - p_h)^2``. In the code of both methods each branch approaches the
    sharpened prediction of each other one, through which gradients flow too, and all ordered pairs are summed. For two
    classes their sharpening is ``p^(1/T) / sum_k p^(1/T)``, which of ``p = softmax(x)`` is ``softmax(x / T)``.

    Args:
        logits: of each branch, ``[B, K, *spatial]``, any float type.
        temperature: T, positive, for the codes' form: 1 changes nothing, towards 0 all goes to the likeliest class.
            None for the equation's form, summed over pairs.
        detach_target: whether the sharpened target is a constant. Nothing to the equation's form, which has no target.
        regions: whether the channels are regions, each with a sigmoid.

    Returns:
        The loss, 0-dim float32: a mean over batch, classes and voxels.
    """

    def probabilities(x: Tensor) -> Tensor:
        return x.sigmoid() if regions else x.softmax(1)

    logits = [x.float() for x in logits]
    p = [probabilities(x) for x in logits]
    if temperature is None:
        return torch.stack([F.mse_loss(one, other) for one, other in combinations(p, 2)]).sum()
    targets = [probabilities(x / temperature) for x in logits]
    if detach_target:
        targets = [target.detach() for target in targets]
    pairs = permutations(range(len(p)), 2)
    return torch.stack([F.mse_loss(p[i], targets[j]) for i, j in pairs]).sum()


def segmentation_regression_consistency(regression: Tensor, sdm: Tensor, present: Tensor) -> Tensor:
    """L_src of Eq. 16 for one branch: the regression head gives the signed distance map of a segmentation.

    Args:
        regression: ``[B, K - 1, *spatial]`` output of the head after tanh, one map a foreground class, any float type.
        sdm: ``[B, K - 1, *spatial]`` of :func:`~nnunet_ssl.losses.sdm.signed_distance_maps`.
        present: ``[B, K - 1]`` bool of the same function, which maps have a boundary and count.

    Returns:
        The loss, 0-dim float32: a mean over the voxels of the maps that count; 0, with zero gradients, if none does.
    """
    error = (regression.float() - sdm).square().flatten(2).mean(2)  # maps are of one size: the mean of means is exact
    return masked_mean(error, present)


def dual_task_consistency(logits: Tensor, regression: Tensor, steepness: float, regions: bool = False) -> Tensor:
    """L_DTC of DTC: a regressed distance map, turned into a mask by a steep sigmoid, gives the segmentation.

    The mean of ``(sigmoid(-k z) - p)^2``, of which both sides have gradients. In fp32: with k = 1500 the product is
    coarse in half precision, and the sigmoid's slope underflows.

    Args:
        logits: ``[B, K, *spatial]`` of the segmentation, any float type.
        regression: z, ``[B, K - 1, *spatial]``, negative inside, one map a foreground class; of regions ``[B, K,
            *spatial]``.
        steepness: k.
        regions: whether the channels are regions, which overlap.

    Returns:
        The loss, 0-dim float32: a mean over batch, maps and voxels.
    """
    p = logits.float().sigmoid() if regions else logits.float().softmax(1)[:, 1:]
    return F.mse_loss((-steepness * regression.float()).sigmoid(), p)
