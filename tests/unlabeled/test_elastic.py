"""Elastic deformation: image and label stay together, nothing folds, and it is asked for or not there at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA import nnUNetTrainerNoDA

from nnunet_ssl import trainers
from nnunet_ssl.errors import UserError
from nnunet_ssl.unlabeled.elastic import deform_elastically


@pytest.fixture(autouse=True)
def seed():
    np.random.seed(0)
    torch.manual_seed(0)


def spatial_part(patch_size, probability=1.0, dummy_2d=False):
    """What nnU-Net does to a patch in space, here without rotation and scaling: those are nnU-Net's."""
    transforms = nnUNetTrainer.get_training_transforms(patch_size, (0.0, 0.0), None, (), dummy_2d, [False])
    transforms = ComposeTransforms(transforms.transforms[: 3 if dummy_2d else 1])
    deform_elastically(transforms, probability, "nnUNetTrainer")
    (spatial,) = (t for t in transforms.transforms if isinstance(t, SpatialTransform))
    spatial.p_rotation = spatial.p_scaling = 0
    return transforms, spatial


def smooth_image(shape):
    """Waves, different along each axis."""
    axes = torch.meshgrid(*(torch.arange(n).float() for n in shape), indexing="ij")
    return sum(torch.sin(x / (4 + i) + i) for i, x in enumerate(axes))[None]


@pytest.mark.parametrize(
    ("patch_size", "dummy_2d"), [((48, 32), False), ((20, 32, 24), False), ((6, 32, 40), True)], ids=str
)
def test_image_and_label_are_deformed_together(patch_size, dummy_2d):
    transforms, _ = spatial_part(patch_size, dummy_2d=dummy_2d)
    image = smooth_image([n + 0 * i if dummy_2d and i == 0 else n + 12 for i, n in enumerate(patch_size)])
    for _ in range(5):
        out = transforms(image=image.clone(), segmentation=(image > 0.3).to(torch.int16))
        moved, label = out["image"], out["segmentation"]
        assert moved.shape[1:] == label.shape[1:] == patch_size
        inner = moved if dummy_2d else image[(0, *(slice(6, -6) for _ in patch_size))]
        if dummy_2d:
            inner = image[0, :, 6:-6, 6:-6]
        assert (moved[0] - inner).abs().mean() > 0.05  # it is another shape
        clear = (moved - 0.3).abs() > 0.15  # not where interpolation of image and of label may differ
        assert clear.float().mean() > 0.7
        assert ((moved > 0.3) == (label == 1))[clear].float().mean() > 0.998


def test_slices_that_are_augmented_one_by_one_are_deformed_alike():
    transforms, _ = spatial_part((6, 32, 40), dummy_2d=True)
    image = smooth_image((44, 52))[:, None].expand(1, 6, 44, 52)
    moved = transforms(image=image.clone())["image"][0]
    assert torch.equal(moved, moved[:1].expand_as(moved))


@pytest.mark.parametrize("size", [(32, 32), (20, 28, 20), (12, 32, 32)], ids=str)
def test_fields_are_smooth_large_enough_and_never_fold(size):
    _, spatial = spatial_part(size)
    strengths = []
    for _ in range(20):
        offsets = spatial.get_parameters(image=torch.zeros(1, *size))["elastic_offsets"].numpy()
        jacobian = np.eye(len(size)) + np.stack(
            [np.stack(np.gradient(offsets[..., d]), -1) for d in range(len(size))], -2
        )
        assert np.linalg.det(jacobian).min() > 0
        largest = np.abs(offsets).reshape(-1, len(size)).max(0) / size
        assert (largest <= 0.125 + 1e-6).all()
        strengths.append(largest.max())
    assert np.mean(strengths) > 0.03


def test_the_probability_is_that_of_patches():
    _, spatial = spatial_part((16, 16), probability=0.3)
    image = torch.zeros(1, 16, 16)
    deformed = [spatial.get_parameters(image=image)["elastic_offsets"] is not None for _ in range(1000)]
    assert np.mean(deformed) == pytest.approx(0.3, abs=0.05)


def transforms_of(trainer):
    loader = trainer.dataloader_train.data_loader
    unlabeled = [] if loader.unlabeled is None else [loader.unlabeled.transforms]
    return [loader.labeled.transforms, *unlabeled], trainer.dataloader_val.data_loader.labeled.transforms


def spatial_of(transforms):
    return [t for t in transforms.transforms if isinstance(t, SpatialTransform)]


def test_both_streams_of_a_trainer_and_no_validation_patch(tiny, make_trainer):
    trainer = make_trainer("nnUNetTrainerCPS_1epochs", tiny(), settings={"elastic_deformation": 0.3})
    trainer.run_training()
    training, validation = transforms_of(trainer)
    assert [[t.p_elastic_deform for t in spatial_of(transforms)] for transforms in training] == [[0.3], [0.3]]
    assert spatial_of(validation) == []


def test_pretraining_patches_too(tiny, make_trainer):
    trainer = make_trainer("nnUNetTrainerMAE_1epochs", tiny(), settings={"elastic_deformation": 0.3})
    trainer.on_train_start()
    ((patches,), validation) = transforms_of(trainer)
    assert [t.p_elastic_deform for t in spatial_of(patches)] == [0.3]
    assert spatial_of(validation) == []


def test_it_changes_batches_only_where_it_is_asked_for(tiny, make_trainer):
    """And what it draws follows from the seed, so that a resumed run sees the same."""
    batches = {}
    for p in (None, 0.0, 1.0, 1.0):
        settings = {} if p is None else {"elastic_deformation": p}
        trainer = make_trainer("nnUNetTrainerCPS", tiny(), settings=settings)
        trainer.on_train_start()
        batch = next(trainer.dataloader_train)
        tensors = [batch["data"], batch["unlabeled"], *batch["target"]]
        if p in batches:
            assert all(torch.equal(a, b) for a, b in zip(batches[p], tensors, strict=True))
        batches[p] = tensors
        if not p:
            plain = nnUNetTrainer.get_training_transforms((16, 16, 16), (0, 0), None, (), False, [False])
            (spatial,) = spatial_of(transforms_of(trainer)[0][0])
            assert spatial.elastic_deform_magnitude == spatial_of(plain)[0].elastic_deform_magnitude
    assert all(torch.equal(a, b) for a, b in zip(batches[None], batches[0.0], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(batches[0.0], batches[1.0], strict=True))


def test_coordinates_go_along(tiny, make_trainer):
    """SASNet's memory reads where each voxel of a patch comes from: there the case has that label."""
    trainer = make_trainer("nnUNetTrainerSASNet", tiny(), settings={"elastic_deformation": 1.0, "sasnet_views": "off"})
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    dataset, _ = trainer.get_tr_and_val_datasets()
    for case, coordinates, target in zip(batch["keys"], batch["coordinates"], batch["target"][0], strict=True):
        labels = torch.from_numpy(np.asarray(dataset.load_case(case)[1]))[0]
        known = coordinates.isfinite().all(0)
        d, h, w = coordinates[:, known].round().long()
        agree = labels[d, h, w].clamp(min=0) == target[0][known]
        assert agree.float().mean() > 0.9
        steps = coordinates.diff(dim=-1).abs()
        assert not torch.allclose(steps[steps.isfinite()], steps[steps.isfinite()].round(), atol=1e-3)  # not a shift


def test_transforms_without_a_spatial_one_are_refused(tiny, make_trainer, monkeypatch):
    name = "nnUNetTrainerPlainlyShown"
    monkeypatch.setattr(trainers, name, type(name, (trainers.nnUNetTrainerCPS, nnUNetTrainerNoDA), {}), raising=False)
    trainer = make_trainer(name, tiny(), settings={"elastic_deformation": 0.3})
    with pytest.raises(UserError, match=rf"elastic_deformation is 0\.3, but .* of {name} have no SpatialTransform"):
        trainer.on_train_start()
