"""nnU-Net's affine resampling on a GPU: as ``SpatialTransform``, without asking the GPU for a value.

Where voxels of a patch lie follows from Python's numbers, so no matrix has to reach the device. Labels are resampled
one by one, all that there may be: which of them a patch shows is on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

# SpatialTransform multiplies scores of labels with this and rounds them to half precision, and so finds ties
FULL_SCORE = 1000


def reach(affine: Sequence[Sequence[float]], patch_size: Sequence[int]) -> list[float]:
    """How far from its center a resampled patch takes voxels from, along each axis of what it is taken from.

    ``affine`` is dim x dim, from positions in the patch to positions in its source, both from the center, in voxels.
    """
    return [
        sum(abs(factor) * (n - 1) / 2 for factor, n in zip(row, patch_size, strict=True)) + 1  # and interpolates there
        for row in affine
    ]


def sampling_grid(
    affine: Sequence[Sequence[float]], patch_size: Sequence[int], source_shape: Sequence[int], device: torch.device
) -> Tensor:
    """Where each voxel of a patch is taken from, as ``grid_sample`` wants it.

    Args:
        affine: as for :func:`reach`.
        patch_size, source_shape: in voxels; their centers coincide.

    Returns:
        float32 ``[*patch, dim]``, last axis first, from -1 to 1.
    """
    dim = len(patch_size)
    axes = [
        torch.linspace((1 - n) / 2, (n - 1) / 2, n, device=device).view(*[-1 if a == i else 1 for a in range(dim)])
        for i, n in enumerate(patch_size)
    ]
    positions = [
        functools.reduce(torch.add, (factor * axis for factor, axis in zip(row, axes, strict=True))) / (n / 2)
        for row, n in zip(affine, source_shape, strict=True)
    ]
    return torch.stack(positions[::-1], -1)


def resample_image(image: Tensor, grid: Tensor) -> Tensor:
    """Interpolate ``[C, *source]`` float32 linearly at a grid ``[*patch, dim]`` of its axes, with zeros outside."""
    return grid_sample(image[None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=False)[0]


def resample_labels(segmentation: Tensor, grid: Tensor, labels: Sequence[int], outside: int) -> Tensor:
    """The label with the highest linearly interpolated score; of equal ones the nearest voxel's, else the lowest.

    Args:
        segmentation: integers ``[C, *source]``.
        grid: as for :func:`resample_image`.
        labels: all that ``segmentation`` may hold, in ascending order, ``outside`` among them.
        outside: the label of what lies outside of the segmentation.

    Returns:
        ``[C, *patch]`` of ``segmentation``'s type.
    """

    def sample(values: Tensor, mode: str) -> Tensor:  # with zeros outside
        return grid_sample(values[None], grid[None], mode=mode, padding_mode="zeros", align_corners=False)[0]

    nearest = (sample(segmentation.float() - outside, "nearest") + outside).to(segmentation.dtype)
    winner = torch.full_like(nearest, labels[0])
    best = score_of_nearest = torch.full_like(nearest, -torch.inf, dtype=torch.float16)
    for label in labels:
        indicator = (segmentation == label).float()
        score = sample(indicator - 1, "bilinear") + 1 if label == outside else sample(indicator, "bilinear")
        score = (score * FULL_SCORE).half()
        winner.masked_fill_(score > best, label)
        best = torch.maximum(best, score)
        score_of_nearest = torch.where(nearest == label, score, score_of_nearest)
    return torch.where(score_of_nearest == best, nearest, winner)
