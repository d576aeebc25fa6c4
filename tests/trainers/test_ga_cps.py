"""GA-CPS: CPS with other losses, and nothing else."""

from __future__ import annotations

import pytest
import torch
from helpers.runs import assert_resumed_equals_uninterrupted, commands_work
from helpers.steps import a_batch, parameters, with_stages

from nnunet_ssl.errors import UserError
from nnunet_ssl.losses.ga import GACELoss, GADiceLoss, present_classes

NAME = "nnUNetTrainerGACPS"


@pytest.mark.parametrize("kind", ["3d", "2d", "multichannel", "anisotropic", "ignore", "resenc"])
def test_every_kind_of_data_trains_and_its_terms_are_logged(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind))
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    assert all(trainer.train_step(next(trainer.dataloader_train))["loss"].isfinite() for _ in range(2))
    values = trainer._mean_values()
    assert set(values) == {"loss_sup", "loss_sup_second", "loss_cps", "weight_cps"}
    assert all(0 < value < 20 for value in values.values())


def test_regions_are_refused_in_a_sentence(tiny, make_trainer):
    with pytest.raises(UserError, match=r"nnUNetTrainerGACPS cannot train the region-based.*nnUNetTrainerCPS"):
        make_trainer(NAME, tiny("regions"))


@pytest.mark.parametrize("kind", ["3d", "2d"])
def test_a_step_moves_every_parameter_of_both_networks(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind))
    before = {n: p.detach().clone() for n, p in parameters(trainer).items()}
    trainer.train_step(a_batch(trainer))
    still = [n for n, p in parameters(trainer).items() if torch.equal(p, before[n])]
    assert all("seg_layers.0." in n for n in still), still  # nnU-Net gives the lowest resolution no weight


def vanishing(trainer):
    """A batch in which class 2 has one voxel at full resolution and none below, and class 1 is absent."""
    batch = a_batch(trainer)
    batch["target"] = [torch.zeros_like(t) for t in batch["target"]]
    batch["target"][0][(0, 0, *[5] * (batch["data"].ndim - 2))] = 2
    return batch


@pytest.mark.parametrize("make_batch", [a_batch, vanishing])
def test_both_networks_learn_what_the_losses_say(tiny, make_trainer, make_batch):
    """Term by term from the outputs of the networks: nnU-Net's weights of the scales, presence at full resolution."""
    trainer = make_trainer(NAME, with_stages(tiny(), 4), settings={"ga_topk": 20.0, "ga_gamma": 0.25})
    assert trainer.loss.weight_factors == pytest.approx([2 / 3, 1 / 3, 0])
    batch = make_batch(trainer)
    with torch.no_grad():
        first, second = (
            [net(batch[stream]) for stream in ("data", "unlabeled")]
            for net in (trainer.plans_network, trainer.training_modules["second"])
        )
    ce, dice, cross = GACELoss(20, 0.25), GADiceLoss(), GACELoss(100, 0.25)
    present = present_classes(batch["target"][0], 3)
    supervised = [
        sum(
            w * (ce(x, y) + dice(x, y, present))
            for w, x, y in zip((2 / 3, 1 / 3), outputs, batch["target"][:2], strict=False)
        ).item()
        for outputs in (first[0], second[0])
    ]
    crossed = sum(
        cross(a[0], b[0].argmax(1, keepdim=True)) + cross(b[0], a[0].argmax(1, keepdim=True))
        for a, b in zip(first, second, strict=True)
    )
    terms = list(trainer.losses(trainer._to_device(batch)))
    assert [sorted(t) for t in terms] == [["cps", "sup"], ["cps", "sup_second"], ["cps"], ["cps"]]
    assert terms[0]["sup"].item() == pytest.approx(supervised[0], rel=1e-5)
    assert terms[1]["sup_second"].item() == pytest.approx(supervised[1], rel=1e-5)
    assert sum(t["cps"] for t in terms).item() == pytest.approx(crossed.item() / 2, rel=1e-5)


def test_nnunets_validation_loss_stays_nnunets(tiny, make_trainer):
    trainer, cps = (make_trainer(name, tiny()) for name in (NAME, "nnUNetTrainerCPS"))
    batch = a_batch(trainer)
    with torch.no_grad():
        for t in (trainer, cps):
            t.on_validation_epoch_start()
        assert trainer.validation_step(batch)["loss"] == cps.validation_step(batch)["loss"]


def test_without_deep_supervision_the_losses_are_those_of_the_only_scale(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), initialize=False)
    trainer.enable_deep_supervision = False
    trainer.initialize()
    batch = a_batch(make_trainer(NAME, tiny()))
    batch["target"] = batch["target"][0]
    with torch.no_grad():
        outputs = trainer.plans_network(batch["data"])
    expected = GACELoss(10, 0.5)(outputs, batch["target"]) + GADiceLoss()(outputs, batch["target"])
    assert next(iter(trainer.losses(trainer._to_device(batch))))["sup"].item() == pytest.approx(expected.item())
    assert trainer.train_step(batch)["loss"].isfinite()


def test_it_starts_from_the_weights_of_cps(tiny, make_trainer):
    ours, cps = (parameters(make_trainer(name, tiny())) for name in (NAME, "nnUNetTrainerCPS"))
    assert ours.keys() == cps.keys()
    assert all(torch.equal(p, cps[n]) for n, p in ours.items())


def test_its_settings_are_those_of_the_networks_and_of_its_losses(tiny, make_trainer):
    paper = make_trainer(NAME, tiny(), settings={"preset": "paper"}, initialize=False).settings
    assert (paper.cps_weight, paper.cps_rampup, paper.ga_topk, paper.ga_gamma) == (0.1, 1.0, 10.0, 0.5)
    for wrong in ({"cps_loss": "ce"}, {"ga_topk": 0}, {"ga_topk": 100.5}, {"ga_gamma": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            make_trainer(NAME, tiny(), settings=wrong, initialize=False)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tiny, make_trainer):
    settings = {"save_every": 1}
    assert_resumed_equals_uninterrupted(lambda: make_trainer(f"{NAME}_2epochs", tiny(), settings=settings))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["3d", "2d"])
def test_nnunets_commands_train_continue_validate_and_predict(tiny_copy, run_nnunet, tmp_path, kind):
    dataset = tiny_copy(kind)
    commands_work(dataset, run_nnunet, tmp_path, f"{NAME}_2epochs", {"loss_sup", "loss_sup_second", "loss_cps"})
