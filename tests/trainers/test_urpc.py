"""URPC: the pyramid that a network has, what each pass holds, and a dropout that only training knows."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers.runs import assert_resumed_equals_uninterrupted, commands_work
from helpers.steps import a_batch, gradients, parameters, with_stages

from nnunet_ssl.errors import UserError
from nnunet_ssl.losses.urpc import uncertainty_rectified_consistency

NAME = "nnUNetTrainerURPC"


@pytest.mark.parametrize("kind", ["3d", "2d", "multichannel", "anisotropic", "ignore", "regions", "resenc"])
def test_every_kind_of_data_trains_and_its_terms_are_logged(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind), settings={"preset": "paper"})
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    assert all(trainer.train_step(next(trainer.dataloader_train))["loss"].isfinite() for _ in range(2))
    values = trainer._mean_values()
    assert set(values) == {"loss_sup", "loss_urpc", "weight_urpc"}
    assert 0 < values["loss_urpc"] < 5
    assert values["weight_urpc"] < 0.001  # at the start of a ramp over the whole training


@pytest.mark.parametrize(
    ("stages", "wanted", "scales", "of_loss"),
    [
        (3, 4, 2, [2 / 3, 1 / 3]),  # nnU-Net's lowest scale learns from labels too, since it is in the pyramid
        (4, 4, 2, [2 / 3, 1 / 3, 0]),
        (5, 4, 3, [4 / 7, 2 / 7, 1 / 7, 0]),
        (5, 2, 2, [4 / 7, 2 / 7, 1 / 7, 0]),
    ],
)
def test_the_pyramid_is_what_deep_supervision_trains(tiny, make_trainer, stages, wanted, scales, of_loss):
    """Term by term from the outputs of the network."""
    settings = {"urpc_scales": wanted, "urpc_kl": "scale_to_mean"}
    trainer = make_trainer(NAME, with_stages(tiny(), stages), settings=settings)
    assert trainer.num_scales == scales
    assert list(trainer.loss.weight_factors) == pytest.approx(of_loss)
    batch = a_batch(trainer)
    with torch.no_grad():
        labeled, unlabeled = (trainer.plans_network(batch[stream]) for stream in ("data", "unlabeled"))
    terms = list(trainer.losses(trainer._to_device(batch)))
    assert [list(t) for t in terms] == [["sup"], ["urpc"]]
    supervised = sum(w * trainer.loss.loss(x, y) for w, x, y in zip(of_loss, labeled, batch["target"], strict=True))
    assert terms[0]["sup"].item() == pytest.approx(supervised.item(), rel=1e-5)
    expected = uncertainty_rectified_consistency(unlabeled[:scales], "scale_to_mean")
    assert terms[1]["urpc"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms[1]["urpc"].item() != pytest.approx(
        uncertainty_rectified_consistency(unlabeled[:scales], "mean_to_scale").item()
    )


def test_regions_have_a_sigmoid_each(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny("regions"))
    trainer.on_train_start()
    batch = trainer._to_device(next(trainer.dataloader_train))
    with torch.no_grad():
        expected = uncertainty_rectified_consistency(
            trainer.plans_network(batch.unlabeled.images), "mean_to_scale", regions=True
        )
        terms = list(trainer.losses(batch))
    assert terms[1]["urpc"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_detached_mean_gives_other_gradients(tiny, make_trainer):
    settings = {"urpc_rampup": 0.0, "urpc_weight": 100.0}
    with_it, without = (
        gradients(trainer, a_batch(trainer))
        for trainer in (
            make_trainer(NAME, tiny(), settings={**settings, "urpc_detach_mean": detach}) for detach in (False, True)
        )
    )
    assert any((g - without[n]).abs().max() > 1e-3 for n, g in with_it.items())


def test_every_parameter_learns_and_the_whole_pyramid_from_unlabeled_images(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings={"urpc_rampup": 0.0})
    assert trainer.term_weights() == {"urpc": 0.1}
    found = gradients(trainer, a_batch(trainer))
    assert all(g is not None and g.abs().max() > 0 for n, g in found.items() if not n.endswith("conv.bias")), found
    list(trainer.losses(trainer._to_device(a_batch(trainer))))[1]["urpc"].backward()
    assert all(p.grad.abs().max() > 0 for p in trainer.plans_network.decoder.seg_layers.parameters())


@pytest.mark.parametrize("dropout", [[], [0.3, 0.1]])
def test_lean_and_joint_passes_give_the_same_gradients(tiny, make_trainer, dropout):
    settings = {"urpc_rampup": 0.0, "urpc_dropout": dropout}
    found = []
    for passes in ("lean", "joint"):
        trainer = make_trainer(NAME, tiny(), settings={**settings, "passes": passes})
        trainer.network.train()
        torch.manual_seed(0)
        found.append(gradients(trainer, a_batch(trainer)))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_it_steps_like_labeled_only_where_nothing_is_asked_of_unlabeled_images(tiny, make_trainer):
    dataset = with_stages(tiny(), 4)
    ours = make_trainer(NAME, dataset, settings={"urpc_weight": 0.0})
    baseline = make_trainer("nnUNetTrainerLabeledOnly", dataset)
    for seed in range(2):
        for trainer in (ours, baseline):
            trainer.train_step(a_batch(trainer, seed))
    assert all(torch.equal(p, parameters(baseline)[n]) for n, p in parameters(ours).items())


# ----------------------------------------------------------------------------------------------------------- dropout


def test_dropout_is_before_the_heads_from_deep_to_shallow(tiny, make_trainer):
    trainer = make_trainer(NAME, with_stages(tiny(), 5), settings={"urpc_dropout": [0.9, 0.7, 0.5, 0.2]})
    shares = {}
    for i, head in enumerate(trainer.plans_network.decoder.seg_layers):
        feature = torch.ones(200, head.in_channels, *[2] * 3)
        inputs = feature
        for hook in head._forward_pre_hooks.values():
            inputs = hook(head, (inputs,))
        dropped = inputs.flatten(2)
        assert ((dropped == 0).all(2) | (dropped != 0).all(2)).all()  # whole channels
        shares[i] = (dropped == 0).float().mean().item()
    assert [shares[i] for i in range(4)] == pytest.approx([0, 0.7, 0.5, 0.2], abs=0.06)  # S is 3, the lowest is not in


def test_dropout_perturbs_training_and_nothing_else(tiny, make_trainer):
    plain = make_trainer(NAME, tiny())
    trainer = make_trainer(NAME, tiny(), settings={"urpc_dropout": [0.3, 0.3]})
    assert trainer.plans_network.state_dict().keys() == plain.plans_network.state_dict().keys()
    images = a_batch(trainer)["data"]
    for network in (plain.plans_network, trainer.plans_network):
        network.eval()
    with torch.no_grad():
        expected, found, again = (n(images) for n in (plain.plans_network, *[trainer.plans_network] * 2))
        trainer.network.train()
        first, second = (trainer.network(images) for _ in range(2))
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(expected, found, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        losses = [trainer.validation_step(a_batch(trainer))["loss"] for _ in range(2)]
    assert losses[0] == losses[1]


def test_dropout_lives_with_torch_compile(tiny, make_trainer, monkeypatch):
    """Traced in training, then in evaluation, then in training again; graphs run as they are."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    plain = make_trainer(NAME, tiny("2d"))
    monkeypatch.setattr(type(plain), "_do_i_compile", lambda self: True)
    trainer = make_trainer(NAME, tiny("2d"), settings={"urpc_dropout": [0.3, 0.3]})
    assert isinstance(trainer.network, torch._dynamo.OptimizedModule)
    images = a_batch(trainer)["data"]
    for _ in range(2):
        trainer.network.train()
        first, second = (trainer.network(images) for _ in range(2))
        assert not torch.equal(first[0], second[0])
        trainer.network.eval()
        plain.network.eval()
        for a, b in zip(plain.network(images), trainer.network(images), strict=True):
            torch.testing.assert_close(a, b)


def test_what_taps_the_last_feature_sees_it_after_the_dropout(tiny, make_trainer):
    from nnunet_ssl.networks.feature_tap import FeatureTap

    trainer = make_trainer(NAME, tiny(), settings={"urpc_dropout": [0.5]})
    head, seen = trainer.plans_network.decoder.seg_layers[-1], []
    head.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    trainer.network.train()
    _, feature = FeatureTap(trainer.plans_network)(a_batch(trainer)["data"])
    assert torch.equal(feature, seen[0])
    assert (feature.flatten(2) == 0).all(2).any()


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # nnU-Net has no weight for one output
def test_a_network_without_two_outputs_is_refused_in_a_sentence(tiny, make_trainer):
    with pytest.raises(UserError, match=r"'3d_fullres' in nnUNetPlans gives 1; use plans with at least three stages"):
        make_trainer(NAME, with_stages(tiny(), 2))
    trainer = make_trainer(NAME, tiny(), initialize=False)
    trainer.enable_deep_supervision = False
    with pytest.raises(UserError, match="gives 1"):
        trainer.initialize()


@pytest.mark.parametrize(
    "wrong", [{"urpc_scales": 1}, {"urpc_dropout": [0.5, 1.0]}, {"urpc_dropout": 0.5}, {"urpc_kl": "both"}]
)
def test_settings_that_cannot_work_are_refused(tiny, make_trainer, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        make_trainer(NAME, tiny(), settings=wrong, initialize=False)


# --------------------------------------------------------------------------------------------------------- whole runs


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tiny, make_trainer):
    """Dropout draws the same channels too."""
    settings = {"save_every": 1, "urpc_dropout": [0.3, 0.1]}
    assert_resumed_equals_uninterrupted(lambda: make_trainer(f"{NAME}_2epochs", tiny(), settings=settings))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["3d", "2d"])
def test_nnunets_commands_train_continue_validate_and_predict(tiny_copy, run_nnunet, tmp_path, kind):

    commands_work(tiny_copy(kind), run_nnunet, tmp_path, f"{NAME}_2epochs", {"loss_sup", "loss_urpc"})
