"""Two streams from one pool of workers, in an order that depends on the seed alone."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch

from nnunet_ssl.randomness import derived_seed, seeded
from nnunet_ssl.unlabeled.loader import UnlabeledDataset


def batches(trainer, number, first=0, workers=0, monkeypatch=None):
    """The first batches that a trainer would see."""
    if monkeypatch is not None:
        monkeypatch.setattr("nnunet_ssl.trainers.data.get_allowed_n_proc_DA", lambda: workers)
    trainer.current_epoch = first // trainer.num_iterations_per_epoch
    trainer.initialize() if not trainer.was_initialized else None
    trainer.unlabeled = trainer._prepared_unlabeled() if trainer.uses_unlabeled else None
    train, val = trainer.get_dataloaders()
    made = [next(train) for _ in range(number)]
    for loader in (train, val):
        getattr(loader, "_finish", lambda: None)()
    return made


def assert_same(a, b, keys=("data", "unlabeled")):
    for key in keys:
        assert torch.equal(a[key], b[key]), key
    assert list(a["keys"]) == list(b["keys"])
    assert all(torch.equal(x, y) for x, y in zip(a["target"], b["target"], strict=True))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_do_not_depend_on_the_number_of_workers(tiny, make_trainer, monkeypatch, workers):
    alone = batches(make_trainer("nnUNetTrainerCPS", tiny()), 5, workers=0, monkeypatch=monkeypatch)
    shared = batches(make_trainer("nnUNetTrainerCPS", tiny()), 5, workers=workers, monkeypatch=monkeypatch)
    for a, b in zip(alone, shared, strict=True):
        assert_same(a, b)
    assert not torch.equal(alone[0]["data"], alone[1]["data"])


def test_a_resumed_run_sees_the_batches_that_were_to_come(tiny, make_trainer):
    whole = batches(make_trainer("nnUNetTrainerCPS", tiny()), 4)
    rest = batches(make_trainer("nnUNetTrainerCPS", tiny()), 2, first=2)
    for a, b in zip(whole[2:], rest, strict=True):
        assert_same(a, b)


def test_trainers_with_one_seed_see_the_same_labeled_batches(tiny, make_trainer):
    cps = batches(make_trainer("nnUNetTrainerCPS", tiny()), 3)
    labeled_only = batches(make_trainer("nnUNetTrainerLabeledOnly", tiny()), 3)
    other_seed = batches(make_trainer("nnUNetTrainerLabeledOnly", tiny(), settings={"seed": 1}), 3)
    for a, b, c in zip(cps, labeled_only, other_seed, strict=True):
        assert_same(a, b, keys=("data",))
        assert "unlabeled" not in b
        assert not torch.equal(a["data"], c["data"])


@pytest.mark.parametrize("kind", ["3d", "2d", "multichannel", "ignore", "regions"])
def test_unlabeled_patches_have_the_shape_of_labeled_ones(tiny, make_trainer, kind):
    (batch,) = batches(make_trainer("nnUNetTrainerCPS", tiny(kind)), 1)
    assert batch["unlabeled"].shape == batch["data"].shape
    assert batch["unlabeled"].dtype == torch.float32
    assert batch["unlabeled"].std() > 0.1


def test_unlabeled_patches_are_drawn_uniformly_and_without_any_label(tiny, make_trainer, monkeypatch):
    """No draw is steered to a class, and every position is as likely as any other."""
    trainer = make_trainer("nnUNetTrainerCPS", tiny())
    monkeypatch.setattr("nnunet_ssl.trainers.data.get_allowed_n_proc_DA", lambda: 0)
    trainer.unlabeled = trainer._prepared_unlabeled()
    loader = trainer.get_dataloaders()[0].data_loader.unlabeled
    assert not any(loader.get_do_oversample(i) for i in range(loader.batch_size))
    shape = [p + 3 for p in loader.patch_size]
    with seeded(0, "positions"):
        lower = np.array([loader.get_bbox(np.array(shape), False, {})[0] for _ in range(3000)])
    for axis in range(3):
        positions, counts = np.unique(lower[:, axis], return_counts=True)
        assert len(positions) > 3
        assert counts.min() > 0.7 * counts.mean()


def test_workers_of_any_start_method_can_take_the_loader(tiny, make_trainer, monkeypatch):
    trainer = make_trainer("nnUNetTrainerCPS", tiny())
    monkeypatch.setattr("nnunet_ssl.trainers.data.get_allowed_n_proc_DA", lambda: 0)
    trainer.unlabeled = trainer._prepared_unlabeled()
    loader = trainer.get_dataloaders()[0].data_loader
    assert_same(next(pickle.loads(pickle.dumps(loader))), next(loader))


def test_an_unlabeled_case_knows_no_class(tiny, make_trainer):
    trainer = make_trainer("nnUNetTrainerCPS", tiny())
    prepared = trainer._prepared_unlabeled()
    _, mask, _, properties = UnlabeledDataset(prepared.places).load_case(prepared.cases[0])
    assert properties["class_locations"] == {}
    assert set(np.unique(mask[:])) <= {-1, 0}


def test_seeding_is_by_purpose_and_leaves_the_callers_generators_alone():
    assert len({derived_seed(0, "train", 0, n) for n in range(1000)}) == 1000
    assert derived_seed(0, "a", 1) != derived_seed(1, "a", 1) != derived_seed(0, "b", 1)

    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    def inside():
        with seeded(3, "x"):
            return draw()

    assert inside() == inside()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    inside()
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
