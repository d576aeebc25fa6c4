"""View variance of SASNet (section 3.3, Eq. 9 to 11): patches seen from other sides, in nnU-Net's workers.

The paper rotates the spectrum of the image by an angle theta and transforms it back. Its released code transposes two
axes of the spectrum instead. Both are here, as transforms of batchgeneratorsv2 for one sample.

Transposing the spectrum is transposing the image. The exponent of the DFT, ``sum_a k_a x_a / N_a``, is a sum with one
term an axis; it does not change when k, x and N are permuted together, so the DFT commutes with every permutation of
axes. No Fourier transform is needed for it: :func:`view_transform` takes batchgeneratorsv2's own transposition.

A rotation by theta is :class:`FrequencyRotation`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.transpose import TransposeAxesTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from scipy.fft import next_fast_len
from torch import Tensor

from nnunet_ssl.errors import UserError

SAME_SPACING = 1e-3  # relative; spacings that differ by less come from rounding in file headers


def interchangeable_axes(patch_size: Sequence[int], spacing: Sequence[float]) -> tuple[int, ...]:
    """The largest group of axes that a permutation may mix: equal patch size and equal spacing.

    Args:
        patch_size: voxels along each axis.
        spacing: mm a voxel along each axis.

    Returns:
        Ascending axes, two or more; empty if no two fit.
    """
    pairs = [(a, b) for a, b in rotation_planes(spacing) if patch_size[a] == patch_size[b]]
    groups = [(first, *(b for a, b in pairs if a == first)) for first in range(len(patch_size))]
    largest = max(groups, key=len)
    return largest if len(largest) > 1 else ()


def rotation_planes(spacing: Sequence[float]) -> tuple[tuple[int, int], ...]:
    """Pairs of axes with equal spacing. A rotation of voxels in another plane would distort the anatomy.

    Args:
        spacing: mm a voxel along each axis.
    """
    return tuple(
        (a, b)
        for a, b in combinations(range(len(spacing)), 2)
        if math.isclose(spacing[a], spacing[b], rel_tol=SAME_SPACING)
    )


def rotate_in_frequency(image: Tensor, degrees: float, plane: tuple[int, int]) -> Tensor:
    """Rotate an image through its spectrum (Eq. 9 to 11), about the center ``(n - 1) / 2`` of the patch.

    For a rotation R, ``FT{f(R x)}(k) = (FT f)(R k)``: an image is rotated by rotating its spectrum. To look a sampled
    spectrum up between its samples would multiply the image by the transform of the interpolation kernel and fold
    copies of it in. So the spectrum is not interpolated but sheared, three times, since a rotation is the product of
    three shears. ``f(u + t v, v)`` has the spectrum ``F(ku, kv - t ku)``, again a shear, and one that is exact on
    samples: each line along u is shifted by a phase ramp ``exp(-2 pi i k shift)`` on its own 1-D spectrum.

    Angles beyond 45 degrees take quarter turns first, which are exact. A shear pads the lines that it shifts with
    zeros, by as much as it shifts them, so nothing wraps around; what comes from outside the patch is zero. As with any
    band-limited interpolation, edges ring, the patch's own border included.

    Methods: Unser, Thevenaz, Yaroslavsky, Convolution-based interpolation for fast, high-quality rotation of images,
    IEEE TIP 4(10), 1995; Larkin, Oldfield, Klemm, Fast Fourier method for the accurate rotation of sampled images,
    Optics Communications 139, 1997.

    Args:
        image: ``[C, *spatial]``, float32 or float64.
        degrees: positive turns ``plane[0]`` towards ``plane[1]``, as ``torch.rot90`` does.
        plane: two spatial axes, numbered from 0.

    Returns:
        The same shape and type, real.

    Raises:
        ValueError: if a turn by 90 degrees would put voxels between voxels: beyond 45 degrees, one axis of the plane is
            even and the other odd.
    """
    return _rotate(image, degrees, plane, _rotate_by_shears)


def rotate_in_space(
    values: Tensor, degrees: float, plane: tuple[int, int], mode: Literal["nearest", "bilinear"]
) -> Tensor:
    """The same rotation for what must not ring: nearest neighbor or linear interpolation, zero outside.

    Args:
        values: ``[C, *spatial]`` of any type; ``"bilinear"`` wants a float type.
        degrees: see :func:`rotate_in_frequency`.
        plane: see :func:`rotate_in_frequency`.
        mode: ``"nearest"`` keeps labels exact, ``"bilinear"`` anything that is an affine function of the position.

    Returns:
        The same shape and type.

    Raises:
        ValueError: see :func:`rotate_in_frequency`.
    """

    def rest(planes: Tensor, angle: float) -> Tensor:
        return _rotate_by_sampling(planes, angle, mode)

    return _rotate(values, degrees, plane, rest)


class FrequencyRotation(BasicTransform):
    """Rotates a sample by a random angle in a random plane, the image through its spectrum.

    Labels cannot be band-limited, they would ring. So the segmentation takes the same rotation in space, by nearest
    neighbor, and so does the regression target, linearly: source coordinates are an affine function of the
    position, which linear interpolation keeps exact. Outside the patch its validity channel is 0, and within half
    a voxel of the border between 0 and 1, as after nnU-Net's own spatial transform.

    Draws from ``np.random``. Angles are uniform in ``[-max_angle, max_angle]``, planes equally likely.

    Args:
        planes: pairs of spatial axes, numbered from 0; see :func:`rotation_planes`.
        max_angle: degrees, above 0.
        outside: the label of what comes from outside the patch: the ignore label where there is one, since nobody has
            annotated it.

    Raises:
        ValueError: if there is no plane.
    """

    def __init__(self, planes: Sequence[tuple[int, int]], max_angle: float, outside: int = 0) -> None:
        super().__init__()
        if not planes:
            raise ValueError("there is no plane to rotate in")
        self.planes = tuple(planes)
        self.max_angle = max_angle
        self.outside = outside

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        """Draw the angle and the plane."""
        return {
            "degrees": np.random.uniform(-self.max_angle, self.max_angle),
            "plane": self.planes[np.random.randint(len(self.planes))],
        }

    def _apply_to_image(self, img: Tensor, degrees: float, plane: tuple[int, int]) -> Tensor:
        return rotate_in_frequency(img, degrees, plane)

    def _apply_to_segmentation(self, segmentation: Tensor, degrees: float, plane: tuple[int, int]) -> Tensor:
        return rotate_in_space(segmentation - self.outside, degrees, plane, "nearest") + self.outside

    def _apply_to_regr_target(self, regression_target: Tensor, degrees: float, plane: tuple[int, int]) -> Tensor:
        return rotate_in_space(regression_target, degrees, plane, "bilinear")


def view_transform(
    kind: Literal["permute", "rotate", "off"],
    patch_size: Sequence[int],
    spacing: Sequence[float],
    max_angle: float,
    outside: int = 0,
) -> BasicTransform | None:
    """The view variance of a run, for nnU-Net's list of transforms.

    ``"permute"`` draws, for each sample, any permutation of the :func:`interchangeable_axes`, all equally likely: two
    for two axes, six for three. The released code draws the identity or one swap, with probability 1/2 each, on LA, and
    the identity or one of two swaps, with 1/3 each, elsewhere; the third swap and the two cyclic permutations are
    never seen there. If no two axes can be exchanged, as in anisotropic patches that are not square, it rotates every
    other sample: the patch's own view must stay among those that are seen.

    Args:
        kind: what to do to a sample.
        patch_size: voxels along each axis, as the transform will see it.
        spacing: mm a voxel along each axis.
        max_angle: degrees, for rotations.
        outside: the label of what a rotation brings in from outside the patch.

    Returns:
        The transform; None if ``kind`` is ``"off"``, or if the axes do not allow any view but the patch's own.

    Raises:
        UserError: if the patch cannot be turned that far, see :func:`rotate_in_frequency`.
    """
    if kind == "off":
        return None
    if kind == "permute" and (axes := interchangeable_axes(patch_size, spacing)):
        return TransposeAxesTransform(axes)
    planes = rotation_planes(spacing)
    if max_angle > 45 and any((patch_size[a] - patch_size[b]) % 2 for a, b in planes):
        raise UserError(
            f"Views are to be rotated by up to {max_angle} degrees, but a patch of {tuple(patch_size)} voxels can "
            "only be turned by up to 45: some axes are even, others odd. Set the angle to 45 or less."
        )
    if not planes:
        return None
    rotation = FrequencyRotation(planes, max_angle, outside)
    return RandomTransform(rotation, apply_probability=0.5) if kind == "permute" else rotation


def _rotate(
    values: Tensor, degrees: float, plane: tuple[int, int], rotate_rest: Callable[[Tensor, float], Tensor]
) -> Tensor:
    """Quarter turns, then ``rotate_rest`` for what is left, on ``[..., plane[0], plane[1]]`` and within 45 degrees."""
    axes = (plane[0] + 1, plane[1] + 1)
    planes = values.movedim(axes, (-2, -1))
    height, width = planes.shape[-2:]
    turns = round(degrees / 90)
    if turns % 2 and height != width:
        if (height - width) % 2:
            raise ValueError(
                f"a patch of {height} x {width} voxels cannot be turned by {degrees} degrees: one axis is even, the "
                "other odd, so a turn by 90 degrees about the center puts voxels between voxels"
            )
        side = max(height, width)
        planes = _pad(planes, (side - height) // 2, (side - width) // 2)
    planes = torch.rot90(planes, turns, (-2, -1))
    rest = math.radians(degrees - 90 * turns)
    if rest:
        planes = rotate_rest(planes, rest)
    top, left = (planes.shape[-2] - height) // 2, (planes.shape[-1] - width) // 2
    return planes[..., top : top + height, left : left + width].movedim((-2, -1), axes).contiguous()


def _rotate_by_shears(planes: Tensor, angle: float) -> Tensor:
    """Three shears, ``[..., u, v]`` to a larger patch with the same center; ``angle`` in radians."""
    # out(x) = in(A x), A = [[cos, sin], [-sin, cos]] = [[1, tan], [0, 1]] [[1, 0], [-sin, 1]] [[1, tan], [0, 1]],
    # where tan is taken of half the angle: along u, along v, along u.
    along_u, along_v = -math.tan(angle / 2), math.sin(angle)
    width = planes.shape[-1]
    planes = _shear(_shear(planes.mT, along_u).mT, along_v)
    left = (planes.shape[-1] - width) // 2
    planes = planes[..., left : left + width]  # the last shear leaves the other columns outside the patch
    return _shear(planes.mT, along_u).mT


def _shear(planes: Tensor, slope: float) -> Tensor:
    """Shift each line along the last axis by ``slope`` times the distance of the line from the center.

    Args:
        planes: ``[..., lines, n]``.
        slope: voxels a line.

    Returns:
        ``[..., lines, n + 2 p]``, with p zeros or more for all that is shifted out of the patch.
    """
    lines, length = planes.shape[-2:]
    shifts = slope * (torch.arange(lines, dtype=torch.float64, device=planes.device) - (lines - 1) / 2)
    padded = length + 2 * math.ceil(abs(slope) * (lines - 1) / 2)
    while next_fast_len(padded) != padded:
        padded += 2  # the center stays where it is
    planes = _pad(planes, 0, (padded - length) // 2)

    cycles = torch.fft.rfftfreq(padded, dtype=torch.float64, device=planes.device)  # k of Eq. 9, cycles a voxel
    phase = -2 * math.pi * shifts[:, None] * cycles
    ramp = torch.polar(torch.ones_like(phase), phase)
    spectrum = torch.fft.rfft(planes)
    # At k = 1/2, +k and -k are one sample: irfft takes the real part of it, which the result needs to be real.
    return torch.fft.irfft(spectrum * ramp.to(spectrum.dtype), n=padded)


def _rotate_by_sampling(planes: Tensor, angle: float, mode: str) -> Tensor:
    """``out(x) = in(A x)`` on ``[..., u, v]``, A as in :func:`_rotate_by_shears`; ``angle`` in radians."""
    height, width = planes.shape[-2:]
    cos, sin = math.cos(angle), math.sin(angle)
    # grid_sample counts (v, u), from -1 to 1 between the outer faces of the patch: (n - 1) / 2 is at 0
    matrix = torch.tensor([[[cos, -sin * height / width, 0], [sin * width / height, cos, 0]]], device=planes.device)
    floats = planes if planes.is_floating_point() else planes.float()
    grid = F.affine_grid(matrix.to(floats.dtype), [1, 1, height, width], align_corners=False)
    flat = floats.reshape(1, -1, height, width)
    sampled = F.grid_sample(flat, grid, mode=mode, padding_mode="zeros", align_corners=False)
    return sampled.reshape(planes.shape).to(planes.dtype)


def _pad(planes: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros on both sides of the last two axes."""
    return F.pad(planes, (columns, columns, rows, rows))
