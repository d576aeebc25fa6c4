"""Cases as radiologists look at them: in slices, front or head up, the patient's left on the right, in gray."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import nibabel
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.label_maps import grid_difference, grid_of, read_label_map
from nnunet_ssl.figures.options import FigureOptions
from nnunet_ssl.figures.runs import TrainedRun
from nnunet_ssl.figures.test_set import Case
from nnunet_ssl.unlabeled.find import channel_names
from nnunet_ssl.volumes import VolumeError, read_volume

Window = tuple[float, float, float, float]  # left, right, bottom, top, in the unit of the spacing


@dataclass(frozen=True)
class Plane:
    """A slice as it is drawn: rows downwards, columns to the right."""

    image: np.ndarray  # float [rows, columns], or from 0 to 1 [rows, columns, 3]
    truth: np.ndarray  # int [rows, columns]
    predictions: tuple[np.ndarray, ...]  # the same of each run
    size: tuple[float, float]  # mm (or what the spacing is in) of a row and of a column

    @property
    def whole(self) -> Window:
        """The window that shows all of it."""
        height, width = np.multiply(self.truth.shape, self.size)
        return 0, width, height, 0

    def draw(self, axes: Axes, array: np.ndarray, window: Window, **options: Any) -> AxesImage:
        """Draw ``array``, values or colors of all voxels of the slice, to scale, and show the window of it."""
        drawn = axes.imshow(array, extent=self.whole, **options)
        axes.set(xlim=window[:2], ylim=window[2:], xticks=[], yticks=[], facecolor="black", aspect="equal")
        axes.spines[:].set_visible(False)
        return drawn

    def inside(self, window: Window) -> tuple[slice, slice]:
        """The rows and columns of which a window shows a part."""
        left, right, bottom, top = window
        height, width = self.size
        return (
            slice(max(0, math.floor(top / height)), math.ceil(bottom / height)),
            slice(max(0, math.floor(left / width)), math.ceil(right / width)),
        )


class OpenCase:
    """A case with its predictions, read as the plans of the first run say.

    Attributes:
        axis: across which the slices lie, in arrays as they are read.
        axes, turns: of rows and columns, see ``upright``.
        size: mm (or what the spacing is in) of a row and of a column.
        truth: int32 ``[slices, rows, columns]``, turned.
        predictions: the same of each run.

    Raises:
        UserError: a file cannot be read, or lies on another grid than the truth.
    """

    def __init__(self, case: Case, runs: Sequence[TrainedRun], options: FigureOptions) -> None:
        self.case, self.run, self.options, self.reader = case, runs[0], options, runs[0].reader
        truth, properties = _readable(read_label_map, str(case.label), self.reader)
        spacing = properties["spacing"]
        self.axis = slice_axis(spacing, truth.shape)
        self.axes, self.turns = upright(properties, self.axis)
        self.size = float(spacing[self.axes[0]]), float(spacing[self.axes[1]])
        self.truth = self.slices(truth)
        self.predictions = []
        for run in runs:
            file = run.predicted / f"{case.name}{options.file_ending}"
            labels, own = _readable(read_label_map, str(file), self.reader)
            if difference := grid_difference(grid_of(labels, own), grid_of(truth, properties)):
                raise UserError(
                    f"{file} {difference}. Replace it, or remove it if it is a prediction that was made for the "
                    "figures."
                )
            self.predictions.append(self.slices(labels))

    def slices(self, array: np.ndarray) -> np.ndarray:
        """``[*spatial]`` as read -> ``[slices, rows, columns]``, turned."""
        return array.transpose(self.axis, *self.axes)[(slice(None), *self.turns)]

    @cached_property
    def channels(self) -> list[np.ndarray]:
        """Of the image, each as ``truth``."""
        image, _ = _readable(read_volume, self.reader.read_images, list(map(str, self.case.images)))
        channels = [self.slices(channel) for channel in image]
        if channels[0].shape != self.truth.shape:
            raise UserError(
                f"{self.case.images[0]} has slices of the shape {channels[0].shape}, the truth {self.truth.shape}. "
                "Replace one."
            )
        return channels

    @property
    def counted(self) -> np.ndarray:
        """bool, as ``truth``: voxels that are not marked to be ignored."""
        return self.truth != (-1 if self.options.ignore_label is None else self.options.ignore_label)

    def plane(self, index: int) -> Plane:
        """A slice.

        Raises:
            UserError: the image cannot be read, or is not of the truth's shape.
        """
        image = in_gray(np.stack([channel[index] for channel in self.channels]), self.run, self.options)
        # copies: a view would keep the whole volume
        return Plane(
            image, self.truth[index].copy(), tuple(labels[index].copy() for labels in self.predictions), self.size
        )


def _readable(read: Callable, *arguments: Any) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        return read(*arguments)
    except VolumeError as error:
        raise UserError(f"{error}. Replace it.") from error


def slice_axis(spacing: Sequence[float], shape: Sequence[int]) -> int:
    """The axis across which an image is shown in slices: the one with the largest spacing, the first of equals.

    An image with a single slice is shown as that slice.
    """
    if 1 in shape:
        return list(shape).index(1)
    spacing = np.asarray(spacing, float)
    return int(np.argmax(spacing > spacing.max() * (1 - 1e-3)))  # headers round


def upright(properties: dict, axis: int) -> tuple[tuple[int, int], tuple[slice, slice]]:
    """How a slice across ``axis`` is laid: front or head up, the patient's left on the right.

    The properties are of nnU-Net's readers with SimpleITK or nibabel; images of others are shown as they are.

    Returns:
        The array's axes that become rows and columns, and for each a slice that turns it round, or leaves it.
    """
    rows, columns = (a for a in range(3) if a != axis)
    affine = np.eye(4)
    if "nibabel_stuff" in properties:
        geometry = properties["nibabel_stuff"]
        affine = geometry.get("reoriented_affine", geometry["original_affine"])
    elif len(direction := properties.get("sitk_stuff", {}).get("direction", ())) == 9:
        affine[:3, :3] = np.reshape(direction, (3, 3)) * [[-1], [-1], [1]]  # to right, front, head, as nibabel's
    else:
        return (rows, columns), (slice(None), slice(None))
    # the affine's axes are x, y, z, an array's are z, y, x
    along, toward = nibabel.io_orientation(affine)[::-1].T
    if along[rows] < along[columns]:  # rows go from head to foot or front to back, columns from side to side
        rows, columns = columns, rows
    # what grows to the right, front or head is turned
    turns = [slice(None, None, -1) if toward[a] > 0 else slice(None) for a in (rows, columns)]
    return (rows, columns), (turns[0], turns[1])


def in_gray(channels: np.ndarray, run: TrainedRun, options: FigureOptions) -> np.ndarray:
    """Scale the first channel of a slice ``[C, rows, columns]`` to 0 to 1, or show the three of a color image.

    CT is shown in the window that the run's plans clip it to, all else from the slice's 0.5th to 99.5th percentile.
    """
    names = [str(name).lower() for name in channel_names(options.dataset_json).values()]
    of_colors = (["r", "g", "b"], ["red", "green", "blue"], 3 * ["rgb_to_0_1"])  # the last one is nnU-Net's
    if len(channels) == 3 and (names in of_colors or len(names) == 1):
        return np.clip(np.moveaxis(channels, 0, -1) / (255 if channels.max() > 1 else 1), 0, 1)
    image = channels[0].astype(float)
    low, high = np.percentile(image, (0.5, 99.5))
    if names[0] == "ct":
        properties = run.plans.foreground_intensity_properties_per_channel["0"]
        low, high = properties["percentile_00_5"], properties["percentile_99_5"]
    return np.clip((image - low) / max(high - low, 1e-8), 0, 1)
