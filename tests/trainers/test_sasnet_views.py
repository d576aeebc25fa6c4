"""Views of a patch: permuted or rotated, image, labels and source coordinates together."""

from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.transpose import TransposeAxesTransform
from scipy import ndimage

from nnunet_ssl.errors import UserError
from nnunet_ssl.randomness import seeded
from nnunet_ssl.trainers.sasnet.views import (
    FrequencyRotation,
    interchangeable_axes,
    rotate_in_frequency,
    rotate_in_space,
    rotation_planes,
    view_transform,
)


def positions(shape: tuple[int, ...]) -> torch.Tensor:
    """[dim, *shape] float64, voxels from the center (n - 1) / 2."""
    axes = [torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def source(shape: tuple[int, ...], degrees: float, plane: tuple[int, int]) -> torch.Tensor:
    """[dim, *shape]: where each voxel of the rotated patch comes from, from the center: the rotation undone."""
    where = positions(shape)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    a, b = plane
    back = where.clone()
    back[a], back[b] = cos * where[a] + sin * where[b], -sin * where[a] + cos * where[b]
    return back


def gaussian(where: torch.Tensor, center: tuple[float, ...], sigma: tuple[float, ...]) -> torch.Tensor:
    square = sum(((x - c) / s) ** 2 for x, c, s in zip(where, center, sigma, strict=True))
    return torch.exp(-square / 2)[None]


def coordinates(shape: tuple[int, ...], start: int = 7) -> torch.Tensor:
    """As the loader makes them: voxels of the case, then validity."""
    axes = [torch.arange(n, dtype=torch.float32) + start for n in shape]
    return torch.cat([torch.stack(torch.meshgrid(*axes, indexing="ij")), torch.ones(1, *shape)])


def centroid(weight: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    weight = weight.double()
    return torch.stack([(weight * x.double()).sum() / weight.sum() for x in where])


SHAPES = [
    ((32, 32), (0, 1)),
    ((30, 41), (0, 1)),
    ((24, 30, 28), (0, 1)),
    ((24, 30, 28), (0, 2)),
    ((24, 31, 28), (2, 1)),
]
EVEN_SHAPES = [case for case in SHAPES if all(n % 2 == 0 for n in case[0])]  # these take quarter turns, too


# --- permutation ---


def test_the_spectrum_permuted_is_the_image_permuted():
    image = torch.randn(4, 6, 5, dtype=torch.float64)
    for order in itertools.permutations(range(3)):
        through_the_spectrum = torch.fft.ifftn(torch.fft.fftn(image).permute(order))
        torch.testing.assert_close(through_the_spectrum.real, image.permute(order))
        assert through_the_spectrum.imag.abs().max() < 1e-12


def test_permutation_moves_image_segmentation_and_coordinates_together():
    where = coordinates((6, 6, 6))
    transform = view_transform("permute", (6, 6, 6), (1.0, 1.0, 1.0), 30)
    assert isinstance(transform, TransposeAxesTransform)
    np.random.seed(0)
    orders = set()
    for _ in range(60):
        out = transform(image=where[:3] * 2, segmentation=where[:3].to(torch.int16), regression_target=where)
        torch.testing.assert_close(out["image"], out["regression_target"][:3] * 2, rtol=0, atol=0)
        assert torch.equal(out["segmentation"].float(), out["regression_target"][:3])
        assert out["regression_target"][3].eq(1).all()
        assert set(out) == {"image", "segmentation", "regression_target"}
        orders.add(tuple(int(x) for x in (out["regression_target"][:3, 1, 2, 3] - 7).argsort()))
    assert len(orders) == 6


@pytest.mark.parametrize(("axes", "count"), [((0, 1), 2), ((0, 1, 2), 6)])
def test_every_permutation_is_equally_likely(axes, count):
    transform, image = TransposeAxesTransform(axes), torch.zeros(1, 2, 2, 2)
    np.random.seed(1)
    drawn = [tuple(transform.get_parameters(image=image)["axis_order"]) for _ in range(1200)]
    shares = [drawn.count(order) / 1200 for order in set(drawn)]
    assert len(shares) == count
    assert max(abs(share - 1 / count) for share in shares) < 0.04
    assert all(order[1 + axis] == 1 + axis for order in drawn for axis in range(3) if axis not in axes)


@pytest.mark.parametrize(
    ("patch_size", "spacing", "axes"),
    [
        ((112, 112, 80), (1, 1, 1), (0, 1)),
        ((80, 112, 112), (1, 1, 1), (1, 2)),
        ((96, 80, 96), (1, 1, 1), (0, 2)),
        ((96, 96, 96), (1, 1, 1), (0, 1, 2)),
        ((96, 96, 96), (2.5, 0.8, 0.8), (1, 2)),
        ((96, 96, 96), (1, 1.0005, 1), (0, 1, 2)),
        ((96, 96, 96), (1, 1.002, 1), (0, 2)),
        ((28, 256, 224), (3, 0.8, 0.8), ()),
        ((64, 64), (1, 1), (0, 1)),
        ((64, 64), (1, 1.5), ()),
        ((64, 48), (1, 1), ()),
    ],
)
def test_interchangeable_axes(patch_size, spacing, axes):
    assert interchangeable_axes(patch_size, spacing) == axes


@pytest.mark.parametrize(
    ("spacing", "planes"),
    [
        ((1, 1, 1), ((0, 1), (0, 2), (1, 2))),
        ((3, 0.8, 0.8), ((1, 2),)),
        ((0.8, 3, 0.8003), ((0, 2),)),
        ((1, 2, 3), ()),
        ((0.5, 0.5), ((0, 1),)),
        ((0.5, 0.6), ()),
    ],
)
def test_rotation_planes(spacing, planes):
    assert rotation_planes(spacing) == planes


# --- rotation through the spectrum ---


@pytest.mark.parametrize(("shape", "plane"), SHAPES)
def test_no_angle_is_the_identity(shape, plane):
    image = torch.randn(2, *shape)
    assert torch.equal(rotate_in_frequency(image, 0.0, plane), image)
    torch.testing.assert_close(rotate_in_frequency(image, 1e-7, plane), image, rtol=0, atol=1e-5)


@pytest.mark.parametrize("degrees", [90, 180, 270, -90, 360])
@pytest.mark.parametrize("plane", [(0, 1), (0, 2), (2, 1)])
def test_quarter_turns_are_exact(degrees, plane):
    image = torch.randn(2, 10, 10, 10)
    exact = torch.rot90(image, degrees // 90, (plane[0] + 1, plane[1] + 1))
    assert torch.equal(rotate_in_frequency(image, degrees, plane), exact)
    assert torch.equal(rotate_in_space(image, degrees, plane, "bilinear"), exact)
    assert torch.equal(rotate_in_space(image, degrees, plane, "nearest"), exact)
    if plane == (0, 1):
        flat = image[..., 0]
        assert torch.equal(rotate_in_frequency(flat, degrees, plane), torch.rot90(flat, degrees // 90, (1, 2)))


def test_two_shears_of_45_degrees_are_the_quarter_turn():
    """The shears, not the exact path: 45 degrees is the most that they do."""
    image = gaussian(positions((40, 40)), (4, -3), (2.0, 3.0)).float()
    twice = rotate_in_frequency(rotate_in_frequency(image, 45, (0, 1)), 45, (0, 1))
    torch.testing.assert_close(twice, torch.rot90(image, 1, (1, 2)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("degrees", [90.0, 70.0])
def test_a_quarter_turn_of_a_patch_that_is_not_square(degrees):
    shape, plane = (20, 26), (0, 1)
    center, sigma = (2.0, -1.5), (1.5, 1.5)
    wanted = gaussian(source(shape, degrees, plane), center, sigma)
    image = gaussian(positions(shape), center, sigma)
    torch.testing.assert_close(rotate_in_frequency(image, degrees, plane), wanted, rtol=0, atol=1e-4)
    assert rotate_in_space(image, degrees, plane, "nearest").shape == image.shape


def test_half_a_voxel_cannot_be_turned():
    image = torch.zeros(1, 20, 25)
    for degrees in (90, -60, 46):
        with pytest.raises(ValueError, match=r"20 x 25 voxels .* one axis is even"):
            rotate_in_frequency(image, degrees, (0, 1))
    for degrees in (45, -45, 180, 200):
        assert rotate_in_frequency(image, degrees, (0, 1)).shape == image.shape


@pytest.mark.parametrize("degrees", [5.0, 30.0, -45.0, 118.0])
@pytest.mark.parametrize(("shape", "plane"), EVEN_SHAPES)
def test_a_gaussian_is_rotated_as_the_formula_says(shape, plane, degrees):
    """Off the center and not round, so that direction, center and angle all show."""
    center, sigma = (3.0, -2.0, 1.0)[: len(shape)], (1.6, 2.4, 2.0)[: len(shape)]
    image = gaussian(positions(shape), center, sigma)
    wanted = gaussian(source(shape, degrees, plane), center, sigma)
    found = rotate_in_frequency(image.float(), degrees, plane)
    assert found.dtype == torch.float32
    error = (found - wanted).abs().max()
    linear = (rotate_in_space(image, degrees, plane, "bilinear") - wanted).abs().max()
    assert error < 1e-5
    assert linear > 0.03


@pytest.mark.parametrize("degrees", [12.0, -37.0])
def test_close_to_a_spatial_rotation_with_splines(degrees):
    image = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(48, 48)), 2.5, mode="constant", truncate=8)
    image *= gaussian(positions(image.shape), (0, 0), (5.0, 5.0))[0].numpy()  # nothing at the border
    splines = ndimage.rotate(image, degrees, axes=(1, 0), reshape=False, order=5)
    found = rotate_in_frequency(torch.from_numpy(image)[None], degrees, (0, 1))[0].numpy()
    assert np.abs(found - splines).max() < 1e-4 * np.abs(image).max()


def test_the_spectrum_is_rotated():
    """Eq. 10: the transform of the new image at k is that of the old one at k turned back, by direct sums."""
    degrees, where = 28.0, positions((36, 36))
    image = gaussian(where, (3.0, -2.0), (1.6, 2.6))

    def spectrum(values: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        phase = torch.einsum("di,dxy->ixy", k, where)
        return (values * torch.exp(-2j * math.pi * phase)).sum((1, 2))

    k = (torch.rand(2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5) * 0.5
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turned_back = torch.stack([cos * k[0] + sin * k[1], -sin * k[0] + cos * k[1]])
    found = spectrum(rotate_in_frequency(image, degrees, (0, 1))[0], k)
    old = spectrum(image[0], turned_back)
    torch.testing.assert_close(found, old, rtol=0, atol=1e-5 * float(old.abs().max()))
    assert (spectrum(image[0], k) - old).abs().max() > 0.05 * old.abs().max()


@pytest.mark.parametrize(("shape", "plane"), SHAPES)
def test_there_and_back_restores_the_interior(shape, plane):
    image = gaussian(positions(shape), (0,) * len(shape), (2.0, 3.0, 2.5)[: len(shape)]).float()
    image = torch.cat([image, image.roll(2, -1)])
    back = rotate_in_frequency(rotate_in_frequency(image, 33.0, plane), -33.0, plane)
    torch.testing.assert_close(back, image, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("shape", "plane"), SHAPES)
def test_noise_stays_real_finite_and_no_louder(shape, plane):
    image = torch.randn(2, *shape)
    out = rotate_in_frequency(image, 41.0, plane)
    assert (out.dtype, out.shape) == (torch.float32, image.shape)
    assert out.is_contiguous()
    assert out.isfinite().all()
    assert out.square().sum() <= image.square().sum() * 1.001  # phases only: no energy is made


@pytest.mark.parametrize("degrees", [10.0, 45.0, -45.0, 80.0])
def test_nothing_wraps_around(degrees):
    """Each bright corner turned out of the patch is gone; a circular shift would bring it back at the other side."""
    shape = (32, 40)
    for corner in itertools.product((-1, 1), repeat=2):
        center = tuple(sign * ((n - 1) / 2) for sign, n in zip(corner, shape, strict=True))
        image = gaussian(positions(shape), center, (1.5, 1.5))
        found = rotate_in_frequency(image, degrees, (0, 1))
        far = (source(shape, degrees, (0, 1)) - torch.tensor(center)[:, None, None]).square().sum(0).sqrt() > 12
        assert far.any()
        assert found[0][far].abs().max() < 0.05  # the ringing of the corner's cut edge


def test_a_constant_stays_constant_within():
    shape = (64, 64)
    found = rotate_in_frequency(torch.full((1, *shape), 3.0), 25.0, (0, 1))[0]
    back = source(shape, 25.0, (0, 1)).abs().amax(0)
    assert (found[back < 24] - 3).abs().max() < 0.1  # what the patch's own border rings 8 voxels away
    assert (found[back < 12] - 3).abs().max() < 0.04
    assert found[back > 40].abs().max() < 0.15


def test_each_slice_and_channel_by_itself():
    image = torch.randn(2, 12, 5, 14)
    whole = rotate_in_frequency(image, 22.0, (0, 2))
    for channel, level in itertools.product(range(2), range(5)):
        alone = rotate_in_frequency(image[channel : channel + 1, :, level], 22.0, (0, 1))
        torch.testing.assert_close(whole[channel, :, level], alone[0])


# --- the transform ---


@pytest.mark.parametrize("degrees", [17.0, -45.0, 100.0])
@pytest.mark.parametrize(("shape", "plane"), EVEN_SHAPES)
def test_coordinates_follow_the_affine_map(shape, plane, degrees):
    out = rotate_in_space(coordinates(shape), degrees, plane, "bilinear").double()
    back = source(shape, degrees, plane)
    half = torch.tensor([(n - 1) / 2 for n in shape]).reshape(-1, *[1] * len(shape))
    wanted = back + half + 7
    inside = (back.abs() <= half - 1e-3).all(0)
    outside = (back.abs() >= half + 1).any(0)
    assert inside.any()
    assert outside.any()
    assert (out[-1][inside] - 1).abs().max() < 1e-4
    assert out[-1][outside].abs().max() == 0
    assert (out[:-1] - wanted)[:, inside].abs().max() < 2e-3
    valid = out[-1] > 0.999  # what the confidence memory may take
    assert (out[:-1] - wanted)[:, valid].abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.int64, torch.bool, torch.float32])
def test_labels_stay_labels(dtype):
    labels = torch.randint(0, 120 if dtype != torch.bool else 2, (2, 20, 22)).to(dtype)
    out = rotate_in_space(labels, 30.0, (0, 1), "nearest")
    assert (out.dtype, out.shape) == (dtype, labels.shape)
    back = source((20, 22), 30.0, (0, 1)) + torch.tensor([9.5, 10.5])[:, None, None]
    row, column = back.round().long()
    known = (row >= 0) & (row < 20) & (column >= 0) & (column < 22)
    wanted = torch.where(known, labels[:, row.clamp(0, 19), column.clamp(0, 21)], torch.zeros((), dtype=dtype))
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("degrees", [23.0, -45.0, 90.0, 130.0])
@pytest.mark.parametrize(("shape", "plane"), EVEN_SHAPES)
def test_image_labels_and_coordinates_move_together(shape, plane, degrees):
    center = (2.5, -3.0, 1.5)[: len(shape)]
    where = positions(shape)
    ball = (where - torch.tensor(center).reshape(-1, *[1] * len(shape))).square().sum(0)
    sample = {
        "image": torch.exp(-ball / 8)[None].float(),
        "segmentation": (ball < 20)[None].to(torch.int16) * 3,
        "regression_target": coordinates(shape, 0),
    }
    before = centroid(sample["segmentation"][0] > 0, coordinates(shape, 0)[:-1])
    transform = FrequencyRotation([plane], 45.0)
    out = transform.apply(dict(sample), degrees=degrees, plane=plane)

    in_image, in_label = (centroid(out[key][0], where) for key in ("image", "segmentation"))
    torch.testing.assert_close(in_image, in_label, rtol=0, atol=0.2)  # a label has whole voxels
    assert set(out["segmentation"].unique().tolist()) == {0, 3}
    label = out["segmentation"][0] > 0
    after = torch.stack([x[label].double().mean() for x in out["regression_target"][:-1]])
    torch.testing.assert_close(after, before, rtol=0, atol=0.2)
    assert out["regression_target"][-1][label].min() > 0.999


def test_draws_are_seeded_uniform_and_in_the_given_planes():
    transform = pickle.loads(pickle.dumps(FrequencyRotation(((0, 1), (1, 2)), 20.0)))
    with seeded(3, "views"):
        drawn = [transform.get_parameters() for _ in range(400)]
    with seeded(3, "views"):
        assert drawn == [transform.get_parameters() for _ in range(400)]
    angles = np.array([draw["degrees"] for draw in drawn])
    assert np.abs(angles).max() <= 20
    assert np.abs(np.quantile(angles, [0.25, 0.5, 0.75]) - [-10, 0, 10]).max() < 2.5
    planes = [draw["plane"] for draw in drawn]
    assert set(planes) == {(0, 1), (1, 2)}
    assert 150 < planes.count((0, 1)) < 250


def test_a_sample_without_labels():
    out = FrequencyRotation([(0, 1)], 30.0)(image=torch.randn(1, 16, 16))
    assert set(out) == {"image"}
    assert out["image"].shape == (1, 16, 16)


def test_what_the_trainer_gets():
    cube, equal = (32, 32, 32), (1.0, 1.0, 1.0)
    assert view_transform("off", cube, equal, 30) is None
    for kind in ("permute", "rotate"):
        assert view_transform(kind, cube, (1, 2, 3), 30) is None
    assert view_transform("permute", (16, 32, 32), (3, 1, 1), 30).allowed_axes == (1, 2)
    rotation = view_transform("rotate", (16, 32, 40), (3, 1, 1), 30)
    assert (rotation.planes, rotation.max_angle) == (((1, 2),), 30)
    instead = view_transform("permute", (16, 32, 40), (3, 1, 1), 30)  # no two axes that can be exchanged
    rotation = instead.transform
    assert (type(rotation), rotation.planes, rotation.max_angle) == (FrequencyRotation, ((1, 2),), 30)
    image = torch.randn(1, 16, 32, 40)
    with seeded(0, "views"):
        kept = [torch.equal(instead(image=image.clone())["image"], image) for _ in range(60)]
    assert 20 < sum(kept) < 40  # the patch's own view, which is that of prediction
    assert view_transform("rotate", (32, 25), (1, 1), 45).planes == ((0, 1),)
    with pytest.raises(UserError, match="Set the angle to 45 or less"):
        view_transform("rotate", (32, 25), (1, 1), 46)
    for kind in ("permute", "rotate"):
        pickle.loads(pickle.dumps(view_transform(kind, cube, equal, 30)))
