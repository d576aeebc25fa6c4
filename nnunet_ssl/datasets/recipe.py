"""What a module says about its dataset, and the ways to put a label on its image's grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.datasets.cases import Case
from nnunet_ssl.volumes import VolumeError


def align_by_header(label: sitk.Image, image: sitk.Image) -> sitk.Image:
    """The label on its image's grid; where its axes run another way, they are turned as the headers say.

    Raises:
        VolumeError: they differ in size, spacing, direction, or by more than half a voxel in origin.
    """
    orient = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines
    orientation = orient(image.GetDirection())
    if orient(label.GetDirection()) != orientation:
        label = sitk.DICOMOrient(label, orientation)
    _check_size_and_spacing(label, image)
    if not np.allclose(label.GetDirection(), image.GetDirection(), atol=1e-2):
        raise VolumeError("image and label differ in the direction of their axes")
    shift = image.TransformPhysicalPointToContinuousIndex(label.GetOrigin())  # in voxels of each axis
    if np.max(np.abs(shift)) > 0.5:
        raise VolumeError(
            f"image and label differ in origin: {_text(image.GetOrigin())} and {_text(label.GetOrigin())}"
        )
    label.CopyInformation(image)
    return label


def align_by_voxels(label: sitk.Image, image: sitk.Image) -> sitk.Image:
    """The label on its image's grid, voxel by voxel, regardless of position and direction in the headers.

    Raises:
        VolumeError: they differ in size or spacing.
    """
    _check_size_and_spacing(label, image)
    label.CopyInformation(image)
    return label


def _check_size_and_spacing(label: sitk.Image, image: sitk.Image) -> None:
    for what, of_image, of_label, tolerance in (
        ("size", image.GetSize(), label.GetSize(), 0),
        ("spacing", image.GetSpacing(), label.GetSpacing(), 1e-3),
    ):
        if not np.allclose(of_image, of_label, rtol=tolerance, atol=0):
            raise VolumeError(f"image and label differ in {what}: {_text(of_image)} and {_text(of_label)}")


def _text(numbers: Iterable[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)


def nothing(image: sitk.Image) -> None:
    """Leaves a header as it is."""


@dataclass(frozen=True)
class Recipe:
    """What a module says about its dataset. Its functions are module-level ones, so that processes can share them."""

    labels: dict[str, int]  # name -> number, as in dataset.json
    channel: str  # nnU-Net normalizes CT by statistics of the dataset and anything else image by image
    reference: str  # where the data come from
    label_values: dict[int, int] | None = None  # value in the published file -> number; by default they are the same
    # name -> numbers of labels; nnUNetv2_ssl_evaluate averages over them
    class_groups: dict[str, list[int]] | None = None
    # corrects what a header says, in place, before image and label are compared
    mend: Callable[[sitk.Image], None] = nothing
    align: Callable[[sitk.Image, sitk.Image], sitk.Image] = align_by_header  # puts a label on its image's grid
    # (case, image, label) -> (image, label), what is done to the intensities and the extent
    edit: Callable[[Case, sitk.Image, sitk.Image | None], tuple[sitk.Image, sitk.Image | None]] | None = None
    h5_axes: str = "xyz"  # the arrays' axes in h5 files
    h5_spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)  # mm; h5 files do not say
    license: str | None = None  # of the data
