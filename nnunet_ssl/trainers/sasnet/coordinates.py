"""Labeled batches in which each voxel says where in its case it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.spatial.transpose import TransposeAxesTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch import Tensor

FULLY_INSIDE = 0.999  # validity of a voxel that was interpolated from voxels of the case alone
IN_PLACE = (ImageOnlyTransform, SegOnlyTransform, MaskImageTransform)  # move no voxel
AFFINE = (MirrorTransform, TransposeAxesTransform, Convert3DTo2DTransform, Convert2DTo3DTransform)


class CoordinateLoader(nnUNetDataLoader):
    """nnU-Net's loader, whose batches also hold ``coordinates``: see :func:`positions`, which makes them in full.

    No random draw is added: data, target and keys equal ``nnUNetDataLoader``'s, bit for bit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.transforms = TrackCoordinates(self.transforms)

    def get_bbox(self, data_shape: Sequence[int], *args: Any, **kwargs: Any) -> tuple[list[int], list[int]]:
        """As nnU-Net's; and remember where in which case the next patch is cropped."""
        lower, upper = super().get_bbox(data_shape, *args, **kwargs)
        self.transforms.crop = [int(i) for i in lower], [int(n) for n in data_shape]
        return lower, upper

    def generate_train_batch(self) -> dict[str, Any]:
        """As nnU-Net's, with ``coordinates``."""
        self.transforms.coordinates = []
        batch = super().generate_train_batch()
        batch["coordinates"] = torch.stack(self.transforms.coordinates)
        return batch


def positions(coordinates: Tensor, patch: Sequence[int]) -> Tensor:
    """Where in its case each voxel of a batch of augmented patches was taken from, in voxels of the preprocessed case.

    Args:
        coordinates: float32, of the loader. ``[B, case_dim, dim + 3]``: the columns of the affine map from the patch
            to the case, its offset, and the first and last voxel of what the patch was cropped from; or the positions
            themselves. ``case_dim`` is 3 for 2D configurations too, whose first coordinate is the number of the slice.
        patch: voxels along each of ``dim`` axes.

    Returns:
        float32 ``[B, case_dim, *patch]`` on the device of ``coordinates``; whole numbers are voxel centers. NaN where
        the patch shows something from outside the case, or from outside the larger patch that nnU-Net crops before it
        rotates and scales.
    """
    if coordinates.ndim > 3:
        return coordinates
    columns = (c.reshape(*c.shape, *[1] * len(patch)) for c in coordinates.unbind(-1))
    *axes, position, first, last = columns
    for axis, n, rest in zip(axes, patch, reversed(range(len(patch))), strict=True):
        # no matrix product, which autocast and TF32 would round
        position = position + axis * torch.arange(n, device=axis.device).reshape(-1, *[1] * rest)
    # the share of the inside in a linear interpolation is a product over the axes
    inside = torch.minimum(position - first, last - position).clamp_(-1, 0).add_(1).prod(1, keepdim=True)
    return torch.where(inside >= FULLY_INSIDE, position.clamp(first, last), torch.nan)


class TrackCoordinates:
    """Transforms that also follow where each voxel comes from.

    Where all of them are affine, by one affine map, which follows from their parameters. Else, as with elastic
    deformation, positions are sent through them, as the ``regression_target`` that they treat like the image.

    Args:
        transforms: nnU-Net's; None for none.

    Attributes:
        crop: lower corner of the patch, and the shape of the case; to be set before each call.
        coordinates: one tensor a call, as in :func:`positions`.
    """

    def __init__(self, transforms: Callable[..., dict[str, Any]] | None) -> None:
        self.transforms = transforms
        self.crop: tuple[list[int], list[int]] = [], []
        self.coordinates: list[Tensor] = []

    def __call__(self, **sample: Any) -> dict[str, Any]:
        """Transform a sample; see ``coordinates`` for the rest."""
        if are_affine(self.transforms):
            return self._with_affine_map(sample)
        sample["regression_target"] = homogeneous_coordinates(*self.crop, sample["image"].shape[1:])
        if self.transforms is not None:
            sample = self.transforms(**sample)
        carried = sample.pop("regression_target")
        if carried is None:  # what a transform that knows nothing of regression targets leaves
            raise RuntimeError("a transform dropped the regression target; it must treat it like the image")
        position, validity = carried[:-1], carried[-1:]
        self.coordinates.append(torch.where(validity >= FULLY_INSIDE, position / validity, torch.nan))
        return sample

    def _with_affine_map(self, sample: dict[str, Any]) -> dict[str, Any]:
        lower, case_shape = (np.array(x, float) for x in self.crop)
        shape = sample["image"].shape[1:]
        size = np.ones_like(lower)
        size[-len(shape) :] = shape
        inside = np.maximum(lower, 0), np.minimum(lower + size, case_shape) - 1
        source = np.column_stack([np.eye(len(lower))[:, -len(shape) :], lower])
        for transform in self.transforms.transforms:
            parameters = transform.get_parameters(**sample)  # with ``apply`` what calling it does
            source = source @ affine_map(transform, parameters, sample["image"].shape[1:], source.shape[1])
            sample = transform.apply(sample, **parameters)
        self.coordinates.append(torch.from_numpy(np.column_stack([source, *inside])).float())
        return sample

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.transforms!r})"


def are_affine(transforms: Callable | None) -> bool:
    """Whether ``affine_map`` knows where they all take voxels from, with one interpolation at most."""

    def known(t: BasicTransform) -> bool:
        if type(t) is SpatialTransform:
            how = t.p_elastic_deform, t.mode_image, t.padding_mode_image, t.align_corners
            return how == (0, "bilinear", "zeros", False)
        return type(t) in AFFINE or isinstance(t.transform if type(t) is RandomTransform else t, IN_PLACE)

    if type(transforms) is not ComposeTransforms:
        return False
    interpolations = sum(type(t) is SpatialTransform for t in transforms.transforms)
    return interpolations <= 1 and all(map(known, transforms.transforms))


def affine_map(transform: BasicTransform, parameters: dict[str, Any], shape: Sequence[int], rows: int) -> np.ndarray:
    """From the voxels that a transform gives to those that it was given, homogeneous, ``[rows, rows]`` float64.

    Args:
        transform: one of those that ``are_affine`` knows.
        parameters: that it has drawn.
        shape: of what it was given; slice by slice it lacks the first axis, which stays as it is.
        rows: axes of the patch, and one.
    """
    first, result = rows - 1 - len(shape), np.eye(rows)
    linear, offset = result[first:-1, first:-1], result[first:-1, -1]
    if type(transform) is MirrorTransform:
        for axis in parameters["axes"]:
            linear[axis, axis], offset[axis] = -1, shape[axis] - 1
    elif type(transform) is TransposeAxesTransform:
        linear[:] = linear[:, np.array(parameters["axis_order"][1:]) - 1]
    elif type(transform) is SpatialTransform:
        center, size = (np.array(x) for x in (parameters["center_location_in_pixels"], transform.patch_size))
        if parameters["affine"] is None:  # a crop
            offset[:] = np.floor(center) - size // 2
        else:  # about the centers of both, of which a voxel has its own at a half
            linear[:] = parameters["affine"]
            offset[:] = center - 0.5 - linear @ ((size - 1) / 2)
    return result


def homogeneous_coordinates(lower: Sequence[int], case_shape: Sequence[int], patch_shape: Sequence[int]) -> Tensor:
    """Positions in the case and a 1, for voxels in the case; zeros for those outside.

    So interpolation, which is linear and fills up with zeros, gives the weighted mean of the positions inside, times
    the weight of the inside, and that weight: their ratio is right even next to a border.

    Args:
        lower: of the patch, in voxels of the case; may be negative.
        case_shape: voxels along each axis.
        patch_shape: as many axes as the case, or fewer for a slice of it.

    Returns:
        float32 ``[case_dim + 1, *patch_shape]``.
    """
    sizes = [*[1] * (len(case_shape) - len(patch_shape)), *patch_shape]
    axes = [torch.arange(start, start + n, dtype=torch.float32) for start, n in zip(lower, sizes, strict=True)]
    inside_along = [(x >= 0) & (x < n) for x, n in zip(axes, case_shape, strict=True)]
    position = torch.meshgrid(*axes, indexing="ij")
    inside = torch.stack(torch.meshgrid(*inside_along, indexing="ij")).all(0)
    return torch.stack([*position, torch.ones(sizes)]).mul_(inside).reshape(-1, *patch_shape)
