"""Registration finds what was done to an image, in mm, and warps image and label alike."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.phantoms import dice, phantom
from scipy import ndimage

from nnunet_ssl.shapes import registration
from nnunet_ssl.shapes.registration import (
    MOST_FOLDING,
    Registration,
    Volume,
    array,
    folding,
    region_around,
    register,
    template_start,
    volume,
    warp,
    warp_labels,
)

SHAPE = (20, 24, 30)


def nothing(dimension: int = 3) -> sitk.Transform:
    return sitk.TranslationTransform(dimension)


def labels_of(found: sitk.Transform, fixed: Volume, moving: Volume) -> np.ndarray:
    return array(warp_labels(moving.labels, fixed.channels[0], found))


def assert_found(found: Registration, fixed: Volume, truth: np.ndarray, moving: Volume, least: float = 0.9) -> None:
    before = labels_of(nothing(truth.ndim if len(truth) > 1 else 2), fixed, moving)
    after = labels_of(found.transform, fixed, moving)
    for label in (1, 2):
        assert dice(after, truth, label) > max(least, dice(before, truth, label) + 0.1), label
    assert found.after > 0.9 > found.before
    assert found.folding < 0.001


@pytest.mark.parametrize(
    ("shapes", "spacings"),
    [
        ((SHAPE, SHAPE), ((1, 1, 1),) * 2),
        (((8, 24, 30), (7, 24, 30)), ((3, 1, 1),) * 2),
        (((1, 32, 40),) * 2, ((1, 1, 1),) * 2),
        ((SHAPE, (16, 16, 20)), ((1, 1, 1), (1.3, 1.5, 1.5))),
    ],
    ids=["3D", "thick slices", "one slice", "other spacing and size"],
)
def test_a_known_deformation_is_found(shapes, spacings):
    image, truth = phantom(shapes[0], spacings[0], bend=3.0, seed=1)
    fixed = volume(image[None], spacings[0])
    image, labels = phantom(shapes[1], spacings[1], seed=2)
    moving = volume(image[None], spacings[1], labels)
    assert fixed.channels[0].GetDimension() == (2 if shapes[0][0] == 1 else 3)
    assert_found(register(fixed, moving), fixed, truth, moving, 0.85)


def test_a_structure_that_lies_elsewhere_is_found_by_its_template():
    """Twelve voxels away demons alone see nothing of it."""
    image, truth = phantom((28, 44, 50), shift=(3, 9, -12), seed=1)
    fixed = volume(image[None], (1, 1, 1))
    image, labels = phantom((28, 44, 50), seed=2)
    moving = volume(image[None], (1, 1, 1), labels)
    found = register(fixed, moving)
    assert_found(found, fixed, truth, moving, 0.8)
    start = template_start([(fixed.channels[0], moving.channels[0])], region_around(moving, moving.channels[0]))
    assert np.allclose(start.GetOffset(), (12, -9, -3), atol=1.5)
    alone = registration._after(
        nothing(), registration._demons([(fixed.channels[0], moving.channels[0])], nothing(), (4, 2, 1))
    )
    assert dice(labels_of(alone, fixed, moving), truth, 2) < 0.5


def test_the_template_may_be_larger_than_the_image_and_leave_it():
    image, labels = phantom(SHAPE, seed=1)
    moving = volume(image[None], (1, 1, 1), labels)
    small = volume(image[None, 4:12, 4:14, 4:16], (1, 1, 1))
    found = register(small, moving)
    assert np.isfinite(found[1:]).all()


def test_channels_take_turns():
    """Opposite contrast: the sum of both channels shows nothing, each by itself does."""
    image, truth = phantom(SHAPE, bend=3.0, seed=1)
    fixed = volume(np.stack([image, -image]), (1, 1, 1))
    image, labels = phantom(SHAPE, seed=2)
    moving = volume(np.stack([image, -image]), (1, 1, 1), labels)
    assert_found(register(fixed, moving), fixed, truth, moving, 0.85)


@pytest.mark.parametrize("shows", [0, 1])
def test_each_channel_counts(shows):
    image, truth = phantom(SHAPE, bend=3.0, seed=1)
    fixed = volume(np.stack([image if channel == shows else 0 * image for channel in range(2)]), (1, 1, 1))
    image, labels = phantom(SHAPE, seed=2)
    moving = volume(np.stack([image if channel == shows else 0 * image for channel in range(2)]), (1, 1, 1), labels)
    assert_found(register(fixed, moving), fixed, truth, moving, 0.85)


def test_a_named_channel_is_compared_alone():
    image, truth = phantom(SHAPE, bend=3.0, seed=1)
    noise = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    fixed = volume(np.stack([noise, image]), (1, 1, 1))
    image, labels = phantom(SHAPE, seed=2)
    moving = volume(np.stack([noise[::-1], image]), (1, 1, 1), labels)
    found = register(fixed, moving, [1])
    assert_found(found, fixed, truth, moving, 0.85)
    assert register(fixed, moving, [0]).after < found.after


def test_many_channels_each_get_an_iteration(monkeypatch):
    monkeypatch.setattr(registration, "ITERATIONS", 5)
    image, labels = phantom((8, 10, 12), seed=1)
    many = volume(np.stack([image] * 3), (1, 1, 1), labels)
    shifted = volume(np.stack([np.roll(image, 1, 2)] * 3), (1, 1, 1))
    field = registration._demons(list(zip(shifted.channels, many.channels, strict=True)), nothing(), (1,))
    assert np.abs(sitk.GetArrayFromImage(field)).max() > 0


def test_a_large_volume_is_registered_on_fewer_voxels_as_well():
    """An axis of 80 voxels, which is registered on 64."""
    spacing = (1.0, 1.0, 0.4)
    image, truth = phantom((20, 24, 80), spacing, shift=(1, 2, -2), seed=1)
    fixed = volume(image[None], spacing)
    image, labels = phantom((20, 24, 80), spacing, bend=1.0, seed=2)
    moving = volume(image[None], spacing, labels)
    found = register(fixed, moving)
    assert_found(found, fixed, truth, moving, 0.85)
    field = sitk.DisplacementFieldTransform(found.transform.GetNthTransform(1)).GetDisplacementField()
    assert max(field.GetSize()) == 64 + 2  # and a voxel on each side


def test_where_demons_fold_they_are_made_again_without_folds(monkeypatch):
    """Slices of other anatomies, far apart, as in cardiac MRI."""
    rng = np.random.default_rng(0)
    images = [ndimage.gaussian_filter(rng.normal(size=(6, 40, 40)), (0.5, 2, 2)).astype(np.float32) for _ in range(2)]
    labels = np.zeros((6, 40, 40), np.int16)
    labels[2:4, 14:26, 14:26] = 1
    fixed, moving = volume(images[0][None] * 20, (4, 1, 1)), volume(images[1][None] * 20, (4, 1, 1), labels)
    found = register(fixed, moving)
    assert found.folding <= MOST_FOLDING
    assert found.folding == folding(fixed.channels[0], found.transform)
    assert found.after > found.before
    monkeypatch.setattr(registration, "MOST_FOLDING", 1.0)
    assert register(fixed, moving).folding > MOST_FOLDING


@pytest.mark.parametrize("values", [(0.0, 0.0), (0.1, 0.1), (0.1, 0.7)])
def test_a_channel_that_shows_nothing_takes_nothing_from_the_similarity(values):
    image, _ = phantom((16, 20, 24), shift=(0, 1, 1), seed=1)
    other, labels = phantom((16, 20, 24), seed=2)
    found = []
    for with_it in (False, True):
        fixed, moving = (
            np.stack([x, np.full_like(x, value)][: 1 + with_it])
            for x, value in zip((image, other), values, strict=True)
        )
        found.append(register(volume(fixed, (1, 1, 1)), volume(moving, (1, 1, 1), labels)))
    assert found[1].before == pytest.approx(found[0].before)
    assert found[1].after == pytest.approx(found[0].after, abs=0.05)  # demons take turns, so the field is another


def test_where_it_is_judged_what_is_ignored_is_no_structure():
    labels = np.zeros((10, 40, 40), np.int16)
    labels[4:6, 10:14, 10:14] = 1
    image = np.zeros((1, *labels.shape), np.float32)

    def region(*structures: tuple[int, ...]) -> np.ndarray:
        moving = volume(image, (1, 1, 1), labels, *structures)
        return array(region_around(moving, moving.channels[0]))

    alone = region()
    labels[0, 30:] = 2
    assert np.array_equal(region((1,)), alone)
    assert region().sum() > alone.sum() + 400
    assert region(()).all()  # without structures everywhere


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(12, 14, 16), (1, 20, 24), (2, 16, 16), (3, 5, 7)])
@pytest.mark.parametrize("empty", ["images", "one channel", "fixed", "labels", "all labeled"])
def test_what_shows_nothing_neither_crashes_nor_gives_nan(empty, shape):
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(2, *shape)).astype(np.float32) for _ in range(2)]
    labels = np.zeros(shape, np.int16)
    if empty != "labels":
        labels[tuple(slice(n // 3, n // 3 + max(1, n // 3)) for n in shape)] = 1
    if empty == "all labeled":
        labels[:] = 1
    for image in images if empty == "images" else images[:1] if empty == "fixed" else []:
        image[:] = 0.5
    if empty == "one channel":
        images[0][1], images[1][1] = 0, 0
    fixed, moving = volume(images[0], (1, 1, 1)), volume(images[1], (1, 1, 1), labels)
    found = register(fixed, moving)
    assert np.isfinite(found[1:]).all()
    assert np.isfinite(array(warp(moving.channels[0], fixed.channels[0], found.transform))).all()
    assert set(np.unique(labels_of(found.transform, fixed, moving))) <= {-1, 0, 1}


@pytest.mark.parametrize("shape", [(2, 8, 9), (8, 3, 9)])
def test_few_slices_are_interpolated_linearly(shape):
    """ITK's cubic splines give NaN there, now and then."""
    image = volume(np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32), (1, 1, 1)).channels[0]
    moved = sitk.TranslationTransform(3, (0.3, 0.2, 0.1))
    assert np.array_equal(array(warp(image, image, moved)), array(sitk.Resample(image, image, moved)))


def test_it_is_the_same_whatever_the_number_of_threads():
    image, _ = phantom((12, 16, 20), bend=2.0, seed=1)
    other, labels = phantom((12, 16, 20), seed=2)

    def warped(_: int = 0) -> np.ndarray:
        fixed, moving = volume(image[None], (1, 1, 1)), volume(other[None], (1, 1, 1), labels)
        return array(warp(moving.channels[0], fixed.channels[0], register(fixed, moving).transform))

    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    try:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        alone = warped()
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(4)
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(warped, range(2)))
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
    assert all(np.array_equal(alone, other) for other in together)


def test_the_image_that_is_registered_to_brings_no_label():
    image, labels = phantom((12, 16, 20), seed=1)
    moving = volume(image[None], (1, 1, 1), labels)
    with_label = volume(np.roll(image, 2, 2)[None], (1, 1, 1), labels[::-1].copy())
    without = with_label._replace(labels=None)
    one, other = register(with_label, moving), register(without, moving)
    assert one[1:] == other[1:]
    assert "fixed.labels" not in inspect.getsource(registration)


def test_labels_are_warped_without_values_in_between_and_with_minus_1_outside():
    labels = np.zeros((6, 8, 10), np.int16)
    labels[2:4, 2:6, 2:8], labels[0], labels[3, 3, 3] = 7, -1, 2
    image = volume(np.zeros((1, *labels.shape), np.float32), (2, 1, 1), labels)
    grid = image.channels[0]
    assert np.array_equal(array(warp_labels(image.labels, grid, nothing())), labels)
    moved = array(warp_labels(image.labels, grid, sitk.TranslationTransform(3, (3.0, 0.0, 0.0))))
    assert np.array_equal(moved[:, :, :7], labels[:, :, 3:])
    assert (moved[:, :, 7:] == -1).all()
    half = array(warp_labels(image.labels, grid, sitk.TranslationTransform(3, (0.4, -0.3, 0.7))))
    assert set(np.unique(half)) <= {-1, 0, 2, 7}
    assert half.dtype == np.int16
    assert (array(warp_labels(image.labels, grid, sitk.TranslationTransform(3, (99.0, 0, 0)), 5)) == 5).all()


@pytest.mark.parametrize("shape", [(9, 20, 24), (1, 30, 26)])
def test_warped_labels_are_the_likeliest_of_all_interpolated_ones(shape):
    """The plain way, a label at a time over the whole grid, is the oracle."""
    rng = np.random.default_rng(0)
    blocks = (min(shape[0], 3), 6, 7)
    labels = ndimage.zoom(rng.uniform(-1.4, 5.4, blocks), np.divide(shape, blocks), order=0).round().astype(np.int16)
    moving = volume(np.zeros((1, *labels.shape), np.float32), (2.5, 1, 1), labels)
    (grid,) = volume(np.zeros((1, shape[0], 25, 22), np.float32), (2.0, 1.1, 1.2)).channels
    dimension = grid.GetDimension()
    (small,) = volume(np.zeros((1, min(shape[0], 4), 6, 6), np.float32), (5, 5, 5)).channels
    field = sitk.GetImageFromArray(rng.normal(0, 2, (*small.GetSize()[::-1], dimension)), isVector=True)
    field.CopyInformation(small)
    transform = registration._after(sitk.TranslationTransform(dimension, [0.3] * dimension), field)
    expected, highest = np.full(array(grid).shape, -1), np.zeros(array(grid).shape)
    for label in np.unique(labels):
        this = sitk.Cast(moving.labels == int(label), sitk.sitkFloat64)
        likely = array(sitk.Resample(this, grid, transform, sitk.sitkLinear, 0.0))
        expected[likely > highest + 1e-9] = label
        highest = np.maximum(highest, likely)
    found = array(warp_labels(moving.labels, grid, transform))
    assert len(np.unique(expected)) >= 7
    assert np.array_equal(found, expected)


def test_a_large_volume_is_judged_on_fewer_voxels(monkeypatch):
    """As it would be on all of them, and small structures count there too."""
    spacing = (0.5, 0.5, 0.4)
    image, _ = phantom((20, 24, 80), spacing, shift=(1, 2, -2), seed=1)
    fixed = volume(image[None], spacing)
    image, labels = phantom((20, 24, 80), spacing, bend=1.0, seed=2)
    labels[1, 1, 1] = 3  # one voxel
    moving = volume(image[None], spacing, labels)
    plain = register(fixed, moving)
    monkeypatch.setitem(registration.JUDGED, 3, 40)
    grid = registration._judged(moving.channels[0])
    assert grid.GetSize() == (40, 16, 16)
    assert array(region_around(moving, grid))[0, 0, 0] == 1
    fewer = register(fixed, moving)
    assert fewer.after == pytest.approx(plain.after, abs=0.05)
    assert plain.before < fewer.before < plain.before + 0.1  # noise is averaged away
    assert fewer.covered == pytest.approx(plain.covered, abs=0.05)


def test_an_image_is_given_back_by_the_identity_and_stays_in_its_range():
    values = np.random.default_rng(0).normal(size=(1, 6, 8, 10)).astype(np.float32)
    (image,) = volume(values, (2, 1, 1)).channels
    np.testing.assert_allclose(array(warp(image, image, nothing())), values[0], atol=1e-4)
    steps = (values > 0).astype(np.float32)  # a cubic spline overshoots at a step
    (image,) = volume(steps, (2, 1, 1)).channels
    warped = array(warp(image, image, sitk.TranslationTransform(3, (0.5, 0.5, 0.5))))
    assert 0 <= warped.min() < warped.max() <= 1
    assert (array(warp(image, image, sitk.TranslationTransform(3, (99.0, 0, 0)), -3.0)) == -3).all()


def test_the_grid_of_a_coarse_image_has_the_same_middle():
    """Or a displacement of one level would be shifted at the next."""
    (image,) = volume(np.zeros((1, 7, 33, 40), np.float32), (3, 1, 1)).channels
    coarse = registration._shrunk(image, 4)
    for one in (image, coarse):
        middle = one.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in one.GetSize()])
        assert np.allclose(middle, 0)
    assert coarse.GetSize() == (16, 16, 7)


def test_thick_slices_stay_until_the_others_are_as_coarse():
    (image,) = volume(np.zeros((1, 60, 128, 140), np.float32), (5, 1, 1)).channels
    assert registration._shrunk(image, 4).GetSize() == (35, 32, 60)
    assert registration._shrunk(image, 8).GetSpacing() == pytest.approx((8, 8, 8), rel=0.1)


@pytest.mark.parametrize("shape", [(60, 130, 150), (16, 290, 512), (1, 301, 260)])
def test_a_field_on_a_coarser_grid_reaches_the_border_of_the_image(shape):
    """Such a grid may end before the image does."""
    (image,) = volume(np.zeros((1, *shape), np.float32), (1, 1, 1)).channels
    dimension = image.GetDimension()
    coarse = registration._shrunk(image, max(image.GetSize()) / registration.LONGEST[dimension])
    field = sitk.GetImageFromArray(np.full((*coarse.GetSize()[::-1], dimension), 6.0), isVector=True)
    field.CopyInformation(coarse)
    transform = registration._after(sitk.TranslationTransform(dimension), field)
    displaced = sitk.TransformToDisplacementField(
        transform, sitk.sitkVectorFloat64, image.GetSize(), image.GetOrigin(), image.GetSpacing()
    )
    np.testing.assert_allclose(sitk.GetArrayFromImage(displaced), 6.0)
    assert registration.folding(image, transform) == 0


def test_a_large_image_has_no_seam_at_its_border():
    """Of what the demons find."""
    shape = (1, 40, 301)
    image = np.sin(np.arange(301) / 9)[None, None] * np.cos(np.arange(40) / 7)[None, :, None]
    labels = (image > 0.5).astype(np.int16)
    fixed = volume(np.roll(image, 3, 2).astype(np.float32)[None], (1, 1, 1))
    moving = volume(image.astype(np.float32)[None], (1, 1, 1), labels)
    found = register(fixed, moving)
    grid = fixed.channels[0]
    field = sitk.GetArrayFromImage(
        sitk.TransformToDisplacementField(
            found.transform, sitk.sitkVectorFloat64, grid.GetSize(), grid.GetOrigin(), grid.GetSpacing()
        )
    )
    assert field.shape == (*shape[1:], 2)
    for step in (np.abs(np.diff(field, axis=axis)).max() for axis in (0, 1)):
        assert step < 1


@pytest.mark.parametrize("coarse", [1, 2])
def test_structures_that_shrink_to_less_than_half_are_not_alike(coarse):
    """However well what is left of them fits; whatever the grid that they are compared on."""
    labels = np.zeros((20, 20, 20), np.int16)
    labels[6:14, 6:14, 6:14] = 1
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(1, 20, 20, 20)), (0, 2, 2, 2))
    moving = volume(noise.astype(np.float32), (1, 1, 1), labels)
    image = moving.channels[0]
    region = registration.region_around(moving, image)
    (fixed,) = volume(np.zeros((1, *[20 // coarse] * 3), np.float32), (coarse,) * 3).channels
    fixed = sitk.Resample(image, fixed)

    def similar(factor):
        scaled = sitk.AffineTransform(3)
        scaled.Scale(factor)
        return registration._similarity([(fixed, image)], region, scaled)

    assert similar(1.0) > 0.9
    assert similar(1.2) > -1
    assert similar(1.6) == -1
