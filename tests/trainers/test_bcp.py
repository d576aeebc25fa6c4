"""BCP: what is mixed with what, which part is learned from which labels, the two stages, and what has a gradient."""

from __future__ import annotations

import pytest
import torch
from helpers.runs import assert_resumed_equals_uninterrupted, commands_work
from helpers.steps import a_batch, gradients_by_passes, stepped

from nnunet_ssl.losses.components import largest_components
from nnunet_ssl.losses.partial import partial_dice_and_cross_entropy

NAME = "nnUNetTrainerBCP"
NOW = {"bcp_pretraining": 0}


def seen_by_student(trainer, batch):
    """The images of each pass and its terms."""
    images = []
    forward = trainer.forward
    trainer.forward = lambda name, stream: (
        (images.append(stream.images) if name == "first" else None) or forward(name, stream)
    )
    terms = list(trainer.losses(trainer._to_device(batch)))
    trainer.forward = forward
    return images, terms


@pytest.mark.parametrize("kind", ["3d", "2d", "multichannel", "anisotropic", "ignore", "regions", "resenc"])
def test_every_kind_of_data_trains_and_its_terms_are_logged(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind), settings=NOW)
    stepped(trainer)
    assert set(trainer._mean_values()) == {"loss_sup", "loss_consistency", "weight_consistency"}


@pytest.mark.parametrize("kind", ["3d", "ignore", "regions"])
def test_only_the_student_learns_and_the_order_of_passes_is_no_matter(tiny, make_trainer, kind):
    found = gradients_by_passes(lambda passes: make_trainer(NAME, tiny(kind), settings={"passes": passes, **NOW}))
    for parameter, gradient in found["lean"].items():
        if parameter.startswith("training.teacher"):
            assert gradient is None
        elif "seg_layers.0" not in parameter:
            assert gradient.abs().sum() > 0, parameter
            torch.testing.assert_close(gradient, found["joint"][parameter])


@pytest.mark.parametrize("kind", ["3d", "2d", "regions"])
def test_boxes_go_both_ways_and_each_part_is_learned_from_its_own_labels(tiny, make_trainer, kind):
    """At full resolution by hand; without the largest component the teacher's decision is taken as it is."""
    trainer = make_trainer(NAME, tiny(kind), settings=NOW | {"bcp_largest_component": False, "bcp_side": 0.5})
    batch, regions = a_batch(trainer), kind == "regions"
    trainer.loss.weight_factors = (1.0, *[0.0] * (len(batch["target"]) - 1))
    images, terms = seen_by_student(trainer, batch)
    box = images[0] != batch["data"]
    assert box.float().mean().item() == pytest.approx(0.5 ** (box.ndim - 2))
    assert torch.equal(images[0], torch.where(box, batch["unlabeled"], batch["data"]))
    assert torch.equal(images[1], torch.where(box, batch["data"], batch["unlabeled"]))
    assert not torch.equal(box[0], box[1])

    student, teacher = trainer.plans_network, trainer.training_modules["teacher"]
    with torch.no_grad():
        guess = teacher(batch["unlabeled"])
        guess = guess > 0 if regions else guess.argmax(1, keepdim=True)
        target = batch["target"][0].bool() if regions else batch["target"][0].long()
        for mixed, inside, of_pass in zip(images, (box, ~box), terms, strict=True):
            logits = student(mixed)[0]
            expected = {
                "sup": 0.5 * partial_dice_and_cross_entropy(logits, target, ~inside, regions),
                "consistency": 0.5 * partial_dice_and_cross_entropy(logits, guess, inside, regions),
            }
            torch.testing.assert_close({name: term.detach() for name, term in of_pass.items()}, expected)


def test_each_resolution_has_nnunets_weight(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny("anisotropic"))
    torch.manual_seed(0)
    target = a_batch(trainer)["target"]
    counts = torch.ones_like(target[0], dtype=torch.bool)
    outputs = [torch.randn(len(t), 3, *t.shape[2:]) for t in target]
    weights = trainer.loss.weight_factors
    # a_batch scales by "nearest", nnU-Net and the trainer by "nearest-exact"
    scaled = [torch.nn.functional.interpolate(target[0].float(), t.shape[2:], mode="nearest-exact") for t in target]
    expected = sum(
        w * partial_dice_and_cross_entropy(o, t, torch.ones_like(t, dtype=torch.bool))
        for w, o, t in zip(weights, outputs, scaled, strict=True)
    )
    assert len(target) > 1
    torch.testing.assert_close(trainer._loss(outputs, target[0], counts), expected)


def test_what_is_ignored_is_no_part_of_any_loss(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny("ignore"), settings=NOW)
    batch = a_batch(trainer)
    all_ignored = [torch.full_like(t, 3) for t in batch["target"]]
    _, terms = seen_by_student(trainer, {**batch, "target": all_ignored})
    assert [of_pass["sup"].item() for of_pass in terms] == [0, 0]
    assert all(of_pass["consistency"] > 0 for of_pass in terms)


def test_pseudo_labels_keep_the_largest_component_of_each_class(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny())
    images = a_batch(trainer)["unlabeled"]
    raw = trainer.of_teacher(images).argmax(1, keepdim=True)
    kept = trainer._pseudo_labeled(images).labels
    for k in (1, 2):
        assert torch.equal(kept == k, largest_components(raw == k))
    assert (kept != raw).any()


def test_at_first_labeled_images_alone_are_mixed_then_the_teacher_is_the_student(tiny, make_trainer):
    trainer = make_trainer(f"{NAME}_2epochs", tiny(), settings={"bcp_pretraining": 0.5, "teacher_decay": 0.9})
    teacher, batch = trainer.training_modules["teacher"].network, a_batch(trainer)
    for _ in range(2):
        trainer.train_step(batch)
        assert "loss_consistency" not in trainer._mean_values()
    images, _ = seen_by_student(make_trainer(f"{NAME}_2epochs", tiny(), settings={"bcp_pretraining": 0.5}), batch)
    assert len(images) == 1
    box = images[0] != batch["data"]
    assert torch.equal(images[0], torch.where(box, batch["data"].flip(0), batch["data"]))

    assert not torch.equal(next(teacher.parameters()), next(trainer.plans_network.parameters()))
    student = [p.detach().clone() for p in trainer.plans_network.parameters()]
    next(trainer.losses(trainer._to_device(batch)))
    assert all(torch.equal(p, s) for p, s in zip(teacher.parameters(), student, strict=True))
    trainer.train_step(batch)
    assert "loss_consistency" in trainer._mean_values()
    assert trainer.term_weights()["consistency"] == 0.5  # from the first mixed step on


def test_resumed_between_the_stages_it_ends_with_the_weights_of_an_uninterrupted_run(tiny, make_trainer):
    settings = {"save_every": 1, "seed": 3, "bcp_pretraining": 0.5}
    assert_resumed_equals_uninterrupted(lambda: make_trainer(f"{NAME}_2epochs", tiny(), settings=settings))


@pytest.mark.slow
def test_nnunets_commands_train_continue_validate_and_predict(tiny_copy, run_nnunet, tmp_path):
    commands_work(tiny_copy("3d"), run_nnunet, tmp_path, f"{NAME}_2epochs", {"loss_sup", "loss_consistency"})
