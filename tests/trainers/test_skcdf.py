"""SKCDF: which decoder learns from which images, what leaks into what, and that voxels left out say nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.runs import assert_plain_checkpoint, assert_resumed_equals_uninterrupted, commands_work
from helpers.steps import a_batch, gradients_by_passes, ignoring, parameters, stepped, who_learns, with_stages

from nnunet_ssl.losses.partial import partial_dice_and_cross_entropy
from nnunet_ssl.losses.squared_dice import squared_dice_of_shown
from nnunet_ssl.trainers import skcdf

NAME = "nnUNetTrainerSKCDF"
TERMS = {"loss_sup", "loss_sup_balanced", "loss_pseudo", "loss_pseudo_balanced"}


def part(name):
    """encoder, the decoder that predicts, or what of training it is."""
    return name.split(".")[1] if name.startswith("training.") else "own_" + name.split(".")[0]


@pytest.mark.parametrize("kind", ["3d", "2d", "multichannel", "anisotropic", "ignore", "resenc"])
def test_every_kind_of_data_trains_and_its_terms_are_logged(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind))
    stepped(trainer)
    values = trainer._mean_values()
    assert set(values) == TERMS | {"weight_sup_balanced", "weight_pseudo", "weight_pseudo_balanced", "drawn"}
    assert 0 < values["drawn"] < 1


def test_each_part_learns_from_its_own_terms(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny())
    assert who_learns(trainer, part) == {
        "sup": {"own_encoder", "exchange", "decoder"},
        "sup_balanced": {"own_encoder", "exchange", "decoder", "balanced_labeled"},
        "pseudo": {"own_encoder", "own_decoder"},
        "pseudo_balanced": {"own_encoder", "own_decoder", "balanced"},
    }


def test_the_unlabeled_decoder_learns_what_the_labeled_one_says_of_unlabeled_images(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny())
    batch = a_batch(trainer)
    trainer.global_step = 1
    with torch.no_grad():
        for name in ("decoder", "balanced", "balanced_labeled", "exchange"):
            for parameter in trainer.training_modules[name].parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        path = trainer.networks()["labeled"]
        network, both = trainer.plans_network, torch.cat([batch["data"], batch["unlabeled"]])
        skips = network.encoder(batch["unlabeled"])
        skips[-1] = trainer.training_modules["exchange"](network.encoder(batch["data"])[-1], skips[-1])[1]
        said = trainer.training_modules["decoder"](skips)[0]
        torch.testing.assert_close(path(both)[2][0], said)
        pseudo = said.argmax(1, keepdim=True)
        expected = partial_dice_and_cross_entropy(network(batch["unlabeled"])[0], pseudo, pseudo >= 0)
    terms = list(trainer.losses(trainer._to_device(batch)))[-1]
    assert terms["pseudo"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_voxels_that_are_left_out_have_no_gradient_and_count_in_the_mean(tiny, make_trainer, monkeypatch):
    """As in the authors' code; in a mean of what is drawn the balanced heads would lead the decoders."""
    trainer = make_trainer(NAME, tiny())
    batch, seen = a_batch(trainer), []

    def keep(_module, _inputs, logits):
        if logits.requires_grad:
            logits.retain_grad()
            seen.append(logits)

    trainer.training_modules["balanced_labeled"].register_forward_hook(keep)
    classes = trainer.training_modules["classes"]
    drawn = torch.rand(batch["target"][0].shape) < 0.2
    monkeypatch.setattr(classes, "draw", lambda labels, progress=1.0: drawn)
    loss = next(iter(trainer.losses(trainer._to_device(batch))))["sup_balanced"]
    loss.backward()
    [logits] = seen
    each = F.cross_entropy(logits.float(), batch["target"][0][:, 0].long(), reduction="none")[:, None]
    dice = squared_dice_of_shown(logits, batch["target"][0], drawn)
    torch.testing.assert_close(loss, (each * drawn).sum() / drawn.numel() + dice)
    has_gradient = logits.grad.abs().sum(1, keepdim=True) > 0
    assert torch.equal(has_gradient, drawn)


def test_the_leaks_are_those_of_the_paper(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings={"skcdf_decay": 0.9})
    modules, network = trainer.training_modules, trainer.plans_network
    with torch.no_grad():
        for i, name in enumerate(("decoder", "balanced", "balanced_labeled")):
            for parameter in modules[name].parameters():
                parameter.add_(i + 1.0)
    before = {n: p.detach().clone() for n, p in parameters(trainer).items()}
    trainer.after_step()
    after = parameters(trainer)
    head = f"seg_layers.{len(network.decoder.seg_layers) - 1}"
    for name, p in before.items():
        expected = p
        if name.startswith(("decoder.", f"training.decoder.{head}")) and "encoder" not in name:
            mine = name.removeprefix("training.")
            if mine.startswith(f"decoder.{head}"):
                kind = mine.rsplit(".", 1)[1]
                labeled = 0.9 * before[f"training.{mine}"] + 0.1 * before[f"training.balanced_labeled.{kind}"]
                own = 0.9 * before[mine] + 0.1 * before[f"training.balanced.{kind}"]
            else:
                labeled, own = before[f"training.{mine}"], before[mine]
            expected = labeled if name.startswith("training.") else 0.9 * own + 0.1 * labeled
        elif name.startswith("training.balanced."):
            expected = 0.9 * p + 0.1 * before[name.replace("balanced", "balanced_labeled")]
        torch.testing.assert_close(after[name].detach(), expected, msg=name)


def test_both_decoders_start_alike_also_from_pretrained_weights(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny())
    with torch.no_grad():
        trainer.plans_network.decoder.transpconvs[0].weight.fill_(0.5)
    next(iter(trainer.losses(trainer._to_device(a_batch(trainer)))))
    assert (trainer.training_modules["decoder"].transpconvs[0].weight == 0.5).all()


def test_lean_and_joint_passes_give_the_same_gradients(tiny, make_trainer):
    found = gradients_by_passes(
        lambda passes: make_trainer(NAME, tiny(), settings={"passes": passes, "skcdf_rampup": 0})
    )
    for name, gradient in found["lean"].items():
        torch.testing.assert_close(gradient, found["joint"][name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_network_of_two_stages_learns(tiny, make_trainer):
    trainer = make_trainer(NAME, with_stages(tiny(), 2))
    assert trainer.train_step(a_batch(trainer))["loss"].isfinite()


def test_resumed_it_ends_with_the_weights_of_an_uninterrupted_run_and_a_plain_checkpoint(tiny, make_trainer):
    settings = {"save_every": 1, "skcdf_rampup": 0, "seed": 3}
    folder = assert_resumed_equals_uninterrupted(lambda: make_trainer(f"{NAME}_2epochs", tiny(), settings=settings))
    assert_plain_checkpoint(folder, make_trainer("nnUNetTrainer", tiny()))


def test_ignored_voxels_teach_the_balanced_head_nothing(tiny, make_trainer, monkeypatch):
    trainer = make_trainer(NAME, tiny("ignore"))
    shown, loss = [], skcdf.partial_dice_and_cross_entropy
    monkeypatch.setattr(
        skcdf, "partial_dice_and_cross_entropy", lambda *args, **kw: shown.append(args[2]) or loss(*args, **kw)
    )
    batch = ignoring(trainer, a_batch(trainer))
    list(trainer.losses(trainer._to_device(batch)))
    ignored = batch["target"][0] == trainer.label_manager.ignore_label
    assert not shown[0][ignored].any()
    assert shown[0][~ignored].any()


def test_pseudo_labels_are_drawn_by_progress(tiny, make_trainer, monkeypatch):
    trainer = make_trainer(NAME, tiny("2d"))
    classes, seen = trainer.training_modules["classes"], []
    draw = classes.draw
    monkeypatch.setattr(classes, "draw", lambda *args: seen.append(args[1:]) or draw(*args))
    trainer.global_step = trainer.total_steps // 4
    list(trainer.losses(trainer._to_device(a_batch(trainer))))
    assert seen == [(), (0.25,)]


@pytest.mark.slow
def test_nnunets_commands_train_continue_validate_and_predict(tiny_copy, run_nnunet, tmp_path):
    commands_work(tiny_copy("3d"), run_nnunet, tmp_path, f"{NAME}_2epochs", TERMS)
