"""How many voxels a batch has of each class."""

from __future__ import annotations

import torch
from torch import Tensor


def class_counts(labels: Tensor, num_classes: int, valid: Tensor | None = None) -> Tensor:
    """The number of voxels of each class.

    One comparison a class: bincount would wait for the device, and adding to K places from millions of voxels is slow
    on a GPU. The counts are whole numbers until the end, so that they are exact beyond the 2^24 of float32.

    Args:
        labels: any shape, any integer type. Values outside ``0 .. num_classes - 1`` are not counted.
        num_classes: K, with background.
        valid: bool, shape of ``labels``: the voxels that count; None for all.

    Returns:
        ``[K]`` float32.
    """
    classes = [labels == c if valid is None else (labels == c) & valid for c in range(num_classes)]
    return torch.stack([of_class.sum() for of_class in classes]).float()
