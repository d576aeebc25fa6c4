"""Reading label maps, and telling whether two of them lie on the same grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nnunet_ssl.volumes import VolumeError, read_volume

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

SPACING_TOLERANCE = 1e-3  # relative; headers round
ORIGIN_TOLERANCE = 1e-2  # of a voxel
DIRECTION_TOLERANCE = 1e-3  # of direction cosines


class Grid(NamedTuple):
    """Where the voxels of a file lie; None where its format does not say."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...] | None
    direction: tuple[float, ...] | None


def read_label_map(file: str, reader: BaseReaderWriter) -> tuple[np.ndarray, dict[str, Any]]:
    """Read a label map with nnU-Net's reader.

    Returns:
        int32 ``[*spatial]``, and the reader's properties.

    Raises:
        VolumeError: it is damaged, or its voxels are not whole numbers.
    """
    array, properties = read_volume(lambda files: reader.read_seg(files[0]), [file])
    with np.errstate(invalid="ignore"):  # of what is beyond int32
        labels = array[0].astype(np.int32)
    if not np.array_equal(labels, array[0]):
        raise VolumeError(f"{file} cannot be read (its voxels are not whole numbers)")
    return labels, properties


def grid_of(labels: np.ndarray, properties: dict[str, Any]) -> Grid:
    """Where the voxels lie that :func:`read_label_map` has read."""
    geometry = properties.get("sitk_stuff", {})
    origin, direction = geometry.get("origin"), geometry.get("direction")
    if "nibabel_stuff" in properties:
        affine = properties["nibabel_stuff"].get("reoriented_affine", properties["nibabel_stuff"]["original_affine"])
        origin, direction = tuple(affine[:3, 3]), tuple((affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)).flat)
    return Grid(labels.shape, tuple(map(float, properties["spacing"])), origin, direction)


def grid_difference(grid: Grid, truth: Grid) -> str | None:
    """In which way a prediction lies elsewhere than the truth; None if it does not."""
    if grid == truth:
        return None
    if grid.shape != truth.shape:
        return f"has the shape {grid.shape}, the truth {truth.shape}"
    if not np.allclose(grid.spacing, truth.spacing, rtol=SPACING_TOLERANCE, atol=0):
        return f"has the spacing {_rounded(grid.spacing)}, the truth {_rounded(truth.spacing)}"
    for what, own, other, tolerance in (
        ("origin", grid.origin, truth.origin, ORIGIN_TOLERANCE * min(truth.spacing)),
        ("direction", grid.direction, truth.direction, DIRECTION_TOLERANCE),
    ):
        if own is not None and other is not None and not np.allclose(own, other, rtol=0, atol=tolerance):
            return f"has the {what} {_rounded(own)}, the truth {_rounded(other)}"
    return None


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(float(v), 4) if math.isfinite(v) else float(v) for v in values)
