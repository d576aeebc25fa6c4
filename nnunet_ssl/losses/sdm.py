"""The signed distance map of a mask, exact, on any device.

Source: the SASNet paper, the target of its regression heads (Eq. 16); normalised as in the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import edt
import torch
from torch import Tensor

_FAR = 1e15  # steps to "no such voxel": its square stays finite in float32, and finite costs may be added to it
_BLOCK = 8  # source planes per reduction of the lower envelope
_CHUNK_BYTES = 64 * 2**20  # intermediate sums at a time: about what the cache of a GPU holds


@torch.no_grad()
def signed_distance_map(mask: Tensor, spacing: Sequence[float] | None = None) -> Tensor:
    """Distance to the other side of the boundary, scaled to [-1, 1] per sample: negative inside, positive outside.

    ``dist_out / max(dist_out) - dist_in / max(dist_in)`` with the exact Euclidean distances of background voxels to
    the mask and of mask voxels to the background (between voxel centres), and 0 on the inner boundary: mask voxels
    with a face neighbour within the image that is not in the mask. What lies beyond the image is unknown, not
    background.

    An empty mask gives zeros everywhere, as in the authors' code. So does a full one, which has no boundary either
    (scipy's distance transform, which the authors call, is undefined there). :func:`has_boundary` tells which are
    meant.

    Args:
        mask: ``[B, *spatial]`` bool, 2D or 3D, on any device. Nothing leaves the device, and nothing waits for it.
        spacing: distance between voxels along each axis, in any one unit (only ratios matter); None for voxel units.

    Returns:
        ``[B, *spatial]`` float32 on the device of ``mask``, without gradient.

    Raises:
        ValueError: if ``mask`` is not a batch of 2D or 3D bool masks, or ``spacing`` does not fit it.
    """
    dim = mask.ndim - 1
    if mask.dtype != torch.bool or dim not in (2, 3):
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}; it must be bool [B, *spatial] in 2D or 3D")
    spacing = [1.0] * dim if spacing is None else [float(s) for s in spacing]
    if len(spacing) != dim or not all(0 < s < math.inf for s in spacing):
        raise ValueError(f"spacing is {spacing}; it must be {dim} positive numbers")
    if mask.numel() == 0:
        return torch.zeros_like(mask, dtype=torch.float32)

    step = [s / max(spacing) for s in spacing]  # the common scale cancels, so it need not fit into float32 squared
    distance = _distance_on_cpu(mask, step) if mask.device.type == "cpu" else _distance(mask, step)
    axes = list(range(1, dim + 1))
    farthest_in = distance.masked_fill(~mask, 0).amax(axes, keepdim=True)
    farthest_out = distance.masked_fill(mask, 0).amax(axes, keepdim=True)
    sdm = distance / torch.where(mask, -farthest_in, farthest_out)
    return sdm.masked_fill_(_inner_boundary(mask) | ~has_boundary(mask).view(-1, *[1] * dim), 0)


def has_boundary(mask: Tensor) -> Tensor:
    """Whether each mask ``[B, *spatial]`` is neither empty nor full: bool ``[B]``."""
    flat = mask.flatten(1)
    return flat.any(1) & ~flat.all(1)


def _inner_boundary(mask: Tensor) -> Tensor:
    """Voxels of the mask with a face neighbour, within the image, that is not in it: bool, as ``mask``."""
    boundary = torch.zeros_like(mask)
    for axis in range(1, mask.ndim):
        n = mask.shape[axis] - 1
        before, after = mask.narrow(axis, 0, n), mask.narrow(axis, 1, n)
        boundary.narrow(axis, 0, n).logical_or_(before & ~after)
        boundary.narrow(axis, 1, n).logical_or_(after & ~before)
    return boundary


def _distance_on_cpu(mask: Tensor, step: Sequence[float]) -> Tensor:
    """As :func:`_distance`, by the edt library; 1 instead of a large distance for a map of one value."""
    distance = torch.ones(mask.shape)
    labels = mask.to(torch.uint8, memory_format=torch.contiguous_format).add_(1).numpy()
    for b in has_boundary(mask).nonzero().flatten().tolist():
        # With labels 1 and 2 one pass measures both sides: edt gives the distance to the nearest other label.
        one = edt.edt(labels[b], anisotropy=tuple(step), black_border=False, parallel=torch.get_num_threads())
        distance[b] = torch.from_numpy(one)
    return distance


def _distance(mask: Tensor, step: Sequence[float]) -> Tensor:
    """The distance of each voxel to the nearest one of the other value, ``[B, *spatial]`` float32.

    Axis by axis: along the first, the nearest voxel comes from two running indices; along each other one, the squared
    distance is the lower envelope ``min_j f(j) + (i - j)^2`` of all parabolas. In torch alone, for any device.
    """
    axes = sorted(range(2, mask.ndim + 1), key=lambda axis: -mask.shape[axis - 1])  # the cheap way along the longest
    maps_at_once = max(1, _CHUNK_BYTES // (_BLOCK * 2 * 4 * mask[0].numel()))
    distance = torch.empty(mask.shape, device=mask.device)
    for part, target in zip(mask.split(maps_at_once), distance.split(maps_at_once), strict=True):
        sources = torch.stack((part, ~part))  # [2, b, *spatial]: distance to the mask, distance to the background
        squared = (_nearest_on_line(sources, axes[0]) * step[axes[0] - 2]).square_()
        for axis in axes[1:]:
            if squared.shape[axis] > 1:
                squared = _lower_envelope(squared, axis, step[axis - 2])
        target.copy_(torch.where(part, squared[1], squared[0])).sqrt_()
    return distance


def _nearest_on_line(sources: Tensor, axis: int) -> Tensor:
    """Steps along ``axis`` to the nearest source voxel, at least ``_FAR`` - n where the line has none."""
    n = sources.shape[axis]
    index = torch.arange(n, dtype=torch.float32, device=sources.device).view(-1, *[1] * (sources.ndim - 1 - axis))
    before = torch.where(sources, index, -_FAR).cummax(axis).values
    after = torch.where(sources, index, _FAR).flip(axis).cummin(axis).values.flip(axis)
    return torch.minimum(index - before, after - index)


def _lower_envelope(f: Tensor, axis: int, step: float) -> Tensor:
    """``min_j f(j) + (step (i - j))^2`` along ``axis``, a few j at a time: less traffic than one by one."""
    n = f.shape[axis]
    index = torch.arange(n, dtype=torch.float32, device=f.device) * step
    cost = (index[:, None] - index).square_()  # [j, i]
    cost = cost.view(n, *[1] * axis, n, *[1] * (f.ndim - 1 - axis))
    lines = f.movedim(axis, 0).unsqueeze(axis + 1)  # [j, ..., 1, ...], the 1 in the place of i
    sums = f.new_empty(min(n, _BLOCK), *f.shape)
    envelope = torch.full_like(f, math.inf)
    for line, c in zip(lines.split(_BLOCK), cost.split(_BLOCK), strict=True):
        torch.minimum(envelope, torch.add(line, c, out=sums[: len(line)]).amin(0), out=envelope)
    return envelope
