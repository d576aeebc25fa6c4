"""Two streams from one pool of workers, in an order that depends on the seed alone."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import random
import signal
import time
from itertools import cycle, islice

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform

from nnunet_ssl.randomness import derived_seed, seeded
from nnunet_ssl.unlabeled.loader import TwoStreamLoader, UnlabeledDataset, start_workers


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


def unlabeled_loader(trainer, monkeypatch, *, mask_for_norm=False, slice_by_slice=False):
    """The unlabeled stream of a trainer, made in this process."""
    monkeypatch.setattr("nnunet_ssl.trainers.data.get_allowed_n_proc_DA", lambda: 0)
    trainer.unlabeled = trainer._prepared_unlabeled()
    trainer.configuration_manager.configuration["use_mask_for_norm"] = [mask_for_norm]
    if slice_by_slice:  # as for patches that are three times as long as they are thick
        rotation, _, size, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        size = (trainer.configuration_manager.patch_size[0], *size[1:])
        monkeypatch.setattr(
            trainer,
            "configure_rotation_dummyDA_mirroring_and_inital_patch_size",
            lambda: (rotation, True, size, axes),
        )
    return trainer.get_dataloaders()[0].data_loader.unlabeled


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


class Uneven(TwoStreamLoader):
    """Some batches take much longer than others, and workers write down what they have begun."""

    begun = multiprocessing.Value("i", 0)
    go_on = multiprocessing.Event()

    def batch(self, number):
        with self.begun:
            self.begun.value += 1
        if number == self.waits_at:
            assert self.go_on.wait(60)
        time.sleep(random.Random(number).choice([0, 0, 0, 0.05, 0.3]))
        if number == self.raises_at:
            raise ValueError("of this batch")
        if number == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.fft.fftn(torch.rand(64, 64, 64))  # as nnU-Net's blur may do
        return super().batch(number)


@pytest.fixture
def uneven(tiny, make_trainer, monkeypatch):
    """Workers for the batches from the third on, or with 0 of them the batches one after the other."""
    monkeypatch.setattr("nnunet_ssl.trainers.data.get_allowed_n_proc_DA", lambda: 0)
    trainer = make_trainer("nnUNetTrainerCPS", tiny())
    trainer.unlabeled = trainer._prepared_unlabeled()
    made = trainer.get_dataloaders()[0].data_loader
    monkeypatch.setattr(Uneven, "begun", multiprocessing.Value("i", 0))
    monkeypatch.setattr(Uneven, "go_on", multiprocessing.Event())
    started = []

    def start(workers, waits_at=None, raises_at=None, dies_at=None):
        loader = Uneven(made.labeled, made.unlabeled, 0, ("train", 0), first_batch=3)
        loader.waits_at, loader.raises_at, loader.dies_at = waits_at, raises_at, dies_at
        started.append(start_workers(loader, workers, pin_memory=False))
        return started[-1]

    yield start
    for workers in started:
        getattr(workers, "_finish", lambda: None)()


def test_workers_of_unlike_speed_give_the_batches_one_after_the_other(uneven):
    alone, shared = uneven(0), uneven(5)
    for _ in range(30):
        assert_same(next(alone), batch := next(shared))
        assert batch.keys() == {"data", "target", "keys", "unlabeled"}


def test_a_slow_batch_holds_up_no_other_and_memory_is_bounded(uneven):
    """While one worker is at the first batch, the others make all that may be in flight, and no more."""
    workers = uneven(3, waits_at=3)
    in_flight = 3 + 12
    deadline = time.monotonic() + 60
    while Uneven.begun.value < in_flight and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    assert Uneven.begun.value == in_flight
    Uneven.go_on.set()
    alone = uneven(0)
    for _ in range(in_flight + 5):
        assert_same(next(alone), next(workers))


@pytest.mark.parametrize("failure", ["raises_at", "dies_at"])
def test_a_worker_that_fails_ends_it(uneven, failure, capfd):
    workers = uneven(3, **{failure: 6})
    with pytest.raises(RuntimeError, match="One or more background workers are no longer alive"):
        list(islice(workers, 30))
    assert ("of this batch" in capfd.readouterr().err) == (failure == "raises_at")


def test_workers_without_a_ticket_end_when_they_are_told(uneven):
    """By themselves: nnU-Net's augmenter would kill them after some seconds."""
    workers = uneven(3)
    while workers._queue.qsize() + workers.results_loop_queue.qsize() < 3 + 12:
        time.sleep(0.01)
    processes = list(workers._processes)
    workers._finish()
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_workers_transform_after_this_process_has_used_threads(uneven):
    """A fork has the number of OpenMP's threads but not the threads: a worker's FFT would wait for them for ever."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.fft.fftn(torch.rand(64, 64, 64))
        workers = uneven(2)
        list(islice(workers, 20))
    finally:
        torch.set_num_threads(threads)


def test_a_resumed_run_sees_the_batches_that_were_to_come(tiny, make_trainer):
    whole = batches(make_trainer("nnUNetTrainerCPS", tiny()), 4)
    rest = batches(make_trainer("nnUNetTrainerCPS", tiny()), 2, first=2)
    for a, b in zip(whole[2:], rest, strict=True):
        assert_same(a, b)


def test_batches_do_not_depend_on_the_clock(tiny, make_trainer, monkeypatch):
    """By which nnU-Net's blur would choose, in each worker, between two ways that round differently."""
    made = []
    for direct, by_fft in [(0, 1), (1, 0)]:  # seconds that nine runs of each seem to take
        clock = cycle([0, direct] * 9 + [0, by_fft] * 9).__next__
        monkeypatch.setattr("batchgeneratorsv2.transforms.noise.gaussian_blur.time", clock)
        made.append(batches(make_trainer("nnUNetTrainerCPS", tiny()), 12))
    for a, b in zip(*made, strict=True):
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
    loader = unlabeled_loader(trainer, monkeypatch)
    assert not any(loader.get_do_oversample(i) for i in range(loader.batch_size))
    shape = [p + 3 for p in loader.patch_size]
    with seeded(0, "positions"):
        lower = np.array([loader.get_bbox(np.array(shape), False, {})[0] for _ in range(3000)])
    for axis in range(3):
        positions, counts = np.unique(lower[:, axis], return_counts=True)
        assert len(positions) > 3
        assert counts.min() > 0.7 * counts.mean()


def with_transforms(loader, transforms, places):
    """The same loader, with masks and with transforms as nnU-Net composes them."""
    other = copy.copy(loader)
    other._data, other.transforms = UnlabeledDataset(places), ComposeTransforms(transforms)
    return other


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("nnUNetTrainerCPS", "3d", {"elastic_deformation": 0.5}),
        ("nnUNetTrainerCPS", "2d", {}),
        ("nnUNetTrainerCPS", "multichannel", {}),
        ("nnUNetTrainerCPS", "slice by slice", {}),
        ("nnUNetTrainerSASNet", "3d", {"sasnet_views": "permute"}),
        ("nnUNetTrainerSASNet", "3d", {"sasnet_views": "rotate"}),
    ],
)
def test_images_are_the_same_without_their_masks(tiny, make_trainer, monkeypatch, name, kind, settings):
    sliced = kind == "slice by slice"
    trainer = make_trainer(name, tiny("anisotropic" if sliced else kind), settings=settings)
    loader = unlabeled_loader(trainer, monkeypatch, slice_by_slice=sliced)
    assert any(isinstance(t, Convert2DTo3DTransform) for t in loader.transforms.transforms) == sliced
    masked = with_transforms(loader, loader.transforms.transforms, trainer.unlabeled.places)
    for number in range(40):
        with seeded(0, number):
            ours = next(loader)
        with seeded(0, number):
            theirs = next(masked)
        assert list(ours["keys"]) == list(theirs["keys"])
        assert torch.equal(ours["data"], theirs["data"])
        assert ours["target"].numel() == 0 < theirs["target"].numel()


def test_where_intensities_are_normalized_within_the_mask_what_is_outside_stays_zero(tiny, make_trainer, monkeypatch):
    trainer = make_trainer("nnUNetTrainerCPS", tiny())
    loader = unlabeled_loader(trainer, monkeypatch, mask_for_norm=True)
    transforms = [t for t in loader.transforms.transforms if not isinstance(t, MaskImageTransform)]
    unmasked = with_transforms(loader, transforms, trainer.unlabeled.places)
    changed = 0
    for number in range(10):
        with seeded(0, number):
            ours = next(loader)["data"]
        with seeded(0, number):
            theirs = next(unmasked)["data"]
        outside = ours != theirs
        assert (ours[outside] == 0).all()
        changed += outside.sum()
    assert changed > 0


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
