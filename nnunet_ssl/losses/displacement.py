"""ABD's cells: how sure two networks are of each, and which cell takes whose place.

Source: Chi, Pang, Zhang, Liu, Li, Wang, Dang, Liu, "Adaptive Bidirectional Displacement for Semi-Supervised Medical
Image Segmentation" (CVPR 2024), its code. Cells are in the order of :mod:`nnunet_ssl.losses.cubes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_ssl.losses.cubes import partition
from nnunet_ssl.losses.pseudo_labels import labels_and_confidence

TOP = 4  # one of so many cells is reliable: four of sixteen in the paper


def cell_counts(patch_size: Sequence[int], number: int = 16) -> list[int]:
    """Cells along each axis, as many as asked for where the patch can be halved so often, and as near to cubes.

    Args:
        patch_size: voxels along each axis.
        number: of cells, a power of 2.
    """
    counts = [1] * len(patch_size)
    while (left := [n // c for n, c in zip(patch_size, counts, strict=True) if n // c % 2 == 0]) and number > 1:
        axis = next(a for a, (n, c) in enumerate(zip(patch_size, counts, strict=True)) if n // c == max(left))
        counts[axis] *= 2
        number //= 2
    return counts


class CellScores(NamedTuple):
    """What a network says of each cell."""

    confidence: Tensor  # [B, N] float32, mean of the largest probability, of regions of the larger of p and 1 - p
    logits: Tensor  # [B, N, K] float32, their means


def cell_scores(logits: Tensor, counts: Sequence[int], regions: bool = False) -> CellScores:
    """Scores of each cell, without gradient.

    Args:
        logits: ``[B, K, *spatial]``.
        counts: cells along each axis.
        regions: whether the channels are regions.
    """
    logits = logits.detach().float()
    _, confidence = labels_and_confidence(logits.sigmoid() if regions else logits.softmax(1), regions)
    return CellScores(partition(confidence, counts).flatten(2).mean(2), partition(logits, counts).flatten(3).mean(3))


def divergence(logits: Tensor, others: Tensor, regions: bool = False) -> Tensor:
    """KL(p, q) of the probabilities of logits ``[..., K]`` to those of others; of regions the sum of binary ones."""
    if regions:
        p = logits.sigmoid()
        each = p * (F.logsigmoid(logits) - F.logsigmoid(others))
        each = each + (1 - p) * (F.logsigmoid(-logits) - F.logsigmoid(-others))
    else:
        each = logits.softmax(-1) * (logits.log_softmax(-1) - others.log_softmax(-1))
    return each.sum(-1)


def reliable_match(unsure: CellScores, other: CellScores, regions: bool = False) -> tuple[Tensor, Tensor]:
    """The cell of which a network is least sure, and what takes its place.

    Args:
        unsure: scores of that network.
        other: of the other one, on the other view.
        regions: whether the channels are regions.

    Returns:
        ``[B]`` int64 each: the cell; of the quarter of which the other is most sure, the one that says what is most
        like it.
    """
    cell = unsure.confidence.argmin(1)
    sure = other.confidence.topk(max(1, other.confidence.shape[1] // TOP), 1).indices
    wanted = take(unsure.logits, cell)[:, None]
    candidates = other.logits.gather(1, sure[..., None].expand(-1, -1, other.logits.shape[2]))
    nearest = divergence(wanted, candidates, regions).argmin(1, keepdim=True)
    return cell, sure.gather(1, nearest)[:, 0]


def take(cells: Tensor, index: Tensor) -> Tensor:
    """Cell ``index[b]`` of each image: ``[B, N, ...]`` and ``[B]`` -> ``[B, ...]``."""
    return cells[torch.arange(len(cells), device=cells.device), index]


def put(cells: Tensor, index: Tensor, new: Tensor, where: Tensor | None = None) -> Tensor:
    """Cells with ``new[b]`` in the place ``index[b]`` of each image, of those that ``where`` holds for.

    Args:
        cells: ``[B, N, ...]``, left as they are.
        index: ``[B]`` int64.
        new: ``[B, ...]``.
        where: ``[B]`` bool; None for all.
    """
    here = index[:, None] == torch.arange(cells.shape[1], device=cells.device)
    if where is not None:
        here = here & where[:, None]
    return torch.where(here.view(*here.shape, *[1] * (cells.ndim - 2)), new[:, None], cells)
