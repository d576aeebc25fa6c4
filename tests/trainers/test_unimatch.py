"""UniMatch: which voxels count, whose boxes come in, what the dropped features change, and what has a gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.runs import assert_resumed_equals_uninterrupted, commands_work
from helpers.steps import a_batch, gradients_by_passes, stepped

from nnunet_ssl.errors import UserError
from nnunet_ssl.losses.squared_dice import squared_dice_of_shown
from nnunet_ssl.trainers.unimatch import nnUNetTrainerUniMatch
from nnunet_ssl.views.mixing import Patches

NAME = "nnUNetTrainerUniMatch"
PLAIN = {"strong_jitter": 0, "strong_blur": 0, "strong_noise": 0, "unimatch_cutmix": 0, "unimatch_dropout": 0}
SURE = {"unimatch_threshold": 0.5}


def terms_of(trainer, batch):
    """The terms of each pass."""
    torch.manual_seed(0)
    return list(trainer.losses(trainer._to_device(batch)))


@pytest.mark.parametrize("kind", ["3d", "2d", "multichannel", "anisotropic", "ignore", "regions", "resenc"])
def test_every_kind_of_data_trains_and_its_terms_are_logged(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind), settings=SURE | {"unimatch_loss": "dice_ce"})
    stepped(trainer)
    values = trainer._mean_values()
    terms = {"loss_sup", "loss_strong", "loss_feature", "weight_strong", "weight_feature"}
    assert set(values) == terms | {"unimatch_sure"}
    assert 0 < values["loss_strong"] < 2 * (1 + np.log(3))
    assert 0 < values["unimatch_sure"] <= 1


@pytest.mark.parametrize("kind", ["3d", "regions"])
def test_the_order_of_passes_is_no_matter(tiny, make_trainer, kind):
    found = gradients_by_passes(lambda passes: make_trainer(NAME, tiny(kind), settings={"passes": passes, **SURE}))
    for parameter, gradient in found["lean"].items():
        if "seg_layers.0" not in parameter:
            assert gradient.abs().sum() > 0, parameter
            torch.testing.assert_close(gradient, found["joint"][parameter])


@pytest.mark.parametrize("kind", ["3d", "regions"])
def test_without_changes_all_three_views_are_the_weak_one(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind), settings=PLAIN | {"unimatch_threshold": 0.6})
    batch = a_batch(trainer)
    logits = trainer.plans_network(batch["unlabeled"])[0].detach()
    if kind == "regions":
        labels = logits > 0
        sure = (logits.sigmoid() >= 0.6) | (logits.sigmoid() <= 0.4)
    else:
        labels = logits.argmax(1, keepdim=True)
        sure = logits.softmax(1).amax(1, keepdim=True) >= 0.6
    assert 0 < sure.sum() < sure.numel()
    expected = squared_dice_of_shown(logits, labels, sure, kind == "regions")
    passes = terms_of(trainer, batch)
    assert [list(terms) for terms in passes] == [["sup"], ["strong"], ["strong"], ["feature"]]
    for terms in passes[1:]:
        torch.testing.assert_close(next(iter(terms.values())), expected)
    assert trainer._mean_values()["unimatch_sure"] == pytest.approx(sure.float().mean().item())


def test_where_nothing_is_sure_nothing_is_learned(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings={"unimatch_threshold": 1.0})
    for terms in terms_of(trainer, a_batch(trainer))[1:]:
        (loss,) = terms.values()
        assert loss.item() == 0
        loss.backward()
    assert not any(p.grad.any() for p in trainer.plans_network.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ["3d", "2d"])
def test_boxes_come_from_another_image_with_their_pseudo_labels(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind), settings=PLAIN | SURE | {"unimatch_cutmix": 1})
    weak = trainer._pseudo_labeled(
        torch.cat([a_batch(trainer)["unlabeled"]] * 2) + torch.arange(4.0).view(4, *[1] * (4 if kind == "3d" else 3))
    )
    first, second = (trainer._strong(weak, number) for number in range(2))
    shares = []
    for strong in (first, second):
        for b in range(4):
            moved = strong.images[b] != weak.images[b]
            shares.append(moved.float().mean().item())
            for mixed, own in zip(strong, weak, strict=True):
                assert torch.equal(mixed[b], torch.where(moved, own[b - 1], own[b]))
    assert all(0 < share < 0.5 for share in shares)
    assert len(set(shares)) > 4  # each image and view has a box of its own
    again = trainer._strong(weak, 0)
    assert torch.equal(again.images, first.images)
    trainer.global_step = 1
    assert not torch.equal(trainer._strong(weak, 0).images, first.images)


def test_strong_views_differ_and_pseudo_labels_are_of_the_weak(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings=SURE | {"unimatch_cutmix": 0, "strong_jitter": 1})
    weak = trainer._pseudo_labeled(a_batch(trainer)["unlabeled"])
    first, second = (trainer._strong(weak, number) for number in range(2))
    assert not torch.equal(first.images, second.images)
    assert not torch.equal(first.images, weak.images)
    assert torch.equal(first.labels, weak.labels)


def test_dropped_features_are_those_between_encoder_and_decoder(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings={"unimatch_dropout": 0.5})
    images = a_batch(trainer)["unlabeled"]
    seen = []
    decode = trainer._decode
    trainer._decode = lambda skips: seen.extend(skips) or decode(skips)
    trainer._with_dropped_features(images)
    skips = trainer.plans_network.encoder(images)
    assert len(seen) == len(skips)
    kept = 0.0
    for dropped, whole in zip(seen, skips, strict=True):
        alive = dropped.flatten(2).abs().sum(2) > 0
        torch.testing.assert_close(dropped[alive], 2 * whole[alive])
        kept += alive.float().mean() / len(skips)
    assert 0.2 < kept < 0.8


def test_a_network_without_encoder_is_refused(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny())
    trainer.require_decoder(trainer.plans_network, "to drop features between")
    with pytest.raises(UserError, match="to drop features between; use plans with"):
        trainer.require_decoder(torch.nn.Conv2d(1, 2, 3), "to drop features between")


def test_its_weights_grow_at_first_and_the_papers_do_not(tiny, make_trainer):
    trainer, papers = (make_trainer(f"{NAME}{n}epochs", tiny(), settings={"preset": preset})
                       for n, preset in (("_2", "nnunet"), ("_3", "paper")))  # fmt: skip
    full = {"strong": 0.5, "feature": 1.0}
    for share, grown in ((0, 0.0067), (0.2, 0.2865), (0.4, 1), (1, 1)):
        for one, factor in ((trainer, grown), (papers, 1)):
            one.global_step = share * one.total_steps
            assert one.term_weights() == pytest.approx(
                {name: factor * weight for name, weight in full.items()}, abs=1e-4
            )


def test_resumed_it_ends_with_the_weights_of_an_uninterrupted_run(tiny, make_trainer):
    settings = {"save_every": 1, "seed": 3, **SURE}
    assert_resumed_equals_uninterrupted(lambda: make_trainer(f"{NAME}_2epochs", tiny(), settings=settings))


@pytest.mark.parametrize("slice_by_slice", [True, False])
def test_thick_slices_are_blurred_one_by_one(tiny, make_trainer, monkeypatch, slice_by_slice):
    """Where nnU-Net rotates them so; and what its normalization left at 0 outside stays 0."""
    whole = nnUNetTrainerUniMatch.configure_rotation_dummyDA_mirroring_and_inital_patch_size

    def configured(self):
        rotation, _, *rest = whole(self)
        return rotation, slice_by_slice, *rest

    monkeypatch.setattr(nnUNetTrainerUniMatch, whole.__name__, configured)
    view = make_trainer(NAME, tiny()).strong_view
    assert view.axes == ((1, 2) if slice_by_slice else None)


@pytest.mark.slow
def test_nnunets_commands_train_continue_validate_and_predict(tiny_copy, run_nnunet, tmp_path):
    terms = {"loss_sup", "loss_strong", "loss_feature", "unimatch_sure"}
    commands_work(tiny_copy("3d"), run_nnunet, tmp_path, f"{NAME}_2epochs", terms)


def test_the_cross_entropy_of_few_sure_voxels_weighs_little(tiny, make_trainer):
    """Divided by all voxels, as its authors have it."""
    trainer = make_trainer(NAME, tiny(), settings={"unimatch_loss": "dice_ce"})
    logits = torch.randn(2, 3, 8, 8, 8)
    labels = torch.randint(0, 3, (2, 1, 8, 8, 8))
    counts = torch.zeros(2, 1, 8, 8, 8, dtype=torch.bool)
    counts[..., 0] = True
    found = trainer._follow(logits, Patches(logits, labels, counts))
    ce = torch.nn.functional.cross_entropy(logits, labels[:, 0], reduction="none")[..., 0].sum() / labels.numel()
    torch.testing.assert_close(found, ce + squared_dice_of_shown(logits, labels, counts))
