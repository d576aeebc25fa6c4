"""Signed distance maps of the classes of a label map, exact, on any device.

Source: the SASNet paper, the target of its regression heads (Eq. 16); normalized as in the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import edt
import torch
from torch import Tensor

_FAR = 1e15  # steps to "no such voxel": its square stays finite in float32, and finite costs may be added to it
_BLOCK = 8  # source planes per reduction of the lower envelope
_CHUNK_BYTES = 128 * 2**20  # intermediate sums at a time


@torch.no_grad()
def signed_distance_maps(
    labels: Tensor, num_classes: int, spacing: Sequence[float] | None = None, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Distance to the boundary of each class, scaled to [-1, 1] per sample: negative inside, positive outside.

    ``dist_out / max(dist_out) - dist_in / max(dist_in)`` with the exact Euclidean distances of voxels outside to the
    class and of its own voxels to any other class (between voxel centers), and 0 on the inner boundary: voxels of the
    class with a face neighbor within the image that is not of it. What lies beyond the image is unknown, not another
    class.

    A class that is absent gives zeros everywhere, as in the authors' code. So does one that fills the image, which has
    no boundary either (scipy's distance transform, which the authors call, is undefined there).

    Args:
        labels: ``[B, *spatial]`` integers from 0 to K - 1, or a bool mask with K = 2; 2D or 3D, on any device. Nothing
            leaves the device, and nothing waits for it.
        num_classes: K, with class 0, the background, which gets no map.
        spacing: distance between voxels along each axis, in any one unit (only ratios matter); None for voxel units.
        compiled: whether to use ``torch.compile``, which saves nearly all of the memory traffic and changes no bit.
            Nothing to labels on the CPU.

    Returns:
        The maps, ``[B, K - 1, *spatial]`` float32, and which of them have a boundary, ``[B, K - 1]`` bool; both on the
        device of ``labels``, without gradient.

    Raises:
        ValueError: if ``labels`` is not a batch of 2D or 3D label maps, or ``spacing`` does not fit it.
    """
    dim = labels.ndim - 1
    if labels.is_floating_point() or dim not in (2, 3):
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}; they must be integer or bool [B, *spatial] in 2D or 3D"
        )
    spacing = [1.0] * dim if spacing is None else [float(s) for s in spacing]
    if len(spacing) != dim or not all(0 < s < math.inf for s in spacing):
        raise ValueError(f"spacing is {spacing}; it must be {dim} positive numbers")

    step = [s / max(spacing) for s in spacing]  # the common scale cancels, so it need not fit into float32 squared
    classes = labels[:, None] == torch.arange(num_classes, device=labels.device).view(-1, *[1] * dim)
    masks = classes[:, 1:]
    present = masks.flatten(2).any(2) & ~masks.flatten(2).all(2)
    if labels.numel() == 0:
        return torch.zeros_like(masks, dtype=torch.float32), present

    if labels.device.type == "cpu":
        signed = _distance_on_cpu(masks, present, step)
    else:
        signed = _distance(classes, step, compiled)
    deepest, farthest = (x.view(*present.shape, *[1] * dim) for x in signed.flatten(2).aminmax(dim=2))
    sdm = signed / torch.where(masks, -deepest, farthest)
    inner_boundary = masks & _differs_from_neighbor(labels)[:, None]
    return sdm.masked_fill_(inner_boundary | ~present.view(*present.shape, *[1] * dim), 0), present


def _differs_from_neighbor(labels: Tensor) -> Tensor:
    """Voxels with a face neighbor, within the image, of another class: bool, as ``labels``."""
    differs = torch.zeros_like(labels, dtype=torch.bool)
    for axis in range(1, labels.ndim):
        n = labels.shape[axis] - 1
        pairs = labels.narrow(axis, 0, n) != labels.narrow(axis, 1, n)
        differs.narrow(axis, 0, n).logical_or_(pairs)
        differs.narrow(axis, 1, n).logical_or_(pairs)
    return differs


def _distance_on_cpu(masks: Tensor, present: Tensor, step: Sequence[float]) -> Tensor:
    """As :func:`_distance`, by the edt library, of foreground classes; 1 or -1 where the map has no boundary."""
    signed = torch.ones(masks.shape)
    sides = masks.to(torch.uint8, memory_format=torch.contiguous_format).add_(1).numpy()
    for b, k in present.nonzero().tolist():
        # With labels 1 and 2 one pass measures both sides: edt gives the distance to the nearest other label.
        one = edt.edt(sides[b, k], anisotropy=tuple(step), black_border=False, parallel=torch.get_num_threads())
        signed[b, k] = torch.from_numpy(one)
    return torch.where(masks, -signed, signed)


def _distance(classes: Tensor, step: Sequence[float], compiled: bool = False) -> Tensor:
    """Of ``[B, K, *spatial]``, one-hot, the distance of each voxel to the other side of each class but the first.

    Negative inside.

    Outside a class that is the distance to it. Inside, it is the least of the distances to the others: one map for all
    classes.

    Axis by axis: along the first, the nearest voxel comes from two running indices; along each other one, the squared
    distance is the lower envelope ``min_j f(j) + (i - j)^2`` of all parabolas. In torch alone, for any device.
    """
    sources = classes.flatten(0, 1)
    axes = sorted(range(1, sources.ndim), key=lambda axis: -sources.shape[axis])  # the cheap way along the longest
    # Patches are of one size, so each axis is one graph.
    least_of_sums = torch.compile(_least_of_sums, dynamic=False) if compiled else _least_of_sums_in_blocks
    maps_at_once = max(1, _CHUNK_BYTES // (_BLOCK * 4 * sources[0].numel()))
    to_class = torch.empty(classes.shape, device=classes.device)
    for part, target in zip(sources.split(maps_at_once), to_class.flatten(0, 1).split(maps_at_once), strict=True):
        squared = (_nearest_on_line(part, axes[0]) * step[axes[0] - 1]).square_()
        for axis in axes[1:]:
            if squared.shape[axis] > 1:
                squared = _lower_envelope(squared, axis, step[axis - 1], least_of_sums)
        torch.sqrt(squared, out=target)
    to_another = to_class.masked_fill(classes, math.inf).amin(1, keepdim=True)
    return torch.where(classes[:, 1:], -to_another, to_class[:, 1:])


def _nearest_on_line(sources: Tensor, axis: int) -> Tensor:
    """Steps along ``axis`` to the nearest source voxel, at least ``_FAR`` - n where the line has none."""
    n = sources.shape[axis]
    index = torch.arange(n, dtype=torch.float32, device=sources.device).view(-1, *[1] * (sources.ndim - 1 - axis))
    before = torch.where(sources, index, -_FAR).cummax(axis).values
    after = torch.where(sources, index, _FAR).flip(axis).cummin(axis).values.flip(axis)
    return torch.minimum(index - before, after - index)


def _lower_envelope(f: Tensor, axis: int, step: float, least_of_sums: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``min_j f(j) + (step (i - j))^2`` along ``axis``."""
    n = f.shape[axis]
    index = torch.arange(n, dtype=torch.float32, device=f.device) * step
    cost = (index[:, None] - index).square_()  # a table, so that no compiler contracts its product with the sum
    lines = f.reshape(math.prod(f.shape[:axis]), n, -1)
    return least_of_sums(lines, cost).view(f.shape)


def _least_of_sums(f: Tensor, cost: Tensor) -> Tensor:
    """``min_j f[a, j, b] + cost[j, i]``, ``[a, i, b]``; to be compiled, for otherwise all sums are held at once."""
    return (f[:, :, None] + cost[:, :, None]).amin(1)


def _least_of_sums_in_blocks(f: Tensor, cost: Tensor) -> Tensor:
    """The same, a few j at a time: less traffic than one by one."""
    n = f.shape[1]
    sums = f.new_empty(min(n, _BLOCK), *f.shape)
    least = torch.full_like(f, math.inf)
    lines = f.movedim(1, 0)[:, :, None]  # [j, a, 1, b]
    for line, c in zip(lines.split(_BLOCK), cost[:, None, :, None].split(_BLOCK), strict=True):
        torch.minimum(least, torch.add(line, c, out=sums[: len(line)]).amin(0), out=least)
    return least
