"""What is done to a case's intensities and extent, where the literature does it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.datasets.cases import Case
from nnunet_ssl.datasets.recipe import Recipe
from nnunet_ssl.errors import UserError


def clip(image: sitk.Image, low: float, high: float) -> sitk.Image:
    """Intensities outside the window become its bounds; the pixel type stays."""
    return sitk.Clamp(image, image.GetPixelID(), low, high)


def crop_in_plane(
    image: sitk.Image, label: sitk.Image, margin: tuple[int, int], minimum: int
) -> tuple[sitk.Image, sitk.Image]:
    """Cut both to the label's box in x and y; z stays whole.

    Args:
        image, label: on the same grid; without foreground nothing is cut.
        margin: voxels around the box in x and in y.
        minimum: voxels that the result has at least, where the image has them.
    """
    foreground = np.argwhere(sitk.GetArrayViewFromImage(label).any(axis=0))  # (y, x)
    if not len(foreground):
        return image, label
    cuts = []
    for axis in (0, 1):
        size, positions = image.GetSize()[axis], foreground[:, 1 - axis]
        low, high = max(0, positions.min() - margin[axis]), min(size, positions.max() + 1 + margin[axis])
        width = max(high - low, min(minimum, size))
        low = min(max(0, low - (width - (high - low)) // 2), size - width)
        cuts.append(slice(int(low), int(low + width)))
    return image[cuts[0], cuts[1], :], label[cuts[0], cuts[1], :]


def add_window(parser: argparse.ArgumentParser, default: str) -> None:
    """``--window LOW HIGH`` and ``--no-window``, for ``windowed``."""
    group = parser.add_mutually_exclusive_group()
    text = f"Cut intensities to these HU. Default: {default}"
    group.add_argument("--window", nargs=2, type=float, metavar=("LOW", "HIGH"), help=text)
    group.add_argument("--no-window", action="store_true", help="Leave intensities as they are")


def windowed(
    recipe: Recipe, args: argparse.Namespace, default: tuple[float, float], only: frozenset[str] | None = None
) -> Recipe:
    """The recipe with the window that the user has asked for by what ``add_window`` has added, else ``default``.

    It holds for the cases named in ``only``, by default for all.

    Raises:
        UserError: the window is empty.
    """
    if args.no_window:
        return recipe
    low, high = args.window or default
    if low >= high:
        raise UserError(f"--window {low:g} {high:g}: the first must be the lower one.")
    return replace(recipe, edit=partial(_clip_case, low=low, high=high, only=only))


def _clip_case(
    case: Case, image: sitk.Image, label: sitk.Image | None, low: float, high: float, only: frozenset[str] | None
) -> tuple[sitk.Image, sitk.Image | None]:
    return (clip(image, low, high) if only is None or case.name in only else image), label
