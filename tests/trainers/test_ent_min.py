"""Entropy minimization: what is measured, on which images, and that it makes the network surer."""

from __future__ import annotations

import pytest
import torch
from helpers.runs import assert_resumed_equals_uninterrupted, commands_work
from helpers.steps import a_batch, gradients_by_passes

from nnunet_ssl.losses.entropy import entropy

NAME = "nnUNetTrainerEntMin"


@pytest.mark.parametrize("kind", ["3d", "2d", "multichannel", "anisotropic", "ignore", "regions", "resenc"])
def test_every_kind_of_data_trains_and_its_terms_are_logged(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind))
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    assert all(trainer.train_step(next(trainer.dataloader_train))["loss"].isfinite() for _ in range(2))
    values = trainer._mean_values()
    assert set(values) == {"loss_sup", "loss_entropy", "weight_entropy"}
    assert 0 < values["loss_entropy"] <= 1


@pytest.mark.parametrize("kind", ["3d", "regions"])
@pytest.mark.parametrize("on_labeled", [True, False])
def test_the_entropy_is_the_mean_over_the_streams(tiny, make_trainer, kind, on_labeled):
    trainer = make_trainer(NAME, tiny(kind), settings={"entmin_on_labeled": on_labeled})
    batch = a_batch(trainer)
    with torch.no_grad():
        both = [
            entropy(trainer.probabilities(trainer.plans_network(batch[stream])), kind == "regions").mean().item()
            for stream in ("data", "unlabeled")
        ]
    terms = list(trainer.losses(trainer._to_device(batch)))
    found = sum(term["entropy"].item() for term in terms if "entropy" in term)
    assert found == pytest.approx(sum(both) / 2 if on_labeled else both[1], rel=1e-5)


def test_the_order_of_passes_is_no_matter(tiny, make_trainer):
    found = gradients_by_passes(
        lambda passes: make_trainer(NAME, tiny(), settings={"passes": passes, "entmin_rampup": 0})
    )
    lean, joint = found["lean"], found["joint"]
    for parameter, gradient in lean.items():
        torch.testing.assert_close(gradient, joint[parameter])


def test_it_makes_the_network_surer(tiny, make_trainer):
    unsure = {}
    for weight in (0, 10):
        trainer = make_trainer(NAME, tiny(), settings={"entmin_weight": weight, "entmin_rampup": 0, "seed": 1})
        batch = a_batch(trainer)
        for _ in range(8):
            trainer.train_step(batch)
        with torch.no_grad():
            unsure[weight] = entropy(trainer.probabilities(trainer.plans_network(batch["unlabeled"]))).mean().item()
    assert unsure[10] < 0.9 * unsure[0]


def test_resumed_it_ends_with_the_weights_of_an_uninterrupted_run(tiny, make_trainer):
    settings = {"save_every": 1, "entmin_rampup": 0, "seed": 3}
    assert_resumed_equals_uninterrupted(lambda: make_trainer(f"{NAME}_2epochs", tiny(), settings=settings))


@pytest.mark.slow
def test_nnunets_commands_train_continue_validate_and_predict(tiny_copy, run_nnunet, tmp_path):
    commands_work(tiny_copy("3d"), run_nnunet, tmp_path, f"{NAME}_2epochs", {"loss_sup", "loss_entropy"})
