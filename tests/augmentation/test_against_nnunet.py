"""nnU-Net's training transforms on equal draws: one sample by nnU-Net, another by the two parts of ours."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ssl.augmentation import intensity
from nnunet_ssl.augmentation.deferred import INTENSITY, Deferred, DeferredTransforms, GaussianNoiseTransform, draw
from nnunet_ssl.augmentation.device import DeviceTransforms
from nnunet_ssl.errors import UserError
from nnunet_ssl.randomness import seeded

CPU = torch.device("cpu")
ROTATION = {2: (-np.pi, np.pi), 3: (-np.pi / 6, np.pi / 6)}


def nnunets(patch, *, channels=1, slices=False, masks=False, regions=None, ignore_label=None, scales=None, always=()):
    """nnU-Net's transforms; those of the types in ``always`` are applied to every sample."""
    transforms = nnUNetTrainer.get_training_transforms(
        patch,
        ROTATION[2 if slices else len(patch)],
        scales,
        tuple(range(len(patch))),
        slices,
        use_mask_for_norm=[masks] * channels,
        regions=regions,
        ignore_label=ignore_label,
    )
    for transform in transforms.transforms:
        if isinstance(transform, RandomTransform):
            inner = transform.transform
            if isinstance(inner, GaussianBlurTransform):
                inner.benchmark = False
            if isinstance(inner, always):
                transform.apply_probability, inner.p_per_channel = 1, 1
        elif isinstance(transform, SpatialTransform) and SpatialTransform in always:
            transform.p_rotation = transform.p_scaling = 1
    return transforms


def without(transforms, *types):
    transforms.transforms = [t for t in transforms.transforms if not isinstance(getattr(t, "transform", t), types)]
    return transforms


def a_sample(size, channels=1, labels=3, blocks=3):
    """An image, and labels in blocks with some -1, as outside of the image."""
    image = torch.randn(channels, *size)
    coarse = torch.randint(-1, labels, [-(-n // blocks) for n in size])
    for axis, n in enumerate(size):
        coarse = coarse.repeat_interleave(blocks, axis).narrow(axis, 0, n)
    return {"image": image, "segmentation": coarse[None].to(torch.int16)}


def both(transforms, sample, labels, seed):
    """What nnU-Net makes of a sample, and what ours makes of it."""
    deferred = DeferredTransforms(transforms, "nnUNetTrainer")
    device = DeviceTransforms(deferred.steps, labels, CPU)
    copy = {name: value.clone() for name, value in sample.items()}
    with seeded(0, "sample", seed):
        theirs = transforms(**copy)
    with seeded(0, "sample", seed):
        assert all(value.numel() == 0 for value in deferred(**sample).values())
    images, target = device(Deferred(*deferred.take()))
    ours = [t[0] for t in target] if isinstance(target, list) else target[0]
    return theirs, {"image": images[0], "segmentation": ours}


def assert_alike(theirs, ours, atol=2e-5):
    """Images up to rounding; labels all but a few, whose scores are equal up to rounding."""
    torch.testing.assert_close(ours["image"], theirs["image"], rtol=1e-4, atol=atol)
    a, b = (x["segmentation"] if isinstance(x["segmentation"], list) else [x["segmentation"]] for x in (theirs, ours))
    for of_theirs, of_ours in zip(a, b, strict=True):
        assert of_ours.shape == of_theirs.shape
        assert of_ours.dtype == of_theirs.dtype
        assert (of_ours != of_theirs).float().mean() < 5e-4


KINDS = {
    "2d": {"patch": (24, 20), "crop": (34, 32)},
    "3d": {"patch": (16, 14, 12), "crop": (25, 24, 21)},
    "anisotropic": {"patch": (6, 20, 24), "crop": (6, 33, 38), "slices": True},
    "channels": {"patch": (16, 14, 12), "crop": (25, 24, 21), "channels": 3, "masks": True},
    "regions": {"patch": (16, 14, 12), "crop": (25, 24, 21), "regions": [(1, 2), 2]},
    "regions, ignored": {"patch": (16, 14, 12), "crop": (25, 24, 21), "regions": [(1, 2), 2], "ignore_label": 3},
    "deep supervision": {"patch": (16, 16, 16), "crop": (25, 24, 26), "scales": [[1] * 3, [0.5] * 3, [0.25, 0.5, 0.5]]},
    "crop smaller than what is seen": {"patch": (16, 14, 12), "crop": (16, 14, 12)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("always", [(), (SpatialTransform,), (SpatialTransform, *INTENSITY)])
def test_the_whole_of_it(kind, always):
    """All but noise, which is drawn elsewhere."""
    asked = dict(KINDS[kind])
    crop, channels = asked.pop("crop"), asked.get("channels", 1)
    transforms = without(nnunets(**asked, always=always), GaussianNoiseTransform)
    changed = 0
    for seed in range(12):
        torch.manual_seed(seed)
        sample = a_sample(crop, channels, labels=4 if asked.get("ignore_label") else 3)
        theirs, ours = both(transforms, sample, [0, 1, 2, 3], seed)
        assert_alike(theirs, ours)
        changed += not torch.equal(theirs["image"], sample["image"])
    assert changed


@pytest.mark.parametrize("one", INTENSITY)
@pytest.mark.parametrize("kind", ["2d", "3d", "anisotropic", "channels"])
def test_each_change_of_intensity(one, kind):
    """On equal draws; of noise, on an equal seed."""
    asked = dict(KINDS[kind])
    crop, channels = asked.pop("crop"), asked.get("channels", 1)
    for transform in nnunets(**asked, always=(one,)).transforms:
        transform = getattr(transform, "transform", transform)
        if type(transform) is not one:
            continue
        image = torch.randn(channels, *crop)
        with seeded(0, "draws"):
            drawn = draw(transform, image)
        with seeded(0, "draws"):
            theirs = transform.get_parameters(image=image)
        ours = intensity.apply(transform, image.clone(), drawn, torch.Generator())
        if one is GaussianNoiseTransform:
            torch.manual_seed(drawn["seed"])
        theirs = transform._apply_to_image(image.clone(), **theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert not torch.equal(ours, image)


def test_noise_by_channel():
    transform = GaussianNoiseTransform((0.5, 1), 0.5, False)
    image = torch.zeros(6, 30, 30)
    with seeded(1):
        drawn = draw(transform, image)
    noisy = intensity.apply(transform, image.clone(), drawn, torch.Generator())
    expected = torch.zeros(6)
    expected[drawn["apply_idx"]] = torch.tensor(drawn["sigmas"])
    assert 0 < drawn["num_apply"] < 6
    torch.testing.assert_close(noisy.flatten(1).std(1), expected, rtol=0.1, atol=0)


def test_labels_where_many_meet_and_the_patch_reaches_outside():
    """Blocks of one voxel: several labels with equal scores, and a third of the patch is outside of the image."""
    transforms = nnunets((15, 15, 15), always=(SpatialTransform,))
    transforms.transforms = transforms.transforms[:1]
    outside = 0
    for seed in range(8):
        torch.manual_seed(seed)
        theirs, ours = both(transforms, a_sample((13, 14, 15), labels=9, blocks=1), range(9), seed)
        assert_alike(theirs, ours)
        outside += (theirs["segmentation"] == -1).float().mean() > 0.2
    assert outside


def test_ties_go_to_the_nearest_voxel():
    """Half a voxel away from each center every score is a tie."""
    transforms = nnunets((8, 8), always=(SpatialTransform,))
    spatial = transforms.transforms[0]
    transforms.transforms = [spatial]
    spatial.p_rotation, spatial.scaling = 0, 0.5  # positions end with .25 and .75; of crops of odd size with .0 and .5
    for size in ((14, 14), (15, 15)):
        theirs, ours = both(transforms, a_sample(size, labels=5, blocks=1), range(5), 0)
        assert torch.equal(theirs["segmentation"], ours["segmentation"])


def test_what_is_sent():
    """A patch that stays as it is, is sent as it is; one that shrinks or turns, with what it needs and no more."""
    transforms = nnunets((32, 32, 32))
    spatial = transforms.transforms[0]
    transforms.transforms = [spatial]
    sizes = {}
    for name, rotation, scaling in (("still", 0, 0), ("smaller", 0, 1), ("turned", 1, 0)):
        spatial.p_rotation, spatial.p_scaling, spatial.scaling, spatial.rotation = rotation, scaling, 0.75, 0.1
        deferred = DeferredTransforms(transforms, "nnUNetTrainer")
        for _ in range(2):
            deferred(**a_sample((52, 52, 52)))
        images, segmentations, samples = deferred.take()
        assert len(images) == len(segmentations)
        assert images.dtype == torch.float32
        assert segmentations.dtype == torch.int16
        assert len(samples) < 2000
        sizes[name] = len(images) / 2
        assert not pickle.loads(deferred.take().samples)  # they are given once
    assert sizes["still"] == 32**3
    assert sizes["smaller"] <= 28**3
    assert 32**3 < sizes["turned"] < 52**3


def test_a_batch_can_be_augmented_twice():
    """Nothing is done in place to what the loader gave, and noise is the same again."""
    transforms = nnunets((12, 12), always=(GaussianNoiseTransform,))
    deferred = DeferredTransforms(transforms, "nnUNetTrainer")
    for _ in range(3):
        deferred(**a_sample((18, 18)))
    batch = deferred.take()
    device = DeviceTransforms(deferred.steps, [0, 1, 2], CPU)
    once, again = device(batch), device(batch)
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])
    assert once[0].shape == (3, 1, 12, 12)


class Another(SpatialTransform):
    """Which may do anything."""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda spatial: setattr(spatial, "p_elastic_deform", 0.1), "SpatialTransform"),
        (lambda spatial: setattr(spatial, "mode_seg", "nearest"), "SpatialTransform"),
        (lambda spatial: setattr(spatial, "__class__", Another), "Another"),
    ],
)
def test_other_transforms_are_refused(change, named):
    transforms = nnunets((12, 12))
    change(transforms.transforms[0])
    with pytest.raises(UserError, match=rf"augment is 'device', but .* of Mine have a {named} that only workers can"):
        DeferredTransforms(transforms, "Mine")


def test_transforms_of_another_kind_are_refused():
    with pytest.raises(UserError, match="have a function that"):
        DeferredTransforms(lambda **sample: sample, "Mine")


def test_nnunets_loader_takes_it(tiny, make_trainer):
    """The draws come from nnU-Net's generators in its order: the crops are those of a loader without transforms."""
    trainer = make_trainer("nnUNetTrainerLabeledOnly", tiny())
    dataset, _ = trainer.get_tr_and_val_datasets()
    transforms = DeferredTransforms(nnunets((16, 16, 16)), "nnUNetTrainer")
    loader = nnUNetDataLoader(dataset, 2, (24, 24, 24), (16, 16, 16), trainer.label_manager, transforms=transforms)
    batch = loader.generate_train_batch()
    assert batch["data"].shape == (2, 0)
    assert len(batch["keys"]) == 2
    assert len(transforms.take().images) >= 2 * 16**3
