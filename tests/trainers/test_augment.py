"""``augment: "device"``, with every trainer: the batches of the workers, up to noise and rounding."""

from __future__ import annotations

import pickle

import pytest
import torch
from helpers.runs import assert_resumed_equals_uninterrupted
from helpers.steps import ONE_WITH_SHTA, stepped
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ssl.augmentation.deferred import GaussianNoiseTransform
from nnunet_ssl.errors import UserError

DEVICE = {"augment": "device"}


def batches(trainer, number, workers, monkeypatch):
    """The first batches, as a method's ``losses`` takes them."""
    monkeypatch.setattr("nnunet_ssl.trainers.data.get_allowed_n_proc_DA", lambda: workers)
    trainer.unlabeled = trainer._prepared_unlabeled() if trainer.uses_unlabeled else None
    train, val = trainer.get_dataloaders()
    made = [trainer._to_device(next(train)) for _ in range(number)]
    for loader in (train, val):
        getattr(loader, "_finish", lambda: None)()
    return made


def assert_alike(a, b, exactly=False):
    """Of one kind, cases and labels; images up to rounding, labels all but a few with equal scores."""
    close = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-4, "atol": 2e-5}
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is None:
            continue
        torch.testing.assert_close(x.images, y.images, **close)
        assert x.cases == y.cases
        assert (x.target is None) == (y.target is None)
        for s, t in zip(x.target or [], y.target or [], strict=True):
            assert s.shape == t.shape
            assert s.dtype == t.dtype
            assert (s != t).float().mean() <= (0 if exactly else 1e-3)


@pytest.fixture
def without_noise(monkeypatch):
    """nnU-Net's transforms with all but noise, which the device draws itself."""
    plain = nnUNetTrainer.get_training_transforms

    def transforms(*args, **kwargs):
        made = plain(*args, **kwargs)
        for transform in made.transforms:
            if isinstance(getattr(transform, "transform", None), GaussianNoiseTransform):
                transform.apply_probability = 0
        return made

    monkeypatch.setattr(nnUNetTrainer, "get_training_transforms", staticmethod(transforms))


@pytest.mark.parametrize(
    ("name", "kind", "masks"),
    [
        ("nnUNetTrainerCPS", "3d", False),
        ("nnUNetTrainerCPS", "3d", True),
        ("nnUNetTrainerCPS", "2d", False),
        ("nnUNetTrainerCPS", "multichannel", False),
        ("nnUNetTrainerCPS", "ignore", False),
        ("nnUNetTrainerCPS", "regions", False),
        ("nnUNetTrainerURPC", "anisotropic", False),
    ],
)
def test_both_streams_are_those_of_the_workers(tiny, make_trainer, monkeypatch, without_noise, name, kind, masks):
    """Through the loaders and the step: crops, draws, resampled labels, masks, regions, deep supervision."""
    made = {}
    for augment in ("workers", "device"):
        trainer = make_trainer(name, tiny(kind), settings={"augment": augment})
        if masks:
            trainer.configuration_manager.configuration["use_mask_for_norm"] = [True] * trainer.num_input_channels
        made[augment] = batches(trainer, 8, 0, monkeypatch)
    assert made["workers"][0].unlabeled is not None
    for workers, device in zip(made["workers"], made["device"], strict=True):
        assert_alike(workers, device)
    assert any(not torch.equal(w[0].images, d[0].images) for w, d in zip(*made.values(), strict=True))  # resampled


@pytest.mark.parametrize("name", [name for name in ONE_WITH_SHTA if name != "nnUNetTrainerSASNet"])
def test_every_trainer_takes_it(tiny, make_trainer, name):
    found = stepped(make_trainer(name, tiny(), settings=DEVICE))
    assert all(p.isfinite().all() for p in found.values())


def test_warps_are_taken_too(tiny, make_trainer, monkeypatch):
    monkeypatch.setattr("nnunet_ssl.shapes.quality.TOO_FEW", 0.0)
    trainer = make_trainer("nnUNetTrainerWarps", tiny(), settings={**DEVICE, "warped_share": 1.0})
    stepped(trainer)
    batch = next(trainer.dataloader_train)
    assert set(batch["keys"]) <= set(trainer.warps.cases)
    assert trainer._to_device(batch).labeled.images.std() > 0.1


def test_batches_do_not_depend_on_the_number_of_workers(tiny, make_trainer, monkeypatch):
    """Noise included; and another rank has others."""
    alone = batches(make_trainer("nnUNetTrainerCPS", tiny(), settings=DEVICE), 6, 0, monkeypatch)
    shared = batches(make_trainer("nnUNetTrainerCPS", tiny(), settings=DEVICE), 6, 2, monkeypatch)
    for a, b in zip(alone, shared, strict=True):
        assert_alike(a, b, exactly=True)
    other = make_trainer("nnUNetTrainerCPS", tiny(), settings=DEVICE)
    other.local_rank = 1
    monkeypatch.setattr(other, "_prepared_unlabeled", make_trainer("nnUNetTrainerCPS", tiny())._prepared_unlabeled)
    (of_other_rank,) = batches(other, 1, 0, monkeypatch)
    assert not torch.equal(of_other_rank.labeled.images, alone[0].labeled.images)


def test_resumed_it_ends_with_the_same_weights(tiny, make_trainer):
    settings = {**DEVICE, "save_every": 1, "num_iterations_per_epoch": 6}
    assert_resumed_equals_uninterrupted(lambda: make_trainer("nnUNetTrainerURPC_3epochs", tiny(), settings=settings))


def test_workers_of_any_start_method_can_take_the_loader(tiny, make_trainer, monkeypatch):
    trainer = make_trainer("nnUNetTrainerCPS", tiny(), settings=DEVICE)
    monkeypatch.setattr("nnunet_ssl.trainers.data.get_allowed_n_proc_DA", lambda: 0)
    trainer.unlabeled = trainer._prepared_unlabeled()
    loader = trainer.get_dataloaders()[0].data_loader
    ours, theirs = next(pickle.loads(pickle.dumps(loader))), next(loader)
    assert_alike(trainer._to_device(ours), trainer._to_device(theirs), exactly=True)


def test_sasnet_and_elastic_deformation_are_refused(tiny, make_trainer):
    with pytest.raises(UserError, match=r"settings_0\.json sets 'augment' to 'device', but nnUNetTrainerSASNet takes"):
        make_trainer("nnUNetTrainerSASNet", tiny(), settings=DEVICE)
    with pytest.raises(UserError, match=r"sets 'elastic_deformation', which only workers can do; leave it out"):
        make_trainer("nnUNetTrainerCPS", tiny(), settings={**DEVICE, "elastic_deformation": 0.3})
