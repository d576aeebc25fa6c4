"""MC-Net+: the terms of its decoders, what learns from them, and that the plans' own network alone predicts."""

from __future__ import annotations

from math import exp

import pytest
import torch
from helpers.runs import assert_plain_checkpoint, assert_resumed_equals_uninterrupted, commands_work
from helpers.steps import a_batch, gradients_by_passes, with_stages

NAME = "nnUNetTrainerMCNetPlus"
TERMS = {"sup", "sup_linear", "sup_nearest", "mutual"}


@pytest.mark.parametrize("kind", ["3d", "2d", "multichannel", "anisotropic", "ignore", "regions", "resenc"])
def test_every_kind_of_data_trains_and_its_terms_are_logged(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind))
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    assert all(trainer.train_step(next(trainer.dataloader_train))["loss"].isfinite() for _ in range(2))
    assert set(trainer._mean_values()) == {f"{what}_{term}" for what in ("loss", "weight") for term in TERMS}


def sharp(p, temperature, regions):
    """As the card has it, of each channel or over the classes, in double precision."""
    power = p ** (1 / temperature)
    return power / (power + (1 - p) ** (1 / temperature)) if regions else power / power.sum(1, keepdim=True)


@pytest.mark.parametrize("kind", ["3d", "2d", "regions"])
def test_the_terms_are_the_equations(tiny, make_trainer, kind):
    """All pairs of decoders, in both directions, over both streams; each decoder learns from labels."""
    trainer, regions = make_trainer(NAME, tiny(kind), settings={"mcnet_temperature": 0.3}), kind == "regions"
    batch, network = a_batch(trainer), trainer.plans_network
    decoders = [network.decoder, *(trainer.training_modules[f"decoder_{mode}"] for mode in ("linear", "nearest"))]
    mutual = 0.0
    with torch.no_grad():
        labeled, unlabeled = (
            [decoder(network.encoder(batch[stream])) for decoder in decoders] for stream in ("data", "unlabeled")
        )
        for outputs in (labeled, unlabeled):
            p = [o[0].double().sigmoid() if regions else o[0].double().softmax(1) for o in outputs]
            for i in range(3):
                for j in range(3):
                    mutual += 0.5 * (p[i] - sharp(p[j], 0.3, regions)).square().mean().item() if i != j else 0
        supervised = [trainer.loss(outputs, batch["target"]).item() for outputs in labeled]
    first, second = trainer.losses(trainer._to_device(batch))
    assert [first[n].item() for n in ("sup", "sup_linear", "sup_nearest")] == pytest.approx(supervised, rel=1e-5)
    assert list(second) == ["mutual"]
    assert (first["mutual"] + second["mutual"]).item() == pytest.approx(mutual, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "supervised", "full", "half_way"), [("3d", 0.5, 1, 1), ("2d", 1, 0.1, 0.1 * exp(-1.25))]
)
def test_weights_are_those_of_the_authors_script_for_the_dimension(
    tiny, make_trainer, kind, supervised, full, half_way
):
    trainer = make_trainer(NAME, tiny(kind))
    trainer.on_train_start()
    found = {}
    for share in (0.5, 1):
        trainer.global_step = round(share * trainer.total_steps)
        found[share] = trainer.term_weights()
    assert [found[share]["mutual"] for share in (0.5, 1)] == pytest.approx([half_way, full])
    assert {found[1][term] for term in TERMS - {"mutual"}} == {supervised}
    trainer = make_trainer(NAME, tiny(kind), settings={"mcnet_weight": 0.25, "mcnet_rampup": 0})
    assert trainer.term_weights()["mutual"] == 0.25


def test_every_decoder_learns_from_unlabeled_images_and_through_the_target_unless_it_is_detached(tiny, make_trainer):
    found = {}
    for detach in (False, True):
        trainer = make_trainer(NAME, tiny(), settings={"mcnet_detach_target": detach})
        list(trainer.losses(trainer._to_device(a_batch(trainer))))[1]["mutual"].backward()
        heads = [trainer.plans_network.decoder, *trainer.training_modules.values()]
        found[detach] = [decoder.seg_layers[-1].weight.grad for decoder in heads]
        assert all(g.any() for g in found[detach])
        assert trainer.plans_network.encoder.stages[0][0].convs[0].conv.weight.grad.any()
    assert not any(torch.allclose(a, b) for a, b in zip(found[False], found[True], strict=True))


def test_lean_and_joint_passes_give_the_same_gradients(tiny, make_trainer):
    found = gradients_by_passes(
        lambda passes: make_trainer(NAME, tiny(), settings={"passes": passes, "mcnet_rampup": 0})
    )
    lean, joint = found["lean"], found["joint"]
    for parameter, gradient in lean.items():
        torch.testing.assert_close(gradient, joint[parameter], rtol=1e-4, atol=1e-6, msg=parameter)


def test_a_network_of_two_stages_learns(tiny, make_trainer):
    trainer = make_trainer(NAME, with_stages(tiny(), 2))
    assert trainer.train_step(a_batch(trainer))["loss"].isfinite()


def test_shta_reads_the_feature_of_the_plans_own_decoder(tiny, make_trainer):
    trainer = make_trainer("nnUNetTrainerSHTA_MCNetPlus", tiny(), settings={"shta_attach": "all"})
    assert trainer.networks_with_shta() == ["first"]
    batch, seen = a_batch(trainer), []
    trainer.training_modules["shta_first"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trainer.train_step(batch)
    assert {"loss_shta", *(f"loss_{term}" for term in TERMS)} <= set(trainer._mean_values())
    own = trainer._runnable["first"](batch["data"])[0]["own"]
    assert len(seen) == 1
    assert own[0].shape[2:] == seen[0].shape[2:]
    assert trainer.training_modules["shta_first"].embed[0].normalized_shape == (seen[0].shape[1],)


def test_resumed_it_ends_with_the_weights_of_an_uninterrupted_run_and_a_plain_checkpoint(tiny, make_trainer):
    settings = {"save_every": 1, "mcnet_rampup": 0, "seed": 3}
    folder = assert_resumed_equals_uninterrupted(lambda: make_trainer(f"{NAME}_2epochs", tiny(), settings=settings))
    assert_plain_checkpoint(folder, make_trainer("nnUNetTrainer", tiny()))


@pytest.mark.slow
def test_nnunets_commands_train_continue_validate_and_predict(tiny_copy, run_nnunet, tmp_path):
    terms = {f"loss_{term}" for term in TERMS}
    commands_work(tiny_copy("3d"), run_nnunet, tmp_path, f"{NAME}_2epochs", terms)
