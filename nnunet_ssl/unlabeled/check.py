"""What an unlabelled image must be before anything learns from it: read completely, finite, of the dataset's kind.

nnU-Net checks none of this at preprocessing, and SimpleITK, which reads most of its images, gives no sign of it: a
NIfTI file that was cut off comes out whole, the missing part being whatever was in memory, and NaN or infinite voxels
of a NIfTI file come out as 0. So these files are looked through once before nnU-Net reads them.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import zlib
from collections.abc import Sequence

import nibabel
import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


class BadImageError(Exception):
    """An image that must not be learnt from; the message names file, fault and remedy."""


class CheckingPlans(PlansManager):
    """Plans whose image reader refuses what must not be learnt from.

    So the check happens where a preprocessor reads, whichever preprocessor the plans name, and each image is read
    once.

    Args:
        plans: the plans.
        num_channels: number of channels of the dataset's images.
    """

    def __init__(self, plans: dict, num_channels: int) -> None:
        super().__init__(plans)
        self.num_channels = num_channels

    @property
    def image_reader_writer_class(self) -> type:
        """nnU-Net's reader for the dataset, with the checks in front of and behind it."""
        reader, plans = super().image_reader_writer_class, self

        class CheckingReader(reader):
            def read_images(self, image_fnames: Sequence[str], *args: object, **kwargs: object):
                images, properties = read(super().read_images, image_fnames)
                check_images(images, properties, image_fnames, plans)
                return images, properties

        return CheckingReader


def read(read_images, files: Sequence[str]) -> tuple[np.ndarray, dict]:
    """Read an image with nnU-Net's reader, refusing damaged files.

    Args:
        read_images: the reader's method.
        files: the image's channel files.

    Returns:
        images: ``[channels, *spatial]``; properties: the reader's.

    Raises:
        BadImageError: a file cannot be read, or the channels do not fit together.
    """
    for file in files:
        if file.endswith((".nii", ".nii.gz")):
            check_nifti(file)
    said = io.StringIO()  # nnU-Net's readers print what is wrong and raise an empty exception
    try:
        with contextlib.redirect_stdout(said):
            return read_images(files)
    except Exception as error:
        for file in files if len(files) > 1 else ():
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    read_images([file])
            except Exception as error_of_file:
                raise BadImageError(_unreadable(file, _reason(error_of_file))) from error_of_file
        if len(files) > 1:
            raise BadImageError(
                f"{files[0]} and its other channels do not fit together "
                f"({_reason(said.getvalue().removeprefix('ERROR! ')) or _reason(error)}). "
                "Resample them to one grid, or remove the case."
            ) from error
        raise BadImageError(_unreadable(files[0], _reason(error))) from error


def check_nifti(file: str) -> None:
    """Read a NIfTI file to its end: it must be as long as its header says, its checksum right, its voxels finite.

    Raises:
        BadImageError: it is not.
    """
    try:
        voxels = nibabel.load(file).dataobj
    except (OSError, EOFError, zlib.error) as error:
        raise BadImageError(_unreadable(file, _reason(error))) from error
    except Exception:
        return  # not a NIfTI file whatever its name: for the reader to refuse
    expected = voxels.offset + math.prod(voxels.shape) * voxels.dtype.itemsize
    not_finite = 0
    try:
        with (gzip.open if file.endswith(".gz") else open)(file, "rb") as stream:
            size = len(stream.read(voxels.offset))
            while chunk := stream.read(voxels.dtype.itemsize << 18):
                if voxels.dtype.kind in "fc" and len(chunk) % voxels.dtype.itemsize == 0:
                    not_finite += np.count_nonzero(~np.isfinite(np.frombuffer(chunk, voxels.dtype)))
                size += len(chunk)
        if size < expected:
            raise EOFError(f"{size} bytes where its header promises {expected}")
    except (OSError, EOFError, zlib.error) as error:
        raise BadImageError(_unreadable(file, _reason(error))) from error
    if not_finite:
        raise BadImageError(_not_finite(file, not_finite))


def check_images(images: np.ndarray, properties: dict, files: Sequence[str], plans: CheckingPlans) -> None:
    """Check the voxels as read: number of channels, dimensions, finite values.

    Args:
        images: ``[channels, *spatial]``.
        properties: the reader's; the spacing in mm is used.
        files: the image's channel files.
        plans: the dataset's plans.

    Raises:
        BadImageError: names the file and what is wrong with it.
    """
    if len(images) != plans.num_channels:
        raise BadImageError(
            f"{files[0]}: the image has {len(images)} channel(s), but dataset.json names {plans.num_channels}. "
            "Add or remove channel files, or remove the case."
        )
    image_is_2d = is_2d(properties["spacing"])
    dataset_is_2d = is_2d(plans.original_median_spacing_after_transp)
    if image_is_2d != dataset_is_2d:
        raise BadImageError(
            f"{files[0]}: the image is {'2D' if image_is_2d else '3D'}, but the labelled images of this dataset are "
            f"{'2D' if dataset_is_2d else '3D'}. Convert or remove it."
        )
    for channel, image in enumerate(images):
        if not np.isfinite(image).all():
            file = files[channel] if len(files) == len(images) else files[0]
            raise BadImageError(_not_finite(file, np.count_nonzero(~np.isfinite(image))))


def is_2d(spacing: Sequence[float]) -> bool:
    """Tell a 2D image by its spacing: nnU-Net's readers give it a slice 999 times as thick as a pixel is wide."""
    return spacing[0] > 998 * max(spacing[1:])


def _unreadable(file: str, reason: str) -> str:
    return f"{file} cannot be read ({reason}). It may be cut off or damaged: replace or remove it."


def _not_finite(file: str, number: int) -> str:
    return (
        f"{file}: {number} voxel(s) are NaN or infinite. Replace them by a value that makes sense for these images, or "
        "remove the case."
    )


def _reason(error: Exception | str) -> str:
    """The telling line of an exception: the last one, where SimpleITK says what it means."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, str):
        return lines[0] if lines else ""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return lines[-1].removeprefix("sitk::ERROR: ") if lines else type(error).__name__
