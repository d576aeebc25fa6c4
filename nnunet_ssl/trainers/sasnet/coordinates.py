"""Labeled batches in which each voxel says where in its case it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch import Tensor

FULLY_INSIDE = 0.999  # validity of a voxel that was interpolated from voxels of the case alone


class CoordinateLoader(nnUNetDataLoader):
    """nnU-Net's loader, whose batches also hold ``coordinates``.

    ``coordinates`` is float32 ``[B, case_dim, *patch]``: the position, in voxels of the preprocessed case, that each
    voxel of the augmented patch was taken from; whole numbers are voxel centres. It is NaN where the patch shows
    something from outside the case, or from outside the larger patch that nnU-Net crops before it rotates and scales.
    For 2D configurations ``case_dim`` is still 3, and the first coordinate is the number of the slice.

    They are found by sending them through nnU-Net's own transforms, as the ``regression_target`` that these treat like
    the image. No random draw is added: data, target and keys equal ``nnUNetDataLoader``'s, bit for bit.
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


class TrackCoordinates:
    """Transforms that also carry along where each voxel comes from.

    Args:
        transforms: nnU-Net's; None for none.

    Attributes:
        crop: lower corner of the patch, and the shape of the case; to be set before each call.
        coordinates: one tensor ``[case_dim, *patch]`` a call.
    """

    def __init__(self, transforms: Callable[..., dict[str, Any]] | None) -> None:
        self.transforms = transforms
        self.crop: tuple[list[int], list[int]] = [], []
        self.coordinates: list[Tensor] = []

    def __call__(self, **sample: Any) -> dict[str, Any]:
        """Transform a sample; see ``coordinates`` for the rest."""
        sample["regression_target"] = homogeneous_coordinates(*self.crop, sample["image"].shape[1:])
        if self.transforms is not None:
            sample = self.transforms(**sample)
        carried = sample.pop("regression_target")
        if carried is None:  # what a transform that knows nothing of regression targets leaves
            raise RuntimeError("a transform dropped the regression target; it must treat it like the image")
        position, validity = carried[:-1], carried[-1:]
        self.coordinates.append(torch.where(validity >= FULLY_INSIDE, position / validity, torch.nan))
        return sample

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.transforms!r})"


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
