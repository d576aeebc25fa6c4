"""What an unlabelled image must be before anything learns from it: read completely, finite, of the dataset's kind.

nnU-Net checks none of this at preprocessing, and SimpleITK reads a NIfTI file that was cut off without complaint, the
missing part filled with whatever was in memory. A labelled image with such a fault is noticed by its label; nobody
looks at an unlabelled one.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
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
    """Read an image with nnU-Net's reader, refusing files that are cut off.

    Args:
        read_images: the reader's method.
        files: the image's channel files.

    Returns:
        images: ``[channels, *spatial]``; properties: the reader's.

    Raises:
        BadImageError: a file cannot be read, or the channels do not fit together.
    """
    for file in files:
        refuse_truncated(file)
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


def refuse_truncated(file: str) -> None:
    """Refuse a compressed file without its end, and a NIfTI file shorter than its header says.

    Raises:
        BadImageError: it is cut off or cannot be opened.
    """
    try:
        if file.endswith(".gz"):
            size = 0
            with gzip.open(file) as stream:  # to the end: the checksum is there
                while chunk := stream.read(1 << 20):
                    size += len(chunk)
        else:
            size = os.path.getsize(file)
        if size == 0:
            raise EOFError("the file is empty")
        if file.removesuffix(".gz").endswith(".nii"):
            with contextlib.suppress(nibabel.filebasedimages.ImageFileError):  # then it is for the reader to refuse
                voxels = nibabel.load(file).dataobj
                expected = voxels.offset + int(np.prod(voxels.shape)) * voxels.dtype.itemsize
                if size < expected:
                    raise EOFError(f"{size} bytes where the header promises {expected}")
    except (OSError, EOFError, zlib.error) as error:
        raise BadImageError(_unreadable(file, _reason(error))) from error


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
            raise BadImageError(
                f"{files[channel] if len(files) == len(images) else files[0]}: "
                f"{int(np.count_nonzero(~np.isfinite(image)))} voxel(s) are NaN or infinite. Replace them by a value "
                "that makes sense for these images, or remove the case."
            )


def is_2d(spacing: Sequence[float]) -> bool:
    """Tell a 2D image by its spacing: nnU-Net's readers give it a slice 999 times as thick as a pixel is wide."""
    return spacing[0] > 998 * max(spacing[1:])


def _unreadable(file: str, reason: str) -> str:
    return f"{file} cannot be read ({reason}). It may be cut off or damaged: replace or remove it."


def _reason(error: Exception | str) -> str:
    """The telling line of an exception: the last one, where SimpleITK says what it means."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, str):
        return lines[0] if lines else ""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return lines[-1].removeprefix("sitk::ERROR: ") if lines else type(error).__name__
