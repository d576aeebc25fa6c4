"""The largest connected component of a mask: on a GPU without a wait, on a CPU by scipy."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor


def largest_components(masks: Tensor) -> Tensor:
    """Of each mask its largest component, voxels being connected through corners too.

    Args:
        masks: ``[B, K, *spatial]`` bool, 2D or 3D.

    Returns:
        ``[B, K, *spatial]`` bool, a part of the masks; an empty mask stays empty.
    """
    of_each = masks.flatten(0, 1)
    largest = by_scipy(of_each) if masks.device.type == "cpu" else by_pointers(of_each)
    return largest.view(masks.shape)


def by_scipy(masks: Tensor) -> Tensor:
    """:func:`largest_components` of masks ``[M, *spatial]`` on the host; the first of equals."""
    largest = torch.zeros_like(masks)
    everywhere = np.ones([3] * (masks.ndim - 1))
    for mask, part in zip(masks, largest, strict=True):
        labels, _ = ndimage.label(mask.numpy(), everywhere)
        sizes = np.bincount(labels.ravel())[1:]
        if len(sizes):
            part.copy_(torch.from_numpy(labels == 1 + sizes.argmax()))
    return largest


def by_pointers(masks: Tensor, rounds: int = 10) -> Tensor:
    """:func:`largest_components` of masks ``[M, *spatial]`` on any device.

    Every voxel points at a voxel of its component with a higher number, in the end all at the highest. In a round each
    tree of pointers is hung onto the highest voxel that any of its own is next to, and pointers are followed twice, so
    what is known to be connected grows exponentially. The number of rounds is fixed, since to ask whether all is done
    would wait for the device; a shape that needs more, such as a spiral of thousands of turns, falls apart.

    A GPU writes to one place one after the other, so only voxels that have something new to tell write to their root:
    the others, and those outside, address themselves.

    Source: after Shiloach and Vishkin, "An O(log n) parallel connectivity algorithm" (1982).
    """
    inside = masks.flatten(1)
    highest_around = F.max_pool2d if masks.ndim == 3 else F.max_pool3d
    exact = torch.float32 if inside.shape[1] < 2**24 else torch.float64  # integers cannot be pooled
    own = torch.arange(inside.shape[1], device=masks.device).expand(inside.shape)
    pointer = own.clone()
    for _ in range(rounds):
        seen = torch.where(inside, pointer, -1).to(exact).view(masks.shape)
        seen = highest_around(seen[:, None], kernel_size=3, stride=1, padding=1).flatten(1)
        seen = torch.where(inside, seen, -1).long()
        pointer = pointer.scatter_reduce(1, torch.where(seen > pointer, pointer, own), seen, "amax")
        for _ in range(2):
            pointer = pointer.gather(1, pointer)
    sizes = torch.zeros_like(pointer).scatter_add_(1, pointer, inside.long())
    return (inside & (pointer == sizes.max(1, keepdim=True).indices)).view(masks.shape)


def largest_of_each_class(labels: Tensor, num_classes: int, regions: bool = False) -> Tensor:
    """Labels of which each class keeps its largest component; the rest becomes background, class 0.

    Args:
        labels: ``[B, 1, *spatial]`` integer classes; of regions ``[B, K, *spatial]`` bool.
        num_classes: K, with background.
        regions: whether the channels are regions, each with a component of its own.

    Returns:
        Labels of the same shape and dtype.
    """
    if regions:
        return largest_components(labels)
    classes = torch.arange(1, num_classes, device=labels.device).view(1, -1, *[1] * (labels.ndim - 2))
    kept = largest_components(labels == classes).any(1, keepdim=True)
    return torch.where(kept, labels, 0)
