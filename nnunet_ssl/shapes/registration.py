"""Where each voxel of an unlabeled image lies in a labeled one: a translation, then demons.

The translation finds the labeled structures of the moving image by template matching, unless the images lie well as
they are. Demons with symmetric forces follow on a pyramid, by SimpleITK: fields are added up, or, where the result
folds, composed, which takes one and a half times as long (Vercauteren et al., NeuroImage 2009).
Large images are registered and judged on coarser grids; only the warped case itself has all its voxels.
docs/shapes.md compares other libraries; an affine step raises the correlation and lowers Dice on LA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from skimage.feature import match_template

VERSION = 5  # of the code below: pairs registered by another version are registered again
LEVELS = (4, 2, 1)  # shrink factors of the pyramid
ITERATIONS = 40  # at each level
SIGMA = 1.0  # voxels: of the Gaussian that smooths the field after each iteration
LONGEST = {2: 128, 3: 64}  # voxels of an axis at the finest level; a field is smooth enough to be enlarged from there
JUDGED = {2: 256, 3: 128}  # voxels of an axis where two images are compared: what warps keep is as smooth
SHORTEST = 16  # voxels: an axis is not shrunk below
TEMPLATE = 40  # voxels of an axis when the translation is looked for
MOST_FOLDING = 0.01  # share of the voxels
MARGIN = 0.15  # what is around the labeled structures counts too: this share of their extent
GAIN = 0.05  # a correlation that is higher by this is worth another start


class Volume(NamedTuple):
    """A prepared case as SimpleITK has it: the middle of the image is the origin, axes are not turned.

    Attributes:
        channels: float32 images, 2D where the case is one slice, else 3D.
        labels: nnU-Net's segmentation, int16; None without.
        structures: the labels that are structures, as background and ignore label are not.
    """

    channels: list[sitk.Image]
    labels: sitk.Image | None = None
    structures: tuple[int, ...] = ()


class Registration(NamedTuple):
    """A transform from points of the fixed image to points of the moving one, and what tells whether it is good.

    Attributes:
        transform: a translation and a displacement field.
        before, after: correlation of the two images around the labeled structures, where the middles of the images
            coincide, and registered.
        folding: share of the voxels where the transform's Jacobian determinant is not positive.
        covered: share of the fixed image that lies in the moving one.
    """

    transform: sitk.Transform
    before: float
    after: float
    folding: float
    covered: float


def volume(
    data: np.ndarray,
    spacing: tuple[float, ...],
    labels: np.ndarray | None = None,
    structures: tuple[int, ...] | None = None,
) -> Volume:
    """Take a prepared case.

    Args:
        data: ``[C, z, y, x]`` float32.
        spacing: of z, y, x, in mm.
        labels: ``[z, y, x]`` integer, or None.
        structures: see ``Volume``; None for all labels above 0.
    """
    channels = [_image(channel.astype(np.float32, copy=False), spacing) for channel in data]
    if labels is None:
        return Volume(channels)
    if structures is None:
        structures = tuple(map(int, np.unique(labels[labels > 0])))
    return Volume(channels, _image(labels.astype(np.int16, copy=False), spacing), structures)


def array(image: sitk.Image) -> np.ndarray:
    """``[z, y, x]``, also of one slice."""
    values = sitk.GetArrayFromImage(image)
    return values if values.ndim == 3 else values[None]


def _image(values: np.ndarray, spacing: tuple[float, ...]) -> sitk.Image:
    if len(values) == 1:
        values, spacing = values[0], spacing[1:]
    image = sitk.GetImageFromArray(values)
    image.SetSpacing([float(s) for s in spacing[::-1]])
    image.SetOrigin([-s * (n - 1) / 2 for s, n in zip(image.GetSpacing(), image.GetSize(), strict=True)])
    return image


@contextmanager
def one_thread() -> Iterator[None]:
    """SimpleITK with one thread, since there are many processes; also a decorator."""
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)  # the first jobs are done in a training's process


def register(fixed: Volume, moving: Volume, channels: list[int] | None = None) -> Registration:
    """Register a labeled image onto another one.

    Args:
        fixed: the image without labels.
        moving: the labeled one, of as many channels and dimensions.
        channels: that are compared; None takes all of them. They take turns in the demons.

    Returns:
        From the better of two starts: where the middles of the images coincide, and where the labeled structures
        match. The coarsest level of the pyramid tells which.
    """
    chosen = range(len(moving.channels)) if channels is None else channels
    pairs = [(_judged(fixed.channels[c]), _judged(moving.channels[c])) for c in chosen]
    region = region_around(moving, pairs[0][1])
    middle = sitk.TranslationTransform(region.GetDimension())
    starts = [middle, template_start(pairs, region)]
    coarse = [_demons(pairs, start, LEVELS[:1]) for start in starts]
    likely = [_similarity(pairs, region, _after(*found)) for found in zip(starts, coarse, strict=True)]
    best = 1 if likely[1] > likely[0] + GAIN else 0
    grid = pairs[0][0]
    transform = _after(starts[best], _demons(pairs, starts[best], LEVELS[1:], coarse[best]))
    if (folds := folding(grid, transform)) > MOST_FOLDING:
        composed = sitk.DiffeomorphicDemonsRegistrationFilter
        transform = _after(starts[best], _demons(pairs, starts[best], LEVELS, kind=composed))
        folds = folding(grid, transform)
    inside = sitk.Image(region.GetSize(), sitk.sitkUInt8) + 1
    inside.CopyInformation(region)
    return Registration(
        transform,
        before=_similarity(pairs, region, middle),
        after=_similarity(pairs, region, transform),
        folding=folds,
        covered=float(array(sitk.Resample(inside, grid, transform, sitk.sitkNearestNeighbor, 0)).mean()),
    )


def warp(image: sitk.Image, grid: sitk.Image, transform: sitk.Transform, outside: float = 0.0) -> sitk.Image:
    """The moving image on the grid of the fixed one, within its range.

    Args:
        image: float32; by cubic interpolation, linear where an axis has under four voxels.
        grid: the fixed image.
        transform: from points of the grid to points of ``image``.
        outside: the value where ``image`` has none.
    """
    values = sitk.GetArrayViewFromImage(image)
    low, high = min(float(values.min()), outside), max(float(values.max()), outside)
    # ITK's cubic splines read beyond an axis of fewer voxels than they need
    how = sitk.sitkBSpline if min(image.GetSize()) > 3 else sitk.sitkLinear
    return sitk.Clamp(sitk.Resample(image, grid, transform, how, outside), sitk.sitkFloat32, low, high)


def warp_labels(labels: sitk.Image, grid: sitk.Image, transform: sitk.Transform, outside: int = -1) -> sitk.Image:
    """The moving labels on the grid of the fixed image: each interpolated linearly, the likeliest of each voxel.

    Args:
        labels: int16.
        grid, transform: as for ``warp``.
        outside: the value where there are none; nnU-Net pads with -1.
    """
    return sitk.Resample(labels, grid, transform, sitk.sitkLabelLinear, outside)


def region_around(moving: Volume, grid: sitk.Image) -> sitk.Image:
    """Where registration is judged: the structures and what is near them; everywhere without any.

    Args:
        moving: the labeled case.
        grid: of the result: that of ``moving``, or a coarser one.

    Returns:
        uint8.
    """
    labels = moving.labels
    assert labels is not None  # a moving volume has them
    values = np.isin(sitk.GetArrayViewFromImage(labels), moving.structures).astype(np.uint8)
    if grid.GetSize() != labels.GetSize():
        coarser = np.divide(grid.GetSpacing(), labels.GetSpacing())[::-1]
        values = ndimage.maximum_filter(values, [2 * int(np.ceil(c / 2)) + 1 for c in coarser])  # nothing is too small
        here = sitk.Resample(_like(values, labels), grid, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
        values = sitk.GetArrayFromImage(here)
    if not values.any():
        return _like(np.ones_like(values), grid)
    box = ndimage.find_objects(values)[0]
    spacing = np.array(grid.GetSpacing()[::-1])
    extent = np.mean([(side.stop - side.start) * s for side, s in zip(box, spacing, strict=True)])
    distance = ndimage.distance_transform_edt(values == 0, sampling=spacing)
    return _like((distance <= max(MARGIN * extent, 2 * spacing.min())).astype(np.uint8), grid)


def template_start(pairs: list[tuple[sitk.Image, sitk.Image]], region: sitk.Image) -> sitk.TranslationTransform:
    """The translation at which the box around a region of the moving image is most like the fixed image.

    By normalized cross-correlation on a coarse grid. The box may leave the fixed image by a fifth of its size.

    Args:
        pairs: fixed and moving image of each channel.
        region: uint8, of the moving image.
    """
    shrink = [max(1, round(n / TEMPLATE)) for n in pairs[0][0].GetSize()]
    spacing = [s * k for s, k in zip(pairs[0][0].GetSpacing(), shrink, strict=True)]
    coarse = [tuple(_resampled(image, spacing) for image in pair) for pair in pairs]
    fixed, moving = coarse[0]
    where = sitk.GetArrayFromImage(sitk.Resample(region, moving, sitk.Transform(), sitk.sitkNearestNeighbor, 0))
    if not where.any():
        return sitk.TranslationTransform(region.GetDimension())
    box = []
    for side, room in zip(ndimage.find_objects(where)[0], sitk.GetArrayViewFromImage(fixed).shape, strict=True):
        cut = max(0, side.stop - side.start - room)  # a template has to fit into the image
        box.append(slice(side.start + cut // 2, side.stop - (cut - cut // 2)))
    slack = [(side.stop - side.start) // 5 for side in box]
    matches = []
    for one, other in coarse:
        image = np.pad(sitk.GetArrayFromImage(one), [(n, n) for n in slack], mode="edge")
        matches.append(match_template(image, sitk.GetArrayFromImage(other)[tuple(box)]))
    match = np.sum(matches, axis=0)
    best = np.unravel_index(np.argmax(match), match.shape)
    lies = moving.TransformIndexToPhysicalPoint([int(side.start) for side in box[::-1]])
    goes = fixed.TransformIndexToPhysicalPoint([int(b - n) for b, n in zip(best[::-1], slack[::-1], strict=True)])
    return sitk.TranslationTransform(len(box), [a - b for a, b in zip(lies, goes, strict=True)])


def _demons(
    pairs: list[tuple[sitk.Image, sitk.Image]],
    start: sitk.Transform,
    levels: tuple[int, ...],
    field: sitk.Image | None = None,
    kind: type[Any] = sitk.FastSymmetricForcesDemonsRegistrationFilter,
) -> sitk.Image:
    """The displacement field that follows ``start``, from coarse to fine."""
    grid = pairs[0][0]
    finest = _beyond(grid, LONGEST)
    turns = 1 if len(pairs) == 1 else 4
    for level in levels:
        shrunk = [tuple(_shrunk(image, level * finest) for image in pair) for pair in pairs]
        if field is not None and field.GetSize() == shrunk[0][0].GetSize():
            continue  # a small image has no such level
        for fixed, moving in shrunk * turns:
            here = sitk.Resample(moving, fixed, start, sitk.sitkLinear, 0.0)
            demons = kind()
            demons.SetNumberOfIterations(max(1, ITERATIONS // (turns * len(pairs))))
            demons.SetStandardDeviations(SIGMA)
            demons.SetSmoothDisplacementField(True)
            demons.SetNumberOfThreads(1)
            here = sitk.HistogramMatching(here, fixed, 128, 8, True)
            field = demons.Execute(fixed, here, *([] if field is None else [_onto(field, fixed)]))
    assert field is not None  # there are levels
    return field


def _after(start: sitk.Transform, field: sitk.Image) -> sitk.Transform:
    """The field, then the start."""
    one = [1] * field.GetDimension()
    # a coarse grid may end before the image does, where ITK displaces nothing
    field = sitk.ZeroFluxNeumannPad(_onto(field, field), one, one)
    return sitk.CompositeTransform([start, sitk.DisplacementFieldTransform(field)])


def _similarity(pairs: list[tuple[sitk.Image, sitk.Image]], region: sitk.Image, transform: sitk.Transform) -> float:
    """Mean over channels of the correlation in the warped region; -1 where half of the region has been lost."""
    grid = pairs[0][0]
    there = sitk.GetArrayFromImage(sitk.Resample(region, grid, transform, sitk.sitkNearestNeighbor, 0)) > 0
    share = np.prod(grid.GetSpacing()) / np.prod(region.GetSpacing())  # of the region's voxels, a voxel there
    if there.sum() * share < 0.5 * sitk.GetArrayViewFromImage(region).sum():
        return -1.0
    found = [_correlation(one, other, transform, there) for one, other in pairs]
    said = [value for value in found if value is not None]
    return float(np.mean(said)) if said else 0.0


def _correlation(fixed: sitk.Image, moving: sitk.Image, transform: sitk.Transform, there: np.ndarray) -> float | None:
    """None where one of the two is constant, and says nothing."""
    one = sitk.GetArrayFromImage(fixed)[there]
    other = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, 0.0))[there]
    if np.ptp(one) == 0 or np.ptp(other) == 0:  # by rounding, a deviation need not be 0 then
        return None
    return float(np.mean((one - one.mean()) * (other - other.mean())) / (one.std() * other.std()))


def folding(grid: sitk.Image, transform: sitk.Transform) -> float:
    """Share of the grid's voxels where the transform's Jacobian determinant is not positive."""
    field = sitk.TransformToDisplacementField(
        transform, sitk.sitkVectorFloat64, grid.GetSize(), grid.GetOrigin(), grid.GetSpacing(), grid.GetDirection()
    )
    return float((sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(field)) <= 0).mean())


def _like(values: np.ndarray, image: sitk.Image) -> sitk.Image:
    made = sitk.GetImageFromArray(values)
    made.CopyInformation(image)
    return made


def _judged(image: sitk.Image) -> sitk.Image:
    return _shrunk(image, _beyond(image, JUDGED))


def _beyond(image: sitk.Image, longest: dict[int, int]) -> float:
    """How often the longest axis an image may have fits into its own; 1 for a smaller image."""
    return max(1.0, max(image.GetSize()) / longest[image.GetDimension()])


def _shrunk(image: sitk.Image, factor: float) -> sitk.Image:
    """Smoothed, and shrunk to that many times the smallest spacing, along the axes that have the voxels for it.

    An axis of thick slices keeps them until the others are as coarse.
    """
    coarse = factor * min(image.GetSpacing())
    axes = zip(image.GetSpacing(), image.GetSize(), strict=True)
    return _resampled(image, [max(s, min(coarse, s * n / SHORTEST)) for s, n in axes])


def _resampled(image: sitk.Image, spacing: list[float]) -> sitk.Image:
    """On a coarser grid with the same middle, smoothed before."""
    if np.allclose(spacing, image.GetSpacing()):
        return image
    for axis, (new, old) in enumerate(zip(spacing, image.GetSpacing(), strict=True)):
        if new > old and image.GetSize()[axis] >= 4:  # the filter needs four
            image = sitk.RecursiveGaussian(image, new / 2, direction=axis)
    old = list(zip(image.GetSize(), image.GetSpacing(), image.GetOrigin(), strict=True))
    size = [max(1, round(n * s / new)) for (n, s, _), new in zip(old, spacing, strict=True)]
    origin = [o + s * (n - 1) / 2 - new * (m - 1) / 2 for (n, s, o), new, m in zip(old, spacing, size, strict=True)]
    grid = sitk.Image(size, image.GetPixelID())
    grid.SetSpacing(spacing)
    grid.SetOrigin(origin)
    return sitk.Resample(image, grid, sitk.Transform(), sitk.sitkLinear, 0.0, image.GetPixelID(), True)


def _onto(field: sitk.Image, grid: sitk.Image) -> sitk.Image:
    """A displacement field on another grid, as demons and transforms want it."""
    if field.GetSize() != grid.GetSize():
        field = sitk.Resample(field, grid, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkVectorFloat64, True)
    return sitk.Cast(field, sitk.sitkVectorFloat64)
