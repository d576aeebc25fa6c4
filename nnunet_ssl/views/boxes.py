"""Random boxes, as masks of a fixed shape: for CutMix and copy-paste."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

CUTMIX_SHARE = 0.02, 0.4  # of the patch, in the codes of UniMatch and MiDSS
ASPECT = 10 / 3  # the largest ratio of two sides, each as a share of its axis


def random_sides(
    rng: np.random.Generator, count: int, patch_size: tuple[int, ...], share: tuple[float, float]
) -> np.ndarray:
    """Sides of boxes that take a share of the patch, drawn uniformly, in random proportions.

    Proportions in which a box does not fit are drawn again, as CutMix does in the codes of UniMatch and MiDSS.

    Args:
        rng: on the host.
        count: of boxes.
        patch_size: voxels along each axis, 2D or 3D.
        share: the least and the largest, above 0 and below 1; rounding to voxels adds a little.

    Returns:
        ``[count, dim]`` int64, each from 1 to its axis.
    """
    dim = len(patch_size)
    shares = rng.uniform(*share, (count, 1))
    sides = np.full((count, dim), np.inf)
    while (too_long := (sides > 1).any(1)).any():
        proportions = rng.uniform(-0.5, 0.5, (count, dim)) * math.log(ASPECT)
        proportions = np.exp(proportions - proportions.mean(1, keepdims=True))
        sides[too_long] = (shares ** (1 / dim) * proportions)[too_long]
    return np.maximum((sides * patch_size).round().astype(np.int64), 1)


def random_boxes(
    rng: np.random.Generator, sides: np.ndarray, patch_size: tuple[int, ...], device: torch.device | str | None = None
) -> Tensor:
    """Boxes with these sides, anywhere in the patch.

    Args:
        rng: on the host.
        sides: ``[count, dim]`` voxels; a box with a side of 0 is empty.
        patch_size: voxels along each axis.
        device: of the mask.

    Returns:
        ``[count, 1, *patch_size]`` bool, True within the box.
    """
    first = rng.integers(0, np.asarray(patch_size) - sides + 1)
    ends = torch.from_numpy(np.stack([first, first + sides])).to(device or "cpu", non_blocking=True)
    mask = torch.ones((len(sides), 1, *[1] * len(patch_size)), dtype=torch.bool, device=device)
    for axis, length in enumerate(patch_size):
        begin, end = ends[:, :, axis, None]
        inside = torch.arange(length, device=device)
        inside = (inside >= begin) & (inside < end)  # [count, length]
        mask = mask & inside.view(len(sides), *[1] * (1 + axis), length, *[1] * (len(patch_size) - 1 - axis))
    return mask
