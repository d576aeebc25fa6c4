"""CauSSL: CPS until the dependence begins, then both networks turn away from each other's filters."""

from __future__ import annotations

import pytest
import torch
from helpers.runs import assert_plain_checkpoint, assert_resumed_equals_uninterrupted, commands_work
from helpers.steps import a_batch, gradients, parameters, stepped

from nnunet_ssl.networks.filters import filters_of

NAME = "nnUNetTrainerCauSSL"
FROM_THE_START = {"caussl_start": 0.0}


@pytest.mark.parametrize("kind", ["3d", "2d", "multichannel", "anisotropic", "ignore", "regions", "resenc"])
def test_every_kind_of_data_trains_and_its_terms_are_logged(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind), settings=FROM_THE_START)
    stepped(trainer)
    values = trainer._mean_values()
    terms = {"loss_sup", "loss_sup_second", "loss_cps", "weight_cps", "loss_dependence", "weight_dependence"}
    assert set(values) == terms
    assert 0 < values["loss_dependence"] < 2


def test_before_the_start_and_without_weight_it_is_cps_bit_for_bit(tiny, make_trainer):
    cps = stepped(make_trainer("nnUNetTrainerCPS", tiny()))
    for settings in ({"caussl_start": 0.5}, {**FROM_THE_START, "caussl_weight": 0.0}):
        found = stepped(make_trainer(NAME, tiny(), settings=settings))
        assert all(torch.equal(p, found[n]) for n, p in cps.items())
    found = stepped(make_trainer(NAME, tiny(), settings=FROM_THE_START))
    assert not all(torch.equal(p, found[n]) for n, p in cps.items())


def dependences(trainer):
    """The largest that combinations can make of each direction, by an orthonormal basis of the filters' span."""
    of_networks = [filters_of(network) for network in trainer.networks().values()]
    means = []
    for filters, others in (of_networks, of_networks[::-1]):
        shares = []
        for w1, w2 in zip(filters, others, strict=True):
            basis, _ = torch.linalg.qr(w2.detach().double().T)
            w1 = w1.detach().double()
            shares.append(((w1 @ basis).square().sum(1) / w1.square().sum(1)).mean())
        means.append(torch.stack(shares).mean().item())
    return means


def last(trainer):
    return list(trainer.losses(trainer._to_device(a_batch(trainer))))[-1]


def test_both_networks_are_made_independent(tiny, make_trainer):
    """In the authors' code of another variant all but one branch are read without gradient, and learn nothing of it."""
    trainer = make_trainer(NAME, tiny(), settings=FROM_THE_START)
    terms = last(trainer)
    assert list(terms) == ["dependence"]
    assert terms["dependence"].item() == pytest.approx(sum(dependences(trainer)), rel=1e-4)
    terms["dependence"].backward()
    for network in trainer.networks().values():
        for rows in filters_of(network):
            assert rows.requires_grad
        assert network.encoder.stages[1][0].convs[0].conv.weight.grad.any()
        assert network.decoder.transpconvs[0].weight.grad.any()


def test_minimizing_it_makes_them_less_dependent(tiny, make_trainer):
    found = {}
    for weight in (0, 100):
        trainer = make_trainer(NAME, tiny(), settings={**FROM_THE_START, "caussl_weight": weight, "caussl_every": 1})
        for _ in range(6):
            trainer.train_step(a_batch(trainer))
        found[weight] = dependences(trainer)
    assert all(with_it < 0.9 * without for with_it, without in zip(found[100], found[0], strict=True))


def test_combinations_are_fitted_anew_every_so_many_steps(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings={**FROM_THE_START, "caussl_every": 2})
    seen = []
    for _ in range(4):
        trainer.train_step(a_batch(trainer))
        seen.append(trainer.combinations)
    assert seen[0] is seen[1]
    assert seen[2] is seen[3]
    assert not torch.equal(seen[0][0][0], seen[2][0][0])


@pytest.mark.parametrize("passes", ["lean", "joint"])
def test_any_order_of_passes_gives_the_same_gradients(tiny, make_trainer, passes):
    settings = {**FROM_THE_START, "cps_rampup": 0.0}
    expected, found = (
        gradients(make_trainer(NAME, tiny(), settings={**settings, "passes": p}), a_batch(make_trainer(NAME, tiny())))
        for p in ("paired", passes)
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_resumed_it_ends_with_the_weights_of_an_uninterrupted_run(tiny, make_trainer):
    """The run is stopped between two fits, so the combinations are of weights that are gone."""
    settings = {"save_every": 1, "seed": 3, "caussl_every": 3, "cps_rampup": 0, **FROM_THE_START}
    folder = assert_resumed_equals_uninterrupted(lambda: make_trainer(f"{NAME}_2epochs", tiny(), settings=settings))
    state = torch.load(folder / "checkpoint_final_ssl.pth", weights_only=True)
    assert len(state["method"]["combinations"]) == 2
    assert_plain_checkpoint(folder, make_trainer("nnUNetTrainer", tiny()))


def test_the_papers_preset(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings={"preset": "paper"})
    settings = trainer.settings
    assert (settings.cps_weight, settings.cps_loss, settings.cps_on_labeled) == (0.03, "ce", False)
    assert settings.cps_rampup == 1.0
    assert set(parameters(trainer)) == set(parameters(make_trainer("nnUNetTrainerCPS", tiny())))


@pytest.mark.slow
def test_nnunets_commands_train_continue_validate_and_predict(tiny_copy, run_nnunet, tmp_path):
    terms = {"loss_sup", "loss_sup_second", "loss_cps"}
    commands_work(tiny_copy("3d"), run_nnunet, tmp_path, f"{NAME}_2epochs", terms)
