"""Reading images and label maps whole, or not at all.

nnU-Net's readers take much for whole that is not. SimpleITK fills what was cut off from a NIfTI or GIPL file with
whatever was in memory, and where it does not understand a NIfTI header it reads voxels from some other place; NaN and
infinite voxels of a NIfTI file come out as 0. A TIFF stack that was cut off comes out with fewer slices. So a file is
held against its own header before nnU-Net reads it, and the voxels are looked at afterwards. Nrrd, MetaImage, PNG and
BMP files need no such care: their readers refuse what was cut off.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

NIFTI = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz")
GIPL = (".gipl", ".gipl.gz")
GIPL_HEADER = 256  # bytes
TIFF = (".tif", ".tiff")
AT_A_TIME = 1 << 20  # bytes, or voxels
DAMAGED = "It may be cut off or damaged: replace or remove it."
RESCALE = "Rescale them, or remove the case."


class VolumeError(Exception):
    """A file that cannot be used; ``str`` gives the problem, a sentence without its full stop that names the file."""

    def __init__(self, problem: str, remedy: str = DAMAGED) -> None:
        super().__init__(problem)
        self.remedy = remedy


def read_volume(
    read: Callable[[Sequence[str]], tuple[np.ndarray, dict[str, Any]]], files: Sequence[str]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Read an image or a label map, refusing damaged files and voxels that nnU-Net could not use.

    Args:
        read: of nnU-Net's reader: ``read_images``, or its ``read_seg`` of the first file.
        files: one a channel, or one with all channels.

    Returns:
        ``[channels, *spatial]``, and the reader's properties.

    Raises:
        VolumeError: names the file that is cut off, damaged or unreadable, that has voxels which are not finite or too
            large or too small for float32, or that does not fit the other channels.
    """
    for file in files:
        check_file(file)
    said = io.StringIO()  # nnU-Net's readers print what is wrong and raise an empty exception
    try:
        with contextlib.redirect_stdout(said), np.errstate(over="ignore", invalid="ignore"):
            volume, properties = read(files)
    except MemoryError:  # the file is not to blame
        raise
    except Exception as error:
        if len(files) == 1:
            raise unreadable(files[0], error) from error
        for file in files:
            read_volume(read, [file])
        reason = _reason(said.getvalue().removeprefix("ERROR! ")) or _reason(error)
        raise VolumeError(
            f"{files[0]} and its other channels do not fit together ({reason})",
            "Resample them to one grid, or remove the case.",
        ) from error
    for channel, voxels in enumerate(volume):
        _check_voxels(voxels, files[channel] if len(files) == len(volume) else files[0])
    return volume, properties


def check_file(file: str) -> None:
    """Hold a file against its own header: its length, its checksum, and whether its voxels are finite.

    Raises:
        VolumeError: it is damaged, or its header does not say how long it should be.
    """
    name = file.lower()
    try:
        if name.endswith(NIFTI):
            _check_nifti(file)
        elif name.endswith(GIPL):
            _check_gipl(file)
        elif name.endswith(TIFF):
            _check_tiff(file)
        elif name.endswith(".gz"):
            _read_through(file)
    except VolumeError:
        raise
    except Exception as error:  # of nibabel and tifffile, anything: they do not expect such headers either
        raise unreadable(file, error) from error


def unreadable(file: str, error: Exception) -> VolumeError:
    """What to raise where a file cannot be read."""
    return VolumeError(f"{file} cannot be read ({_reason(error)})")


def _check_nifti(file: str) -> None:
    """NIfTI-1, NIfTI-2 and Analyze, in one file or in two, in either byte order.

    What nibabel refuses is refused, for SimpleITK reads it all the same, often from the wrong place.
    """
    import nibabel

    try:
        image = nibabel.load(file)
    except nibabel.filebasedimages.ImageFileError:
        _read_through(file)  # of a compressed file that was cut off it says less
        raise
    voxels, header = image.dataobj, image.header
    if min(voxels.shape, default=0) < 1:
        raise ValueError(f"its header gives it the shape {voxels.shape}")
    if isinstance(image, nibabel.Nifti1Image) and (  # one file; NIfTI-2 is a subclass
        header["magic"] != header.single_magic or voxels.offset < header.single_vox_offset
    ):
        raise ValueError("its header does not say where its voxels begin")
    expected = voxels.offset + math.prod(voxels.shape) * voxels.dtype.itemsize
    size, not_finite = _read_through(image.file_map["image"].filename, voxels.offset, voxels.dtype)
    _check_length(size, expected)
    if not_finite:
        raise _not_finite(file, not_finite, "NaN or infinite")


def _check_gipl(file: str) -> None:
    import SimpleITK as sitk

    header = sitk.ImageFileReader()
    header.SetFileName(file)
    header.ReadImageInformation()
    one = sitk.GetArrayViewFromImage(sitk.Image([1] * header.GetDimension(), header.GetPixelID()))
    _check_length(_read_through(file)[0], GIPL_HEADER + math.prod(header.GetSize()) * one.itemsize)


def _check_tiff(file: str) -> None:
    """A TIFF file is a chain of pages; in one that was cut off it leads to a place that is not there."""
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        len(tiff.pages)  # follows the chain
        tiff.filehandle.seek(tiff.pages.next_page_offset)
        if tiff.filehandle.read(tiff.tiff.offsetsize) != bytes(tiff.tiff.offsetsize):
            raise EOFError("it has fewer pages than it should have")


def _check_length(size: int, expected: int) -> None:
    if size < expected:
        raise EOFError(f"{size} bytes where its header promises {expected}")


def _read_through(file: str, start: int = 0, dtype: np.dtype | None = None) -> tuple[int, int]:
    """Read a file to its end; gzip checks its checksum there.

    Args:
        file: compressed or not, regardless of its name.
        start: where the voxels begin, bytes.
        dtype: of the voxels; None if they are not to be looked at.

    Returns:
        Number of bytes, uncompressed, and of voxels that are not finite.
    """
    itemsize = dtype.itemsize if dtype else 1
    with open(file, "rb") as stream:
        is_gzip = stream.read(2) == b"\x1f\x8b"
    not_finite = 0
    with (gzip.open if is_gzip else open)(file, "rb") as stream:
        size = 0
        while size < start and (chunk := stream.read(min(start - size, AT_A_TIME))):
            size += len(chunk)
        while chunk := stream.read(itemsize * AT_A_TIME):
            size += len(chunk)
            if dtype and dtype.kind in "fc":
                whole = len(chunk) // itemsize
                not_finite += np.count_nonzero(~np.isfinite(np.frombuffer(chunk, dtype, whole)))
    return size, not_finite


def _check_voxels(voxels: np.ndarray, file: str) -> None:
    """Refuse what nnU-Net's arithmetic in float32 makes useless, of one channel ``[*spatial]`` as read.

    Its z-score sums the squares of an image's voxels: from about 1e15 on, by the image's size, this sum is infinite and
    the whole image becomes 0 or NaN.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        voxels = np.ravel(voxels, order="K").astype(np.float32, copy=False)
        squares = np.dot(voxels, voxels)
    if not np.isfinite(squares):
        if not_finite := np.count_nonzero(~np.isfinite(voxels)):
            raise _not_finite(file, not_finite, "NaN or infinite in float32, which nnU-Net computes in")
        largest = np.abs(voxels).max()
        raise VolumeError(
            f"{file}: voxels as large as {largest:.3g} are too large for nnU-Net, which sums their squares in float32",
            RESCALE,
        )
    if squares == 0 and not voxels.any() and _has_content(file):
        raise VolumeError(f"{file}: its voxels are so small that all of them are 0 in float32", RESCALE)


def _has_content(file: str) -> bool:
    """Whether a NIfTI file whose voxels are all read as 0 has others."""
    if not file.lower().endswith(NIFTI):
        return False
    import nibabel

    voxels = nibabel.load(file).dataobj
    return voxels.dtype.kind != "V" and bool(np.any(voxels))  # V: colors, which are whole numbers


def _not_finite(file: str, number: int, what: str) -> VolumeError:
    return VolumeError(
        f"{file}: {number} voxel(s) are {what}",
        "Replace them by a value that makes sense for these images, or remove the case.",
    )


def _reason(error: Exception | str) -> str:
    """The telling line of an exception: the last one, where SimpleITK says what it means."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, str):
        return lines[0] if lines else ""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return lines[-1].removeprefix("sitk::ERROR: ") if lines else type(error).__name__
