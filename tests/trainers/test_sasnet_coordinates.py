"""Where each voxel of an augmented patch comes from, through nnU-Net's own loader and transforms."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.spatial.transpose import TransposeAxesTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from scipy.ndimage import map_coordinates

from nnunet_ssl.randomness import seeded
from nnunet_ssl.trainers.sasnet import coordinates as module
from nnunet_ssl.trainers.sasnet.coordinates import (
    CoordinateLoader,
    TrackCoordinates,
    homogeneous_coordinates,
    positions,
)
from nnunet_ssl.trainers.sasnet.memory import ConfidenceMemory
from nnunet_ssl.trainers.sasnet.views import FrequencyRotation
from nnunet_ssl.unlabeled.loader import TwoStreamLoader, start_workers

KINDS = ["3d", "2d", "png", "anisotropic", "multichannel"]
SPATIAL = (SpatialTransform, MirrorTransform, Convert3DTo2DTransform, Convert2DTo3DTransform)


def make_loader(trainer, cls=CoordinateLoader, transforms=None, batch_size=2, force_dummy_2d=False):
    """A training loader as nnU-Net makes it, with its own transforms unless others are given.

    ``force_dummy_2d``: as for patches that are three times as long as they are thick, slice by slice.
    """
    patch_size = trainer.configuration_manager.patch_size
    rotation, dummy_2d, initial, mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    if force_dummy_2d:
        dummy_2d, initial = True, (patch_size[0], *initial[1:])
    labels = trainer.label_manager
    full = trainer.get_training_transforms(
        patch_size,
        rotation,
        trainer._get_deep_supervision_scales(),
        mirror_axes,
        dummy_2d,
        use_mask_for_norm=trainer.configuration_manager.use_mask_for_norm,
        foreground_labels=labels.foreground_labels,
        regions=labels.foreground_regions if labels.has_regions else None,
        ignore_label=labels.ignore_label,
    )
    dataset, _ = trainer.get_tr_and_val_datasets()
    return cls(
        dataset,
        batch_size,
        initial,
        patch_size,
        labels,
        oversample_foreground_percent=0.33,
        transforms=full if transforms is None else transforms(full),
    )


def spatial_part(probability):
    """What of nnU-Net's transforms moves voxels, with rotation and scaling as likely as said."""

    def choose(full):
        chosen = [t for t in full.transforms if isinstance(t, SPATIAL)]
        for t in chosen:
            if isinstance(t, SpatialTransform):
                t.p_rotation = t.p_scaling = probability
        return ComposeTransforms(chosen)

    return choose


def positions_in(batch):
    """Of a batch, ``[B, case_dim, *patch]``."""
    return positions(batch["coordinates"], batch["data"].shape[2:])


def samples(loader, batches):
    """Patch, positions and the preprocessed case it is from."""
    for number in range(batches):
        with seeded(0, "test", number):
            batch = next(loader)
        for patch, target, coords, key in zip(
            batch["data"], batch["target"], positions_in(batch), batch["keys"], strict=True
        ):
            data, seg, _, _ = loader._data.load_case(key)
            yield patch.numpy(), target.numpy(), coords.numpy(), np.asarray(data[:]), np.asarray(seg[:])


@pytest.mark.parametrize("kind", [*KINDS, "ignore", "regions"])
def test_batches_are_nnunets_own_bit_for_bit(tiny, make_trainer, kind):
    trainer = make_trainer("nnUNetTrainer", tiny(kind))
    ours, theirs = make_loader(trainer), make_loader(trainer, nnUNetDataLoader)
    for number in range(6):
        with seeded(0, number):
            with_coordinates = next(ours)
        with seeded(0, number):
            plain = next(theirs)
        coordinates = positions_in(with_coordinates)
        del with_coordinates["coordinates"]
        assert with_coordinates.keys() == plain.keys()
        assert torch.equal(with_coordinates["data"], plain["data"])
        assert list(with_coordinates["keys"]) == list(plain["keys"])
        for a, b in zip(with_coordinates["target"], plain["target"], strict=True):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
        assert coordinates.shape == (2, 3, *plain["data"].shape[2:])
        assert coordinates.dtype == torch.float32
        assert not coordinates.isnan().all()


@pytest.mark.parametrize("kind", [*KINDS, "slice by slice"])
def test_the_affine_map_gives_what_goes_through_the_transforms(tiny, make_trainer, monkeypatch, kind):
    """The positions that nnU-Net's own transforms interpolate are the oracle, on the same draws."""
    dummy_2d = kind == "slice by slice"
    trainer = make_trainer("nnUNetTrainer", tiny("anisotropic" if dummy_2d else kind))
    patch = trainer.configuration_manager.patch_size
    equal = [axis for axis in range(len(patch)) if patch[axis] == patch[-1]]

    def with_views(full):
        return ComposeTransforms([*spatial_part(0.5)(full).transforms, TransposeAxesTransform(equal)])

    loader = make_loader(trainer, transforms=with_views, batch_size=4, force_dummy_2d=dummy_2d)
    known, outside = [], 0
    for number in range(15):
        found = []
        for is_affine in (True, False):
            with monkeypatch.context() as context:
                if not is_affine:
                    context.setattr(module, "are_affine", lambda _: False)
                with seeded(2, number):
                    found.append(next(loader))
        by_map, carried = found
        assert by_map["coordinates"].shape == (4, 3, len(patch) + 3)
        assert carried["coordinates"].shape == (4, 3, *patch)
        assert torch.equal(by_map["data"], carried["data"])
        assert torch.equal(by_map["target"], carried["target"])
        a, b = positions_in(by_map), positions_in(carried)
        both = ~(a.isnan() | b.isnan())
        torch.testing.assert_close(a[both], b[both], rtol=0, atol=2e-4)
        differ = (a.isnan() != b.isnan()).float().mean()  # where validity is at its threshold, within rounding
        assert differ < 1e-4
        known.append(both.float().mean())
        outside += int(b.isnan().sum())
    assert 0.3 < np.mean(known) < 1
    assert outside > 100


def test_what_is_not_known_to_be_affine_goes_through_the_transforms(tiny, make_trainer):
    trainer = make_trainer("nnUNetTrainer", tiny())
    transforms = make_loader(trainer).transforms.transforms
    (spatial,) = (t for t in transforms.transforms if isinstance(t, SpatialTransform))
    assert module.are_affine(transforms)
    for name, value in {"p_elastic_deform": 0.1, "mode_image": "nearest", "padding_mode_image": "border"}.items():
        before = getattr(spatial, name)
        setattr(spatial, name, value)
        assert not module.are_affine(transforms)
        setattr(spatial, name, before)
    for more in (spatial, FrequencyRotation([(0, 1)], 30), RandomTransform(MirrorTransform((0,)))):
        assert not module.are_affine(ComposeTransforms([*transforms.transforms, more]))
    assert not module.are_affine(None)


@pytest.mark.parametrize("kind", KINDS)
def test_without_rotation_and_scaling_coordinates_are_the_voxels_themselves(tiny, make_trainer, kind):
    """Crop and mirror: image and segmentation at the coordinates are those of the patch, exactly."""
    loader = make_loader(make_trainer("nnUNetTrainer", tiny(kind)), transforms=spatial_part(0))
    for patch, target, coords, data, seg in samples(loader, 5):
        inside = ~np.isnan(coords[0])
        assert inside.any()
        at = tuple(coords[:, inside].astype(int))
        assert np.array_equal(np.stack(at), coords[:, inside])  # whole numbers
        assert np.array_equal(patch[:, inside], data[(slice(None), *at)])
        assert np.array_equal(target[:, inside], seg[(slice(None), *at)])
        assert (patch[:, ~inside] == 0).all()
        assert (target[:, ~inside] == -1).all()
        assert np.isnan(coords[:, ~inside]).all()


@pytest.mark.parametrize("kind", [*KINDS, "slice by slice"])
def test_through_rotation_and_scaling_the_case_at_the_coordinates_is_the_patch(tiny, make_trainer, kind):
    dummy_2d = kind == "slice by slice"
    trainer = make_trainer("nnUNetTrainer", tiny("anisotropic" if dummy_2d else kind))
    loader = make_loader(trainer, transforms=spatial_part(1), force_dummy_2d=dummy_2d)
    share, fractional = [], 0
    for patch, _, coords, data, _ in samples(loader, 8):
        inside = ~np.isnan(coords[0])
        share.append(inside.mean())
        fractional += (np.abs(coords[:, inside] - coords[:, inside].round()) > 0.1).any(0).sum()
        for channel, case in zip(patch, data, strict=True):
            at = coords[:, inside].astype(np.float64)
            sampled = map_coordinates(case.astype(np.float64), at, order=1, mode="nearest")
            # next to a border up to 0.001 of the patch's value may be padding
            np.testing.assert_allclose(channel[inside], sampled, rtol=1e-3, atol=2e-4)
    assert 0.3 < np.mean(share) <= 1
    assert fractional > 1000


@pytest.mark.parametrize("kind", ["2d", "anisotropic"])
def test_slices_keep_their_number(tiny, make_trainer, kind):
    """2D patches are slices of a 3D case; so are, for the transforms, those of strongly anisotropic cases."""
    trainer = make_trainer("nnUNetTrainer", tiny(kind))
    loader = make_loader(trainer, transforms=spatial_part(1), force_dummy_2d=kind == "anisotropic")
    moved = [type(t) for t in loader.transforms.transforms.transforms]
    assert (Convert3DTo2DTransform in moved) == (kind == "anisotropic")
    seen = set()
    for _, _, coords, data, _ in samples(loader, 8):
        per_slice = coords[0][None] if kind == "2d" else coords[0]
        for slice_of_patch in per_slice:
            numbers = np.unique(np.round(slice_of_patch[~np.isnan(slice_of_patch)], 4))
            assert len(numbers) <= 1
            assert (numbers == numbers.round()).all()
            assert (numbers < data.shape[1]).all()
            seen.update(numbers)
    assert len(seen) > 3


def test_axes_may_be_permuted(tiny, make_trainer):
    """As view variance does, after nnU-Net's own transforms and before the target is scaled down."""

    def permuted(full):
        return ComposeTransforms([*spatial_part(0)(full).transforms, TransposeAxesTransform((0, 1, 2))])

    orders = set()
    for patch, _, coords, data, _ in samples(
        make_loader(make_trainer("nnUNetTrainer", tiny()), transforms=permuted), 6
    ):
        inside = ~np.isnan(coords[0])
        assert np.array_equal(patch[:, inside], data[(slice(None), *coords[:, inside].astype(int))])
        varies = [[np.nanmax(np.ptp(c, axis), initial=0) > 0 for axis in range(3)] for c in coords]
        orders.add(str(varies))
    assert len(orders) > 2


@pytest.mark.parametrize("kind", ["3d", "2d"])
def test_what_augmented_patches_wrote_other_augmented_patches_read(tiny, make_trainer, kind):
    """The whole chain: nnU-Net's loader, all of its augmentation, and the memory of confidence."""
    trainer = make_trainer("nnUNetTrainer", tiny(kind))
    loader = make_loader(trainer, batch_size=6)
    for transform in loader.transforms.transforms.transforms:
        if isinstance(transform, SpatialTransform):
            transform.p_rotation = transform.p_scaling = 0.7
    shapes = {key: loader._data.load_case(key)[0].shape[1:] for key in loader.indices}
    memory = ConfidenceMemory(shapes)

    def field(coords):
        z, y, x = coords
        return 0.5 + 0.4 * torch.stack(
            [torch.sin(y / 6) * torch.cos(x / 6), torch.cos(y / 9 + x / 9) * (z.round() % 2)]
        )

    def field_of_slices(coords):  # 2D: neighboring slices differ as much as they can
        return field(coords) if kind == "2d" else field(torch.stack([torch.ones_like(coords[0]), *coords[1:]]))

    for number in range(40):
        with seeded(1, number):
            batch = next(loader)
        for key, coords in zip(batch["keys"], positions_in(batch), strict=True):
            memory.write(str(key), coords, field_of_slices(coords).nan_to_num(0.0))

    errors, steepest = [], 0.4 * 2**0.5 / 6
    for key, shape in shapes.items():
        visited = memory.state()[key][0, 0] >= 0
        assert visited.float().mean() > (0.9 if kind == "3d" else 0.4)
        voxels = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij"))
        error = (memory.read(key, voxels) - field_of_slices(voxels)).abs()[:, visited]
        assert error.max() < steepest * 2**0.5 / 2 + 0.01  # half the diagonal of a pixel
        errors.append(error.mean())
    assert torch.stack(errors).mean() < 0.02


def test_workers_of_any_start_method_can_take_the_loader(tiny, make_trainer):
    loader = make_loader(make_trainer("nnUNetTrainer", tiny()))
    with seeded(0, "a"):
        here = next(loader)
    with seeded(0, "a"):
        there = next(pickle.loads(pickle.dumps(loader)))
    torch.testing.assert_close(here["coordinates"], there["coordinates"], rtol=0, atol=0, equal_nan=True)

    alone = start_workers(TwoStreamLoader(loader, None, 0, ("train", 0), 0), 0, pin_memory=False)
    forked = start_workers(TwoStreamLoader(loader, None, 0, ("train", 0), 0), 1, pin_memory=False)
    try:
        for _ in range(3):
            a, b = next(alone), next(forked)
            assert torch.equal(a["data"], b["data"])
            torch.testing.assert_close(a["coordinates"], b["coordinates"], rtol=0, atol=0, equal_nan=True)
    finally:
        forked._finish()


@pytest.mark.parametrize("lower", [(-2, 3), (0, 0), (4, -1)])
def test_positions_against_a_loop(lower):
    carried = homogeneous_coordinates(lower, (6, 5), (4, 7))
    assert carried.shape == (3, 4, 7)
    for i in range(4):
        for j in range(7):
            z, y = lower[0] + i, lower[1] + j
            assert carried[:, i, j].tolist() == ([z, y, 1] if 0 <= z < 6 and 0 <= y < 5 else [0, 0, 0])


def test_next_to_a_border_only_what_is_inside_counts():
    """Interpolation with the zeros outside must not pull a position towards 0, however far from 0 the case is."""

    def blend(**sample):  # 0.0005 of a voxel outside, still taken as inside
        sample["regression_target"] = 0.9995 * sample["regression_target"][:, :1]
        return sample

    track = TrackCoordinates(blend)
    track.crop = [500, 700], [1000, 1000]
    track(image=torch.zeros(1, 2, 2))
    torch.testing.assert_close(track.coordinates[0][:, 0, 0], torch.tensor([500.0, 700.0]), rtol=0, atol=1e-3)


def test_without_transforms_coordinates_are_those_of_the_crop(tiny, make_trainer):
    trainer = make_trainer("nnUNetTrainer", tiny())
    dataset, _ = trainer.get_tr_and_val_datasets()
    loader = CoordinateLoader(dataset, 2, (8, 8, 8), (8, 8, 8), trainer.label_manager)
    batch = next(loader)
    for patch, coords, key in zip(batch["data"], positions_in(batch), batch["keys"], strict=True):
        data = torch.from_numpy(np.asarray(dataset.load_case(key)[0][:]))
        assert torch.equal(patch, data[(slice(None), *coords.long())])


def test_a_transform_that_forgets_regression_targets_is_found_out(tiny, make_trainer):
    class Forgetful(BasicTransform):
        def _apply_to_image(self, img, **params):
            return img

        def _apply_to_segmentation(self, segmentation, **params):
            return segmentation

    loader = make_loader(make_trainer("nnUNetTrainer", tiny()), transforms=lambda full: Forgetful())
    with pytest.raises(RuntimeError, match="dropped the regression target"):
        next(loader)
