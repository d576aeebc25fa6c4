"""URPC: the consistency of one network's predictions at several resolutions, rectified by their uncertainty.

Source: Luo et al., "Efficient Semi-Supervised Gross Target Volume of Nasopharyngeal Carcinoma Segmentation via
Uncertainty Rectified Pyramid Consistency" (MICCAI 2021), and the authors' code (SSL4MIS), which the equations below
follow; E1 to E4 number what it computes:

    E1  pbar  = 1/S sum_s p_s                                       p_s: probabilities of scale s at full resolution
    E2  KL_s  = sum_c pbar log(pbar / p_s),   W_s = exp(-KL_s)      a map each
    E3  L_s   = mean[(pbar - p_s)^2 W_s] / (mean[W_s] + 1e-8) + mean[KL_s]
    E4  L     = 1/S sum_s L_s

The means are over samples and voxels, the mean of the square also over classes. Gradients flow through all of it: pbar,
W_s and KL_s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def uncertainty_rectified_consistency(
    logits: Sequence[Tensor],
    kl: Literal["mean_to_scale", "scale_to_mean"],
    detach_mean: bool = False,
    regions: bool = False,
) -> Tensor:
    """How far the scales are from their mean, where they are sure (E1 to E4), in fp32 regardless of autocast.

    Args:
        logits: one a scale, ``[B, K, *spatial]`` each, 2D or 3D, full resolution first. Coarser ones are interpolated
            to the size of the first.
        kl: ``"mean_to_scale"`` is KL(pbar || p_s), E2, as the authors' code has it; ``"scale_to_mean"`` is
            KL(p_s || pbar), as their paper writes it.
        detach_mean: pbar gets no gradient anywhere, as if it came from a teacher: neither in the square nor in W_s nor
            in KL_s.
        regions: the channels are overlapping regions, each with a sigmoid: KL_s is the sum of the channels' binary
            divergences, the square is the mean over channels.

    Returns:
        0-dim float32; 0 where all scales agree.

    Raises:
        ValueError: for fewer than two scales.
    """
    if len(logits) < 2:
        raise ValueError(f"{len(logits)} scale given; a consistency needs two")
    log_mean = _once_more_in_backward(_log_mean, regions, *logits)
    if detach_mean:
        log_mean = log_mean.detach()
    return torch.stack([_once_more_in_backward(_scale_loss, x, log_mean, kl, regions) for x in logits]).mean()  # E4


def _once_more_in_backward(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Compute without keeping what is inside: each of the dozen maps is as large as the full-resolution logits."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _log_probabilities(scale: Tensor, size: torch.Size, regions: bool) -> Tensor:
    """log p_s, ``[B, K, *spatial]``. With regions, inside and outside of each are two classes: 2 K channels."""
    scale = _resize(scale.float(), size)
    return torch.cat([F.logsigmoid(scale), F.logsigmoid(-scale)], 1) if regions else scale.log_softmax(1)


def _log_mean(regions: bool, *logits: Tensor) -> Tensor:
    """log pbar, E1."""
    size = logits[0].shape[2:]
    total = _log_probabilities(logits[0], size, regions)
    for scale in logits[1:]:
        total = torch.logaddexp(total, _log_probabilities(scale, size, regions))
    return total - math.log(len(logits))


def _scale_loss(scale: Tensor, log_mean: Tensor, kl: str, regions: bool) -> Tensor:
    """L_s, E2 and E3. With regions the square is the same for inside and outside, so its mean is too."""
    log_p = _log_probabilities(scale, log_mean.shape[2:], regions)
    mean, p, log_ratio = log_mean.exp(), log_p.exp(), log_mean - log_p
    divergence = (mean * log_ratio if kl == "mean_to_scale" else -p * log_ratio).sum(1)  # E2, [B, *spatial]
    certainty = torch.exp(-divergence)
    square = (mean - p).square().mean(1)
    return (square * certainty).mean() / (certainty.mean() + 1e-8) + divergence.mean()  # E3


def _resize(logits: Tensor, size: torch.Size) -> Tensor:
    """Linear interpolation; to a size and not by a factor, since strides differ between axes."""
    if logits.shape[2:] == size:
        return logits
    return F.interpolate(logits, size, mode="trilinear" if len(size) == 3 else "bilinear", align_corners=False)
