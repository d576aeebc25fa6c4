"""Hard pseudo-labels, in the form of target that nnU-Net's own losses take."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def likeliest_class(scores: Tensor) -> Tensor:
    """The argmax over the classes, the first of equals; where a score is NaN, the first NaN.

    By ``max``, which on a CPU is several times faster than ``argmax`` over an axis that is not the last.

    Args:
        scores: ``[B, K, *spatial]``, any float type.

    Returns:
        ``[B, 1, *spatial]`` int64.
    """
    return scores.max(1, keepdim=True).indices


@torch.no_grad()
def hard_pseudo_labels(logits: Tensor, has_regions: bool = False, has_ignore_label: bool = False) -> Tensor:
    """The hard decision of a network, as a target for nnU-Net's losses.

    Args:
        logits: ``[B, K, *spatial]``, before softmax (classes) or sigmoid (regions).
        has_regions: whether the K channels are overlapping regions rather than exclusive classes.
        has_ignore_label: whether nnU-Net's region loss expects one more channel that marks ignored voxels. A
            pseudo-label ignores nothing, so that channel is empty.

    Returns:
        For classes ``[B, 1, *spatial]`` int16, as nnU-Net's targets: the argmax, never the ignore label. For regions
        ``[B, K, *spatial]`` bool (``K + 1`` channels with an ignore label), probability above 0.5. No gradient.
    """
    if not has_regions:
        return likeliest_class(logits).to(torch.int16)
    regions = logits > 0  # sigmoid(x) > 0.5
    if has_ignore_label:
        regions = torch.cat([regions, torch.zeros_like(regions[:, :1])], 1)
    return regions


def labels_and_confidence(prob: Tensor, regions: bool = False) -> tuple[Tensor, Tensor]:
    """The hard decision of probabilities, and how sure it is.

    Args:
        prob: ``[B, K, *spatial]``.
        regions: whether the channels are regions, each with a decision of its own.

    Returns:
        Labels ``[B, 1, *spatial]`` int16 and the largest probability; of regions labels ``[B, K, *spatial]`` bool,
        probability above 0.5, and the larger of p and 1 - p.
    """
    if regions:
        return prob > 0.5, torch.maximum(prob, 1 - prob)
    confidence, labels = prob.max(1, keepdim=True)
    return labels.to(torch.int16), confidence


def cross_entropy_map(logits: Tensor, labels: Tensor, regions: bool = False) -> Tensor:
    """Cross-entropy of each voxel, of regions of each voxel and region, in fp32.

    Args:
        logits: ``[B, K, *spatial]``.
        labels: ``[B, 1, *spatial]`` integer classes below K; of regions ``[B, K, *spatial]``.
        regions: whether the channels are regions.

    Returns:
        ``[B, 1, *spatial]`` float32, of regions ``[B, K, *spatial]``.
    """
    logits = logits.float()
    if regions:
        return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
    return F.cross_entropy(logits, labels[:, 0].long(), reduction="none")[:, None]


def pseudo_label_cross_entropy(logits: Tensor, labels: Tensor, has_regions: bool = False) -> Tensor:
    """Cross-entropy with pseudo-labels, the mean over all voxels (and regions), in fp32.

    Args:
        logits: ``[B, K, *spatial]``.
        labels: of :func:`hard_pseudo_labels`.
        has_regions: whether channels are regions, each with a binary cross-entropy.

    Returns:
        0-dim float32.
    """
    logits = logits.float()
    if has_regions:
        return F.binary_cross_entropy_with_logits(logits, labels[:, : logits.shape[1]].float())
    return F.cross_entropy(logits, labels[:, 0].long())
