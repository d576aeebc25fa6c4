"""DHC: which network has which weights, what they are of, and that both learn the background."""

from __future__ import annotations

import pytest
import torch
from helpers.runs import assert_plain_checkpoint, assert_resumed_equals_uninterrupted, commands_work
from helpers.steps import a_batch, gradients, half_a_step, ignoring, on_two_ranks, stepped

from nnunet_ssl.losses.dhc import weighted_cross_entropy, weighted_dice_and_cross_entropy
from nnunet_ssl.trainers import dhc
from nnunet_ssl.trainers.dhc import DHCSettings

NAME = "nnUNetTrainerDHC"


@pytest.mark.parametrize("kind", ["3d", "2d", "multichannel", "anisotropic", "ignore", "resenc"])
def test_every_kind_of_data_trains_and_its_terms_are_logged(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind))
    stepped(trainer)
    assert set(trainer._mean_values()) == {"loss_sup", "loss_sup_second", "loss_cps", "weight_cps"}
    for weights in (trainer.training_modules["difficulty"].weights, trainer.training_modules["frequency"].weights):
        assert weights.isfinite().all()
        assert weights.max() == pytest.approx(1)
        assert weights.min() < 1


def test_each_network_weighs_its_losses_by_its_own_weights(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny())
    batch = a_batch(trainer)
    weights = {"first": torch.tensor([0.2, 1.0, 0.5]), "second": torch.tensor([0.1, 0.3, 1.0])}
    trainer.training_modules["difficulty"].weights.copy_(weights["first"])
    trainer.training_modules["frequency"].weights.copy_(weights["second"])
    with torch.no_grad():
        out = {(n, s): trainer._runnable[n](batch[s]) for n in weights for s in ("data", "unlabeled")}
    passes = list(trainer.losses(trainer._to_device(batch)))
    expected = []
    for stream in ("data", "unlabeled"):
        for name, other in (("first", "second"), ("second", "first")):
            labels = out[other, stream][0].argmax(1, keepdim=True)
            cps = 0.5 * weighted_cross_entropy(out[name, stream][0], labels, weights[name])
            expected.append({"cps": cps.item()})
            if stream == "data":
                scales = zip(trainer.loss.weight_factors, out[name, stream], batch["target"], strict=True)
                total = sum(w * weighted_dice_and_cross_entropy(o, t, weights[name]).item() for w, o, t in scales if w)
                expected[-1]["sup" if name == "first" else "sup_second"] = total
    for terms, values in zip(passes, expected, strict=True):
        assert {n: t.item() for n, t in terms.items()} == pytest.approx(values, rel=1e-5)


def test_weights_are_of_the_firsts_predictions_of_labels_and_the_seconds_of_unlabeled_images(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny())
    batch = a_batch(trainer)
    with torch.no_grad():
        first = trainer._runnable["first"](batch["data"])[0].argmax(1)
        second = trainer._runnable["second"](batch["unlabeled"])[0].argmax(1)
    labels = batch["target"][0][:, 0]
    trainer.train_step(batch)
    counts = 0.99 * labels.flatten().long().bincount(minlength=3) + 0.01 * second.flatten().bincount(minlength=3)
    torch.testing.assert_close(trainer.training_modules["frequency"].counts, counts.float())
    dice = [
        2 * ((first == c) & (labels == c)).sum() / ((first == c).sum() + (labels == c).sum()).float() for c in range(3)
    ]
    torch.testing.assert_close(trainer.training_modules["difficulty"].last, torch.stack(dice))


def test_the_second_network_learns_the_background_too(tiny, make_trainer):
    """In the authors' code its weight is exactly 0, so no cross-entropy says where there is nothing."""
    learns = {}
    for least in (0.0, 0.1):
        trainer = make_trainer(NAME, tiny(), settings={"dhc_least_weight": least, "passes": "lean"})
        batch = a_batch(trainer)
        trainer.training_modules["frequency"].start(torch.tensor([1e6, 1e3, 1e2]))
        with torch.no_grad():  # the first network says background, everywhere
            trainer.plans_network.decoder.seg_layers[-1].bias.copy_(torch.tensor([1e3, 0, 0]))
        list(trainer.losses(trainer._to_device(batch)))[-1]["cps"].backward()
        learns[least] = trainer.training_modules["second"].decoder.seg_layers[-1].weight.grad.any().item()
    assert learns == {0.0: False, 0.1: True}


@pytest.mark.parametrize("passes", ["lean", "joint"])
def test_any_order_of_passes_gives_the_same_gradients(tiny, make_trainer, passes):
    found = []
    for order in ("paired", passes):
        trainer = make_trainer(NAME, tiny(), settings={"cps_rampup": 0.0, "passes": order})
        trainer.training_modules["frequency"].start(torch.tensor([1e6, 1e3, 1e2]))
        found.append(gradients(trainer, a_batch(trainer)))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_resumed_it_ends_with_the_weights_of_an_uninterrupted_run_and_a_plain_checkpoint(tiny, make_trainer):
    settings = {"save_every": 1, "cps_rampup": 0, "seed": 3}
    folder = assert_resumed_equals_uninterrupted(lambda: make_trainer(f"{NAME}_2epochs", tiny(), settings=settings))
    state = torch.load(folder / "checkpoint_final_ssl.pth", weights_only=True)["modules"]
    assert {"difficulty.weights", "difficulty.unlearned", "frequency.counts"} <= set(state)
    assert_plain_checkpoint(folder, make_trainer("nnUNetTrainer", tiny()))


def test_two_ranks_count_together(tiny, make_trainer, tmp_path):
    trainer = make_trainer(NAME, tiny())
    batch = a_batch(trainer)
    ranks = on_two_ranks(tmp_path, half_a_step, trainer, batch)
    alone = make_trainer(NAME, tiny())
    alone.train_step(batch)
    for rank in ranks:
        for name in ("difficulty", "frequency"):
            torch.testing.assert_close(alone.training_modules[name].weights, rank["buffers"][f"{name}.weights"])


def test_the_papers_preset(tiny, make_trainer):
    settings = make_trainer(NAME, tiny(), settings={"preset": "paper"}).settings
    assert (settings.dhc_least_weight, settings.cps_weight, settings.cps_rampup) == (0.0, 0.1, 1.0)


def test_ignored_voxels_are_not_counted(tiny, make_trainer, monkeypatch):
    """They are background to it, which the networks predict everywhere here."""
    likeliest = dhc.likeliest_class
    monkeypatch.setattr(dhc, "likeliest_class", lambda logits: torch.zeros_like(likeliest(logits)))
    trainer = make_trainer(NAME, tiny("ignore"))
    batch = ignoring(trainer, a_batch(trainer))
    target = batch["target"][0]
    list(trainer.losses(trainer._to_device(batch)))
    counted = {name: counts.sum().item() for name, counts in trainer._counted.items()}
    known = (target != trainer.label_manager.ignore_label).sum().item()
    assert counted["labeled"] == counted["predicted"] == known
    assert counted["right"] == (target == 0).sum().item()


@pytest.mark.slow
def test_nnunets_commands_train_continue_validate_and_predict(tiny_copy, run_nnunet, tmp_path):
    commands_work(tiny_copy("3d"), run_nnunet, tmp_path, f"{NAME}_2epochs", {"loss_sup", "loss_sup_second", "loss_cps"})


def test_what_labels_say_outvotes_the_other_networks_inventions():
    """Where a third of the background is called an organ, learning still moves it back towards background."""
    weights = torch.tensor([0.1, 1.0, 1.0])
    target = torch.zeros(1, 1, 1000, dtype=torch.long)
    target[..., :100] = 1
    invented = target.clone()
    invented[..., 100:400] = 1

    def moves_to_background(weight: float) -> bool:
        logits = torch.zeros(1, 3, 1000, requires_grad=True)
        cross = 0.5 * weight * weighted_cross_entropy(logits, invented, weights)
        (weighted_cross_entropy(logits, target, weights) + cross).backward()
        background, organ, _ = logits.grad[0, :, 100:400]
        return bool((background < organ).all())

    assert moves_to_background(DHCSettings().cps_weight)
    assert not moves_to_background(1.0)  # the weight of CPS
