"""SS-Net: the direction and the length of its noise, what learns from what, and what is remembered."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.runs import assert_resumed_equals_uninterrupted, commands_work
from helpers.steps import a_batch, gradients_by_passes, parameters, spied

from nnunet_ssl.errors import UserError
from nnunet_ssl.losses.squared_dice import squared_dice_to_soft_labels
from nnunet_ssl.trainers.ssnet import unit

NAME = "nnUNetTrainerSSNet"


@pytest.mark.parametrize("kind", ["3d", "2d", "multichannel", "anisotropic", "ignore", "resenc"])
def test_every_kind_of_data_trains_and_its_terms_are_logged(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind))
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    assert all(trainer.train_step(next(trainer.dataloader_train))["loss"].isfinite() for _ in range(2))
    terms = {f"{what}_{term}" for what in ("loss", "weight") for term in ("smoothness", "separation")}
    assert set(trainer._mean_values()) == terms | {"loss_sup"}
    assert trainer.noise == (0.1 if kind == "2d" else 0.01)


def test_regions_are_refused_in_a_sentence(tiny, make_trainer):
    with pytest.raises(UserError, match="region-based labels"):
        make_trainer(NAME, tiny("regions"))


def test_noise_is_adversarial_and_of_the_asked_length(tiny, make_trainer):
    """Of the same length, it moves the prediction more than noise at random, and than noise the other way."""
    trainer = make_trainer(NAME, tiny(), settings={"ssnet_noise": 0.05})
    images, network = a_batch(trainer)["unlabeled"], trainer.plans_network
    with torch.no_grad():
        before = network(images)[0].softmax(1)
    shown, distance = [], trainer._distance
    trainer._distance = lambda x, q: shown.append(x.detach()) or distance(x, q)
    torch.manual_seed(0)
    smoothness = trainer._smoothness(images, before).item()
    at_random, adversarial = (x - images for x in shown)
    length = 0.05 * math.sqrt(images[0].numel())
    for noise in (at_random, adversarial):
        torch.testing.assert_close(noise.flatten(1).norm(dim=1), torch.full((len(images),), length), rtol=1e-3, atol=0)

    def moved(noise):
        with torch.no_grad():
            return squared_dice_to_soft_labels(network(images + noise)[0], before).item()

    assert moved(adversarial) == pytest.approx(smoothness, rel=1e-4)
    assert smoothness > 1.2 * moved(at_random)


def test_the_direction_is_the_gradient_to_the_noise(tiny, make_trainer):
    """By finite differences along some axes."""
    trainer = make_trainer(NAME, tiny("2d"), settings={"ssnet_noise": 0.1})
    trainer.plans_network.double()
    images = a_batch(trainer)["unlabeled"].double()[:1]
    with torch.no_grad():
        before = trainer.plans_network(images)[0].softmax(1)
    shown, distance = [], trainer._distance
    trainer._distance = lambda x, q: shown.append(x.detach()) or distance(x, q)
    trainer.disagreement = lambda logits, q: _dice(logits.softmax(1), q)
    trainer._smoothness(images, before)
    start, worst = shown[0], shown[1] - images
    radius, slopes = 0.1 * math.sqrt(images[0].numel()), []
    places = [(0, 0, 3, 4), (0, 0, 9, 2), (0, 0, 12, 12)]
    for place in places:
        step = torch.zeros_like(images)
        step[place] = 1e-5
        with torch.no_grad():
            ends = [_dice(trainer.plans_network(start + sign * step)[0].softmax(1), before) for sign in (1, -1)]
        slopes.append((ends[0] - ends[1]).item() / 2e-5)
    found = [worst[place].item() / radius for place in places]
    assert found[0] / found[1] == pytest.approx(slopes[0] / slopes[1], rel=0.02)
    assert found[2] / found[1] == pytest.approx(slopes[2] / slopes[1], rel=0.02)
    assert found[0] * slopes[0] > 0


def _dice(p, q):
    over = [0, 2, 3]
    return (1 - (2 * (p * q).sum(over) + 1e-5) / ((p * p).sum(over) + (q * q).sum(over) + 1e-5)).mean()


def test_a_direction_that_overflowed_is_none():
    noise = torch.tensor([[[3.0, 4.0]], [[torch.inf, torch.nan]], [[1e-15, 0.0]]])
    torch.testing.assert_close(unit(noise), torch.tensor([[[0.6, 0.8]], [[0.0, 0.0]], [[1.0, 0.0]]]))


def test_what_was_said_before_is_no_target_that_learns(tiny, make_trainer):
    """Only the pass with noise has a gradient, and the direction leaves none on the weights."""
    trainer = make_trainer(NAME, tiny())
    passes = trainer.losses(trainer._to_device(a_batch(trainer)))
    first, second = next(passes), next(passes)
    assert list(first) == ["sup", "separation"]
    assert all(p.grad is None for p in parameters(trainer).values())
    assert all(p.requires_grad for p in trainer.plans_network.parameters())
    second["smoothness"].backward()  # of a graph of its own: the first pass is not freed yet
    assert trainer.plans_network.encoder.stages[0][0].convs[0].conv.weight.grad.any()
    assert all(p.grad is None for n, p in parameters(trainer).items() if n.startswith("training."))
    first["separation"].backward()
    assert [list(terms) for terms in passes] == [["separation"], ["smoothness"]]


@pytest.mark.parametrize("kind", ["3d", "ignore"])
def test_labeled_voxels_that_are_right_are_remembered_and_labels_pull(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind))
    batch, head = a_batch(trainer), trainer.training_modules["prototypes"]
    trainer.plans_network.decoder.seg_layers[-1].bias.data[1] += 1  # some voxels are of it
    if kind == "ignore":
        batch["target"][0][:, :, :3] = trainer.label_manager.ignore_label
    remembered, pulled = [], []
    head.remember = lambda feature, labels: remembered.append(labels)
    head.register_forward_pre_hook(lambda _, inputs: pulled.append(inputs[1]))
    list(trainer.losses(trainer._to_device(batch)))
    with torch.no_grad():
        labeled, unlabeled = (trainer.plans_network(batch[s])[0].argmax(1, keepdim=True) for s in ("data", "unlabeled"))
    target = batch["target"][0]
    [found] = remembered
    assert torch.equal(found, torch.where(labeled == target, target, 0))
    assert found.any()
    assert found.max() < trainer.label_manager.num_segmentation_heads
    assert torch.equal(pulled[0], target)
    assert torch.equal(pulled[1], unlabeled)


def test_separation_weighs_a_tenth_of_smoothness(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings={"ssnet_weight": 0.5, "ssnet_rampup": 0.5})
    trainer.global_step = trainer.total_steps
    weights = trainer.term_weights()
    assert (weights["smoothness"], weights["separation"]) == (0.5, pytest.approx(0.05))


def test_lean_and_joint_passes_give_the_same_gradients(tiny, make_trainer):
    found = gradients_by_passes(
        lambda passes: make_trainer(
            NAME, tiny(), settings={"passes": passes, "ssnet_rampup": 0, "ssnet_separation": 1.0}
        )
    )
    for name, gradient in found["lean"].items():
        torch.testing.assert_close(gradient, found["joint"][name], rtol=1e-4, atol=1e-6, msg=name)


def test_resumed_it_ends_with_the_weights_of_an_uninterrupted_run(tiny, make_trainer):
    """And with the prototypes."""
    settings = {"save_every": 1, "ssnet_rampup": 0, "seed": 3}
    folder = assert_resumed_equals_uninterrupted(lambda: make_trainer(f"{NAME}_2epochs", tiny(), settings=settings))
    state = torch.load(folder / "checkpoint_final_ssl.pth", weights_only=True)
    assert state["modules"]["prototypes.prototypes"].any()


def test_smoothness_is_the_mean_of_both_streams(tiny, make_trainer, monkeypatch):
    trainer = make_trainer(NAME, tiny("2d"))
    seen = spied(monkeypatch, trainer, "_smoothness")
    terms = list(trainer.losses(trainer._to_device(a_batch(trainer))))
    found = sum(of_pass["smoothness"].item() for of_pass in terms if "smoothness" in of_pass)
    assert len(seen) == 2
    assert found == pytest.approx(sum(seen).item() / 2)


@pytest.mark.slow
def test_nnunets_commands_train_continue_validate_and_predict(tiny_copy, run_nnunet, tmp_path):
    terms = {"loss_sup", "loss_smoothness", "loss_separation"}
    commands_work(tiny_copy("3d"), run_nnunet, tmp_path, f"{NAME}_2epochs", terms)
