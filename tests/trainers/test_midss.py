"""MiDSS: what is mixed, whose labels count where, the two contexts, and what has a gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.runs import assert_resumed_equals_uninterrupted, commands_work
from helpers.steps import a_batch, at_step, gradients_by_passes, stepped

from nnunet_ssl.losses.partial import partial_dice_and_cross_entropy

NAME = "nnUNetTrainerMiDSS"
PLAIN = {"strong_jitter": 0, "strong_blur": 0, "strong_noise": 0, "midss_amplitude": 0}


def apart(trainer):
    """A trainer in the middle of its training, whose teacher has fallen behind its student."""
    return at_step(trainer, trainer.total_steps // 2)


@pytest.mark.parametrize("kind", ["3d", "2d", "multichannel", "anisotropic", "ignore", "regions", "resenc"])
def test_every_kind_of_data_trains_and_its_terms_are_logged(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind), settings={"midss_threshold": 0.4})
    stepped(trainer)
    values = trainer._mean_values()
    terms = {"loss_sup", "loss_consistency", "loss_guided", "weight_consistency", "weight_guided"}
    assert set(values) == terms | {"midss_sure", "midss_guided"}
    assert 0 < values["midss_guided"] <= values["midss_sure"] <= 1
    assert values["weight_guided"] < values["weight_consistency"] < 1


@pytest.mark.parametrize("kind", ["3d", "regions"])
def test_only_the_student_learns_and_the_order_of_passes_is_no_matter(tiny, make_trainer, kind):
    settings = {"midss_threshold": 0.4, "teacher_rampup": 0}
    found = gradients_by_passes(
        lambda passes: apart(make_trainer(NAME, tiny(kind), settings={"passes": passes, **settings}))
    )
    for parameter, gradient in found["lean"].items():
        if parameter.startswith("training.teacher"):
            assert gradient is None
        elif "seg_layers.0" not in parameter:
            assert gradient.abs().sum() > 0, parameter
            torch.testing.assert_close(gradient, found["joint"][parameter])


@pytest.mark.parametrize("kind", ["3d", "ignore", "regions"])
def test_each_term_by_hand(tiny, make_trainer, kind):
    """Without strong views and styles; voxel by voxel from the images that the networks saw."""
    trainer = apart(make_trainer(NAME, tiny(kind), settings=PLAIN | {"midss_threshold": 0.5}))
    batch, regions = a_batch(trainer), kind == "regions"
    if kind == "ignore":
        batch["target"][0][:, :, :4] = 3
    seen = {"first": [], "teacher": []}
    forward = trainer.forward
    trainer.forward = lambda name, stream: seen[name].append(stream.images) or forward(name, stream)
    terms = list(trainer.losses(trainer._to_device(batch)))
    labeled, unlabeled, target = batch["data"], batch["unlabeled"], batch["target"][0]

    of_labels, ul, lu, strong = seen["first"]
    box = ul != unlabeled
    assert torch.equal(of_labels, labeled)
    assert torch.equal(strong, unlabeled)
    for one, other in (seen["first"][1:3], seen["teacher"][1:]):  # the teacher sees the same mixes
        assert torch.equal(one, torch.where(box, labeled, unlabeled))
        assert torch.equal(other, torch.where(box, unlabeled, labeled))
    assert not torch.equal(box[0], box[1])

    def decided(logits):
        p = logits.sigmoid() if regions else logits.softmax(1)
        if regions:
            return p > 0.5, torch.where(p > 0.5, p, 1 - p) > 0.5
        return p.argmax(1, keepdim=True), p.amax(1, keepdim=True) > 0.5

    with torch.no_grad():
        student, teacher = trainer.plans_network, trainer.training_modules["teacher"]
        h, sure = decided(teacher(unlabeled))
        h_mixed, sure_mixed = decided(torch.where(box, teacher(lu), teacher(ul)))
        known = target != 3 if kind == "ignore" else torch.ones_like(target[:, :1], dtype=torch.bool)
        y = target.bool() if regions else torch.where(known, target, 0).long()

        def loss(images, labels, counts):
            return partial_dice_and_cross_entropy(student(images)[0], labels, counts, regions, over_all=True)

        expected = [
            {"consistency": loss(ul, torch.where(box, y, h), torch.where(box, known, sure))},
            {"consistency": loss(lu, torch.where(box, h, y), torch.where(box, sure, known))},
            {"guided": loss(strong, h_mixed, sure & sure_mixed & (h == h_mixed))},
        ]
    for of_pass, wanted in zip(terms[1:], expected, strict=True):
        torch.testing.assert_close({name: term.detach() for name, term in of_pass.items()}, wanted)


def test_the_labeled_image_gets_the_style_of_the_unlabeled_one_more_and_more(tiny, make_trainer):
    """Of a patch of 16 voxels a window of 0.01 is the mean alone, and its amplitude is the mean's size."""
    trainer = make_trainer(NAME, tiny(), settings=PLAIN | {"midss_amplitude": 1.0})
    batch = a_batch(trainer)
    batch["data"], batch["unlabeled"] = batch["data"] + 1, batch["unlabeled"] + 3
    moved = {}
    for step in (0, trainer.total_steps):
        trainer.global_step, seen = step, []
        forward = trainer.forward
        trainer.forward = lambda name, stream, run=forward, seen=seen: seen.append(stream.images) or run(name, stream)
        list(trainer.losses(trainer._to_device(batch)))
        trainer.forward = forward
        restyled = seen[5]  # after the labels, three passes of the teacher, and the unlabeled image with a box
        own = restyled != batch["unlabeled"]
        moved[step] = (restyled - batch["data"])[own].mean().item()
    assert abs(moved[0]) < 1e-3
    assert 0.1 < moved[trainer.total_steps] < 2


def test_resumed_it_ends_with_the_weights_of_an_uninterrupted_run(tiny, make_trainer):
    settings = {"save_every": 1, "teacher_rampup": 0, "seed": 3, "midss_threshold": 0.4}
    assert_resumed_equals_uninterrupted(lambda: make_trainer(f"{NAME}_2epochs", tiny(), settings=settings))


@pytest.mark.slow
def test_nnunets_commands_train_continue_validate_and_predict(tiny_copy, run_nnunet, tmp_path):
    terms = {"loss_sup", "loss_consistency", "loss_guided", "midss_guided"}
    commands_work(tiny_copy("3d"), run_nnunet, tmp_path, f"{NAME}_2epochs", terms)


def test_what_the_normalization_has_masked_stays_0_in_the_style_of_another_image(tiny, make_trainer):
    """As nnU-Net's augmentation leaves it, and as the strong view has it beside the box."""
    trainer = apart(make_trainer(NAME, tiny(), settings={"midss_amplitude": 1.0, "midss_threshold": 0.4}))
    trainer.strong_view = dataclasses.replace(trainer.strong_view, zero_outside=(True,))
    batch = a_batch(trainer)
    for stream in ("data", "unlabeled"):
        batch[stream][..., :4] = 0.0
    seen = []
    forward = trainer.forward
    trainer.forward = lambda name, stream: seen.append((name, stream.images)) or forward(name, stream)
    list(trainer.losses(trainer._to_device(batch)))
    of_student = [images for name, images in seen if name == "first"]
    assert len(of_student) == 4
    for images in of_student:
        assert not images[..., :4].any()
        assert images[..., 4:].all()
