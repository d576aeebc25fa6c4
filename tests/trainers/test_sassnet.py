"""SASSNet: who learns from which term, which patches the discriminator sees, and that it sees no batch size."""

from __future__ import annotations

import pytest
import torch
from helpers.runs import assert_plain_checkpoint, assert_resumed_equals_uninterrupted, commands_work
from helpers.steps import a_batch, gradients_by_passes, half_a_step, on_two_ranks, who_learns

NAME = "nnUNetTrainerSASSNet"
ADVERSARY, HEAD, NETWORK = "discriminator", "head", "network"


SMALL = {"sassnet_width": 4}  # 11 million parameters take their time to save


def part(name):
    prefixes = {"training.discriminator": ADVERSARY, "training.regression": HEAD}
    return next((of for prefix, of in prefixes.items() if name.startswith(prefix)), NETWORK)


@pytest.mark.parametrize("kind", ["3d", "2d", "multichannel", "anisotropic", "ignore", "regions", "resenc"])
def test_every_kind_of_data_trains_and_its_terms_are_logged(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind), settings=SMALL)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    assert all(trainer.train_step(next(trainer.dataloader_train))["loss"].isfinite() for _ in range(2))
    values = trainer._mean_values()
    terms = {"sup", "distance", "adversarial", "discriminator"}
    assert set(values) == {f"loss_{term}" for term in terms} | {
        "weight_distance", "weight_adversarial", "discriminator_right"
    }  # fmt: skip
    assert 0 <= values["discriminator_right"] <= 1


def test_each_learns_from_its_own_terms(tiny, make_trainer):
    """The discriminator takes nothing of the term that it judges by, and gives nothing back by its own."""
    trainer = make_trainer(NAME, tiny(), settings=SMALL)
    torch.nn.init.normal_(trainer.training_modules["regression"][0].weight, std=0.1)
    assert who_learns(trainer, part) == {
        "sup": {NETWORK},
        "distance": {NETWORK, HEAD},
        "adversarial": {NETWORK, HEAD},
        "discriminator": {ADVERSARY},
    }
    assert trainer.training_modules["discriminator"].training


def test_the_adversarial_term_asks_for_maps_that_pass_for_labeled_ones(tiny, make_trainer):
    """By the terms' values, with a discriminator without dropout that is sure; real maps are the regressed ones."""
    trainer = make_trainer(NAME, tiny(), settings=SMALL)
    batch, discriminator = trainer._to_device(a_batch(trainer)), trainer.training_modules["discriminator"]
    for module in discriminator.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    torch.nn.init.normal_(trainer.training_modules["regression"][0].weight, std=1.0)
    torch.nn.init.normal_(discriminator.head.weight, std=10.0)
    with torch.no_grad():
        maps = [trainer.run(stream)[1] for stream in batch]
        real, fake = (discriminator(m, s.images).log_softmax(1) for m, s in zip(maps, batch, strict=True))
    _, adversarial, judged = trainer.losses(batch)
    assert adversarial["adversarial"].item() == pytest.approx(-fake[:, 1].mean().item(), rel=1e-4)
    n = trainer.num_drawn_uniformly
    expected = -(real[:n, 1].mean() + fake[:, 0].mean()) / 2
    assert judged["discriminator"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(("size", "share", "seen"), [(2, 0.33, 1), (4, 0.33, 3), (1, 0.33, 1), (2, 1.0, 2), (2, 0, 2)])
def test_it_sees_the_labeled_patches_that_are_not_forced_to_hold_foreground(tiny, make_trainer, size, share, seen):
    """By nnU-Net's own rule. The authors' code has the truth of 2 and 2 patches written out; ours takes any number."""
    trainer = make_trainer(NAME, tiny(), settings=SMALL)
    trainer.batch_size, trainer.oversample_foreground_percent = size, share
    batch, shown = trainer._to_device(a_batch(trainer)), []
    trainer.training_modules["discriminator"].register_forward_pre_hook(lambda _, inputs: shown.append(inputs))
    list(trainer.losses(batch))
    assert [len(images) for _, images in shown] == [size, seen, size]
    assert torch.equal(shown[1][1], batch.labeled.images[:seen])
    if share < 1:
        loader = trainer.labeled_loader()
        forced = [loader._oversample_last_XX_percent(trainer, i) for i in range(size)]
        assert forced == [i >= seen for i in range(size)]


def test_the_discriminator_has_adam_and_the_head_nnunets_rule(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings={"sassnet_lr": 1e-3, **SMALL})
    [group] = trainer.own_optimizers["discriminator"].param_groups
    assert (group["lr"], group["betas"]) == (1e-3, (0.9, 0.99))
    assert {id(p) for p in group["params"]} == {id(p) for p in trainer.training_modules["discriminator"].parameters()}
    shared = {id(p) for group in trainer.training_optimizer.param_groups for p in group["params"]}
    assert shared == {id(p) for p in trainer.training_modules["regression"].parameters()}


def test_lean_and_joint_passes_give_the_same_gradients(tiny, make_trainer):
    def make(passes):
        settings = {"passes": passes, "sassnet_weight": 1.0, "sassnet_rampup": 0, **SMALL}
        trainer = make_trainer(NAME, tiny(), settings=settings)
        torch.nn.init.normal_(
            trainer.training_modules["regression"][0].weight, std=0.1, generator=torch.Generator().manual_seed(0)
        )
        return trainer

    found = gradients_by_passes(make)
    for name, gradient in found["lean"].items():
        torch.testing.assert_close(gradient, found["joint"][name], rtol=1e-4, atol=1e-6, msg=name)


def test_resumed_it_ends_with_the_weights_of_an_uninterrupted_run(tiny, make_trainer):
    settings = {"save_every": 1, "sassnet_rampup": 0, "seed": 3, **SMALL}
    folder = assert_resumed_equals_uninterrupted(lambda: make_trainer(f"{NAME}_2epochs", tiny(), settings=settings))
    assert_plain_checkpoint(folder, make_trainer("nnUNetTrainer", tiny()))


def test_two_ranks_share_one_discriminator(tiny, make_trainer, tmp_path):
    trainer = make_trainer(NAME, tiny(), settings=SMALL)
    ranks = on_two_ranks(tmp_path, half_a_step, trainer, a_batch(trainer))
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name]), name


@pytest.mark.slow
def test_nnunets_commands_train_continue_validate_and_predict(tiny_copy, run_nnunet, tmp_path):
    terms = {"loss_sup", "loss_distance", "loss_adversarial", "loss_discriminator"}
    commands_work(tiny_copy("3d"), run_nnunet, tmp_path, f"{NAME}_2epochs", terms)
