"""Mixes of two batches by masks: CutMix, and copy-paste in both directions. Labels move with their voxels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Patches(NamedTuple):
    """Images and what is known of them, labels or pseudo-labels."""

    images: Tensor  # [B, C, *patch]
    labels: Tensor  # [B, 1, *patch] classes, without the ignore label; of regions [B, K, *patch] bool
    counts: Tensor  # [B, 1, *patch] bool, where labels count; of regions [B, K, *patch] or [B, 1, *patch]


def labeled_patches(images: Tensor, target: Tensor, regions: bool = False, ignore_label: int | None = None) -> Patches:
    """Patches of nnU-Net's target, without its ignore label: what is ignored has class 0 and does not count.

    Args:
        images: ``[B, C, *patch]``.
        target: at full resolution, classes ``[B, 1, *patch]``; of regions ``[B, K, *patch]``, and one more channel for
            what is ignored if there is an ignore label.
        regions: whether the channels are regions.
        ignore_label: None where there is none.
    """
    if regions:
        of_regions = target.bool()
        if ignore_label is not None:
            return Patches(images, of_regions[:, :-1], ~of_regions[:, -1:])
        return Patches(images, of_regions, torch.ones_like(of_regions[:, :1]))
    if ignore_label is None:
        return Patches(images, target, torch.ones_like(target, dtype=torch.bool))
    counts = target != ignore_label
    return Patches(images, torch.where(counts, target, 0), counts)


def pasted(mask: Tensor, inside: Patches, outside: Patches) -> Patches:
    """``inside`` where the mask, bool ``[B, 1, *patch]``, holds, and elsewhere ``outside``, of the same shape."""
    return Patches(*(torch.where(mask, one, other) for one, other in zip(inside, outside, strict=True)))


def exchanged(mask: Tensor, one: Patches, other: Patches) -> tuple[Patches, Patches]:
    """Copy-paste in both directions: each with what the other has where the mask holds."""
    return pasted(mask, other, one), pasted(mask, one, other)


def rolled(patches: Patches) -> Patches:
    """Each image's partner in its batch: the one before it. A batch of one is its own partner."""
    return Patches(*(x.roll(1, 0) for x in patches))
