"""Modules with an optimizer of their own, and features of both streams: on a user's toy, ``own_trainers``."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers.runs import assert_resumed_equals_uninterrupted, train
from helpers.steps import a_batch, all_weights, gradients, half_a_step, on_two_ranks, parameters

from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers import nnUNetTrainerSSL

NAME = "nnUNetTrainerAdversarial_3epochs"
ADVERSARY = "training.discriminator."


@pytest.fixture(autouse=True)
def own_trainers(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(__file__).parent.parent / "own_trainers"))


def test_each_optimizer_moves_its_own_by_its_own_rule(tiny, make_trainer):
    trainer, batch = make_trainer(NAME, tiny()), a_batch(make_trainer(NAME, tiny()))
    assert trainer.training_optimizer is None  # nothing is left for nnU-Net's rule
    adversary = copy.deepcopy(trainer.training_modules["discriminator"])
    before = {n: p.detach().clone() for n, p in parameters(trainer).items()}
    trainer.train_step(batch)
    for p, stepped in zip(adversary.parameters(), trainer.training_modules["discriminator"].parameters(), strict=True):
        p.grad = stepped.grad  # far below nnU-Net's 12, so not clipped
    torch.optim.Adam(adversary.parameters(), 1e-3).step()
    after = parameters(trainer)
    for n, p in adversary.named_parameters():
        assert torch.equal(p, after[ADVERSARY + n]), n
        assert not torch.equal(p, before[ADVERSARY + n]), n
    assert any(not torch.equal(p, before[n]) for n, p in after.items() if "encoder" in n)


def test_the_adversary_and_what_it_judges_learn_from_their_own_terms(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny())
    learns = {}
    for terms in trainer.losses(trainer._to_device(a_batch(trainer))):
        for name, term in terms.items():
            for p in parameters(trainer).values():
                p.grad = None
            term.backward()
            learns[name] = {n.startswith(ADVERSARY) for n, p in parameters(trainer).items() if p.grad is not None}
    assert learns == {"sup": {False}, "adversarial": {False}, "discriminator": {True}}


def test_lean_and_joint_passes_give_the_same_gradients(tiny, make_trainer):
    lean, joint = (
        gradients(trainer, a_batch(trainer))
        for trainer in (make_trainer(NAME, tiny(), settings={"passes": passes}) for passes in ("lean", "joint"))
    )
    for name in lean:
        torch.testing.assert_close(lean[name], joint[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tiny, make_trainer):
    folder = assert_resumed_equals_uninterrupted(lambda: make_trainer(NAME, tiny(), settings={"save_every": 1}))
    state = torch.load(folder / "checkpoint_final_ssl.pth", weights_only=True)
    momentum = state["own_optimizers"]["discriminator"]["state"]
    assert [float(of_one["step"]) for of_one in momentum.values()] == [6.0] * 4  # 3 epochs of 2 steps
    assert not any("discriminator" in name for name in torch.load(
        folder / "checkpoint_final.pth", weights_only=False)["network_weights"])  # fmt: skip


@pytest.mark.parametrize("left", [None, {}])
def test_a_training_state_without_its_optimizer_is_a_sentence(tiny, make_trainer, left):
    trainer = make_trainer(NAME, tiny(), settings={"save_every": 1})
    train(trainer, until=1)
    file = Path(trainer.output_folder) / "checkpoint_latest_ssl.pth"
    state = torch.load(file, weights_only=True)
    del state["own_optimizers"]
    torch.save(state if left is None else {**state, "own_optimizers": left}, file)
    again = make_trainer(NAME, tiny(), settings={"save_every": 1})
    again.load_checkpoint(str(file).replace("_ssl", ""))
    with pytest.raises(UserError, match=rf"{file} is not one of {NAME}"):
        again.on_train_start()


def with_a_scaler(trainer):
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = {n: p.detach().clone() for n, p in parameters(trainer).items()}
    return lambda: {n.startswith(ADVERSARY) for n, p in parameters(trainer).items() if not torch.equal(p, before[n])}


def test_one_scaler_serves_all_and_an_overflow_skips_the_optimizer_that_it_is_in(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings={"cpu_bfloat16": True})
    moved, batch = with_a_scaler(trainer), a_batch(trainer)
    first = trainer.training_modules["discriminator"][0].weight
    handle = first.register_hook(lambda gradient: gradient * float("inf"))
    trainer.train_step(batch)
    assert moved() == {False}
    assert trainer.grad_scaler.get_scale() == 2.0**9
    handle.remove()
    trainer.train_step(batch)
    assert moved() == {False, True}
    assert trainer.grad_scaler.get_scale() == 2.0**9


def test_an_optimizer_without_gradients_is_left_out_of_a_step(tiny, make_trainer):
    """An adversary that begins later, or that a method trains by itself in ``after_step``."""
    trainer = make_trainer(NAME, tiny(), settings={"cpu_bfloat16": True})
    moved, losses = with_a_scaler(trainer), trainer.losses
    trainer.losses = lambda batch: (next(losses(batch)) for _ in range(1))
    trainer.train_step(a_batch(trainer))
    assert moved() == {False}


def test_two_ranks_with_half_a_batch_step_like_one_with_all_of_it(tiny, make_trainer, tmp_path):
    together, apart = (make_trainer(NAME, tiny()) for _ in range(2))
    batch = a_batch(together)
    ranks = on_two_ranks(tmp_path, half_a_step, apart, batch)
    together.train_step(batch)
    for n, p in all_weights(together):
        torch.testing.assert_close(ranks[0]["weights"][n], p.detach(), rtol=1e-4, atol=1e-6, msg=n)
        assert torch.equal(ranks[0]["weights"][n], ranks[1]["weights"][n])


def test_shta_on_it_sees_labeled_features_alone(tiny, make_trainer):
    trainer = make_trainer("nnUNetTrainerSHTA_Adversarial_3epochs", tiny())
    batch, seen = a_batch(trainer), []
    trainer.training_modules["shta_first"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    before = {n: p.detach().clone() for n, p in parameters(trainer).items()}
    trainer.train_step(batch)
    assert {"loss_sup", "loss_adversarial", "loss_discriminator", "loss_shta"} <= set(trainer._mean_values())
    [(feature, target)] = seen
    assert torch.equal(target, batch["target"][0])
    assert feature.shape[2:] == target.shape[2:]
    moved = {n for n, p in parameters(trainer).items() if not torch.equal(p, before[n])}
    assert any(n.startswith("training.shta_first.") for n in moved)  # by nnU-Net's rule
    assert any(n.startswith(ADVERSARY) for n in moved)
    shared = {id(p) for group in trainer.training_optimizer.param_groups for p in group["params"]}
    assert shared == {id(p) for p in trainer.training_modules["shta_first"].parameters()}


@pytest.mark.parametrize("with_gradient", [True, False])
def test_features_of_both_streams_are_offered_in_passes_with_gradient(tiny, make_trainer, monkeypatch, with_gradient):
    offered = []

    def on_feature(self, name, stream, feature):
        offered.append((name, stream.target is not None, tuple(feature.shape)))
        return {"more": feature.mean()}

    monkeypatch.setattr(nnUNetTrainerSSL, "on_feature", on_feature)
    trainer = make_trainer(NAME, tiny())
    labeled, unlabeled = trainer._to_device(a_batch(trainer))
    with torch.set_grad_enabled(with_gradient):
        outputs, feature = trainer.forward_with_feature("first", labeled)
        trainer.forward("first", unlabeled)
    assert torch.equal(trainer.plans_network.decoder.seg_layers[-1](feature), outputs[0])
    shape = tuple(feature.shape)
    assert offered == ([("first", True, shape), ("first", False, shape)] if with_gradient else [])
    assert list(trainer._terms_of_features) == (["more"] if with_gradient else [])
