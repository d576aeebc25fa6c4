"""Labels with errors as a network makes them, for a denoising autoencoder to undo: AUSS's, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PROBABILITY = 0.5  # of each kind of error, for each image
RADII = 1, 4  # of the errors of shape, in voxels of the finest axis
SWAPPED = 0.1  # share of the voxels at boundaries
DISTANCES = 3, 8  # over which they are swapped


def with_errors(masks: Tensor, rng: np.random.Generator, spacing: Sequence[float], exclusive: bool = True) -> Tensor:
    """In some images one class shrinks, grows, or is opened or closed; in some, voxels at boundaries are swapped.

    Args:
        masks: of each class or region, ``[B, K, *spatial]`` bool.
        rng: on the host, says which errors; torch's generator says which voxels.
        spacing: of the spatial axes.
        exclusive: whether the channels are classes, background first: what one gains others lose, and what it loses
            becomes background.

    Returns:
        The same shape and dtype.
    """
    return torch.cat([_with_errors(image[None].float(), rng, spacing, exclusive) for image in masks]) > 0.5


def _with_errors(image: Tensor, rng: np.random.Generator, spacing: Sequence[float], exclusive: bool) -> Tensor:
    if rng.random() < PROBABILITY:
        radius = rng.integers(RADII[0], RADII[1], endpoint=True) * min(spacing) / np.asarray(spacing)
        k = _one_that_is_there(image[0], int(exclusive))
        old = image.index_select(1, k)
        new = ERRORS[rng.integers(len(ERRORS))](old, radius.round().astype(int).tolist())
        if exclusive:
            image = torch.where(new > old, 0.0, image)
            image[:, :1] += (old > new).float()
        image = image.index_copy(1, k, new)
    if rng.random() < PROBABILITY:
        image = _swapped(image, rng, spacing)
    return image


def _one_that_is_there(masks: Tensor, first: int) -> Tensor:
    """Of the channels ``[K, *spatial]`` from ``first`` one that is not empty, at random: ``[1]`` int64, on the device.

    Any, where all are empty.
    """
    there = masks[first:].flatten(1).amax(1)
    return (there * (1 - torch.rand_like(there))).argmax()[None] + first


def dilated(mask: Tensor, radius: Sequence[int]) -> Tensor:
    """The mask ``[B, C, *spatial]`` of 0 and 1, grown by a box of ``2 r + 1`` voxels along each axis."""
    pool = {2: F.max_pool2d, 3: F.max_pool3d}[len(radius)]
    for axis, r in enumerate(radius):
        along = [r if i == axis else 0 for i in range(len(radius))]
        mask = pool(mask, [2 * n + 1 for n in along], 1, along)
    return mask


def eroded(mask: Tensor, radius: Sequence[int]) -> Tensor:
    """The mask, shrunk; what it is beyond the patch is not known, and shrinks nothing."""
    return 1 - dilated(1 - mask, radius)


def opened(mask: Tensor, radius: Sequence[int]) -> Tensor:
    """Without what is narrower than the box."""
    return dilated(eroded(mask, radius), radius)


def closed(mask: Tensor, radius: Sequence[int]) -> Tensor:
    """With what is left between, where that is narrower than the box."""
    return eroded(dilated(mask, radius), radius)


ERRORS = dilated, eroded, opened, closed


def _swapped(image: Tensor, rng: np.random.Generator, spacing: Sequence[float]) -> Tensor:
    """Some voxels at boundaries change places with those a few voxels away, along the axes.

    As far in mm along each; along an axis of slices that are thicker than that, none do.
    """
    dim = image.ndim - 2
    edge = (dilated(image, [1] * dim) != eroded(image, [1] * dim)).any(1, keepdim=True)
    drawn = rng.integers(*DISTANCES, endpoint=True, size=(dim, 2)) * min(spacing) / np.asarray(spacing)[:, None]
    distances = np.minimum(drawn.round().astype(int), np.array(image.shape[2:])[:, None] - 1)
    moves = [(2 + i, sign * int(distances[i, j])) for i in range(dim) for j, sign in enumerate((-1, 1))]
    moves = [(axis, distance) for axis, distance in moves if distance]
    for axis, distance in moves:
        here = edge & (torch.rand(edge.shape, device=edge.device) < SWAPPED / len(moves))
        beyond = here.narrow(axis, 0 if distance < 0 else here.shape[axis] - distance, abs(distance))
        beyond.zero_()  # has nothing within the patch to change places with
        there = here.roll(distance, axis)
        of_there, of_here = image.roll(-distance, axis), image.roll(distance, axis)
        image = torch.where(here, of_there, torch.where(there, of_here, image))
    return image
