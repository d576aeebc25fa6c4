"""MagicNet's cubes: cutting and putting back, exchange between images, their location, blended pseudo-labels.

Source: Chen, Bai, Shen, Li, Yu, Wang, "MagicNet: Semi-Supervised Multi-Organ Segmentation via Magic-Cube Partition and
Recovery" (CVPR 2023). One order of cubes holds in this whole file: row-major over their positions, the last axis
fastest, as ``torch.arange(N).reshape(counts)`` counts them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_ssl.losses.pseudo_labels import hard_pseudo_labels


def partition(x: Tensor, counts: Sequence[int]) -> Tensor:
    """Cut each image into ``N = prod(counts)`` cubes of equal size.

    Args:
        x: ``[B, C, *spatial]``, 2D or 3D (or any other number of axes).
        counts: cubes along each spatial axis; each divides its axis.

    Returns:
        ``[B, N, C, *cube]``, dtype of ``x``; cube n is the one at ``numpy.unravel_index(n, counts)``.

    Raises:
        ValueError: if an axis cannot be divided so.
    """
    spatial = x.shape[2:]
    if len(counts) != len(spatial) or any(length % n for length, n in zip(spatial, counts, strict=True)):
        raise ValueError(f"{tuple(spatial)} voxels cannot be cut into {tuple(counts)} equal cubes")
    split = [size for length, n in zip(spatial, counts, strict=True) for size in (n, length // n)]
    positions, voxels = range(2, 2 + len(split), 2), range(3, 3 + len(split), 2)
    return x.reshape(*x.shape[:2], *split).permute(0, *positions, 1, *voxels).flatten(1, len(counts))


def recover(cubes: Tensor, counts: Sequence[int]) -> Tensor:
    """Put cubes back to their places: the inverse of :func:`partition`.

    Args:
        cubes: ``[B, N, C, *cube]``.
        counts: cubes along each spatial axis, with product N.

    Returns:
        ``[B, C, *spatial]``, dtype of ``cubes``.

    Raises:
        ValueError: if there are not as many cubes as ``counts`` says.
    """
    dim, cube = len(counts), cubes.shape[3:]
    if cubes.shape[1] != math.prod(counts) or len(cube) != dim:
        raise ValueError(f"cubes of shape {tuple(cubes.shape)} are not {tuple(counts)} of each image")
    interleaved = [axis for d in range(dim) for axis in (1 + d, 2 + dim + d)]
    spatial = [n * size for n, size in zip(counts, cube, strict=True)]
    whole = cubes.unflatten(1, tuple(counts)).permute(0, 1 + dim, *interleaved)
    return whole.reshape(cubes.shape[0], cubes.shape[2], *spatial)


def fits(count: int, length: int, stride: int, padded: bool = False) -> bool:
    """Whether a network with a total stride can take in ``1 / count`` of an axis by itself.

    The cube's bottleneck must have two voxels along the axis, for instance normalization over one voxel is undefined.

    Args:
        count: cubes along the axis.
        length: voxels along the axis.
        stride: the network's total stride along the axis.
        padded: whether cubes are reflected up to the next multiple of ``stride``, see :func:`reflect_pad`.
    """
    cube, rest = divmod(length, count)
    return rest == 0 and (cube > stride if padded else cube % stride == 0 and cube >= 2 * stride)


def legal_counts(patch_size: Sequence[int], stride: Sequence[int]) -> list[int]:
    """The number of cubes along each axis: three if they fit, else two, else as many of reflected cubes, else one.

    Each axis is decided by itself: one that only reflected cubes suit takes nothing from the others.

    Args:
        patch_size: voxels along each axis.
        stride: total stride of the network that sees a cube by itself; ones where it sees whole images.

    Returns:
        Counts, each at most 3 as in the paper's default. One is always legal: it is the patch itself.
    """
    return [
        next((n for padded in (False, True) for n in (3, 2) if fits(n, length, s, padded)), 1)
        for length, s in zip(patch_size, stride, strict=True)
    ]


def reflect_pad(x: Tensor, multiple: Sequence[int]) -> Tensor:
    """Reflect at both ends of each axis, up to the next multiple; what is one already is left as it is.

    Args:
        x: ``[M, C, *spatial]``, 2D or 3D.
        multiple: for each axis, less than twice its length.

    Returns:
        ``[M, C, *padded]`` with ``x`` in the center: :func:`center_crop` gives it back.
    """
    pad: list[int] = []
    for length, m in zip(x.shape[2:], multiple, strict=True):
        missing = -length % m
        pad = [missing // 2, missing - missing // 2, *pad]  # torch's order: last axis first
    return F.pad(x, pad, mode="reflect") if any(pad) else x


def center_crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """The center of ``x`` ``[M, C, *spatial]``, of ``size`` voxels: a view."""
    for axis, length in enumerate(size, start=2):
        x = x.narrow(axis, (x.shape[axis] - length) // 2, length)
    return x


def random_order(num_images: int, num_cubes: int, device: torch.device | str | None = None) -> Tensor:
    """For each position of a cube a random permutation of the images, independent of the other positions'.

    Returns:
        int64 ``[num_images, num_cubes]``; each column is a permutation of the images.
    """
    return torch.rand(num_images, num_cubes, device=device).argsort(0)


def mix(cubes: Tensor, order: Tensor) -> Tensor:
    """Exchange cubes between images; each keeps its position: ``mixed[j, n] = cubes[order[j, n], n]``.

    Args:
        cubes: ``[B, N, C, *cube]``.
        order: of :func:`random_order`, ``[B, N]``.
    """
    return cubes[order, torch.arange(order.shape[1], device=order.device)]


def unmix(mixed: Tensor, order: Tensor) -> Tensor:
    """Give each cube back to the image that it came from: the inverse of :func:`mix`."""
    return mix(mixed, order.argsort(0))


def location_loss(logits: Tensor) -> Tensor:
    """Cross-entropy between where a cube was taken from and where it is thought to be, mean over cubes and images.

    Args:
        logits: ``[B, N, N]``; ``logits[b, n]`` are the scores of the N positions for cube n of :func:`partition`.

    Returns:
        0-dim float32.
    """
    positions = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
    return F.cross_entropy(logits.float().flatten(0, 1), positions.flatten())


def class_weights(counts: Tensor, temperature: float) -> Tensor:
    """omega of each class: its frequency relative to the most frequent class's, to the power of 1 / T_dist.

    Args:
        counts: ``[K]``, voxels of each class in recent pseudo-labels, up to a factor.
        temperature: T_dist.

    Returns:
        float32 ``[K]``; 1 for the most frequent class. All 0 while nothing has been counted.
    """
    counts = counts.float()
    return (counts / counts.max().clamp_min(torch.finfo(counts.dtype).tiny)) ** (1 / temperature)


@torch.no_grad()
def blended_pseudo_labels(teacher_logits: Tensor, teacher_labels: Tensor, cube_logits: Tensor, omega: Tensor) -> Tensor:
    """Hard pseudo-labels from the teacher's view of the whole patch and the student's view of its cubes.

    ``y = argmax (1 - omega(v)) t(v) + omega(v) o(v)``, where omega(v) belongs to the teacher's class at v: frequent
    classes rather from the cubes, rare ones rather from the teacher.

    Args:
        teacher_logits: t, ``[B, K, *spatial]``.
        teacher_labels: of :func:`~nnunet_ssl.losses.pseudo_labels.hard_pseudo_labels` for t, ``[B, 1, *spatial]``.
        cube_logits: o, ``[B, K, *spatial]``, the cubes of the same images back in their places.
        omega: of :func:`class_weights`, ``[K]``.

    Returns:
        int16 ``[B, 1, *spatial]``, a target for nnU-Net's losses. No gradient.
    """
    weight = omega[teacher_labels.int()]
    return hard_pseudo_labels(torch.lerp(teacher_logits.float(), cube_logits.float(), weight))
