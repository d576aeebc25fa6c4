"""Several ranks step like one. nnU-Net's DDP needs CUDA; here ranks talk through gloo, with their step as it is."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers.steps import a_batch, all_weights, half_a_step, on_two_ranks
from torch import nn

from nnunet_ssl.trainers.optimizers import average_gradients, take_from_first_rank


def _average(rank):
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.arange(3.0) * (rank + 1)
    parameters[1].grad = torch.full((2, 2), float(rank))
    average_gradients(parameters)  # the third had no gradient on any rank
    return [p.grad for p in parameters]


def test_gradients_are_averaged_in_place_and_missing_ones_stay_missing(tmp_path):
    for gradients in on_two_ranks(tmp_path, _average):
        torch.testing.assert_close(gradients[0], torch.arange(3.0) * 1.5)
        torch.testing.assert_close(gradients[1], torch.full((2, 2), 0.5))
        assert gradients[2] is None


def _built_apart(rank):
    torch.manual_seed(rank)  # as nnU-Net's ranks are
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    module[1].running_mean.fill_(rank)
    take_from_first_rank(module)
    return module.state_dict()


def test_modules_that_were_built_apart_become_the_first_ranks(tmp_path):
    first, second = on_two_ranks(tmp_path, _built_apart)
    torch.manual_seed(0)
    assert torch.equal(first["0.weight"], nn.Linear(2, 3).weight)
    for name, weights in first.items():
        assert torch.equal(weights, second[name]), name


def _supervised(rank, trainer, outputs, target):
    trainer.is_ddp = True
    outputs = [x[rank : rank + 1].requires_grad_() for x in outputs]
    trainer._supervised_loss(outputs, [t[rank : rank + 1] for t in target]).backward()
    return outputs[0].grad


def test_a_class_that_another_rank_has_is_not_pushed_down(tiny, make_trainer, tmp_path):
    """GADice's absence is that of the whole batch: class 2 is in the first sample alone, class 1 in none."""
    trainer = make_trainer("nnUNetTrainerGACPS", tiny())
    torch.manual_seed(0)
    shapes = [[n // s for n in trainer.configuration_manager.patch_size] for s in (1, 2)]
    outputs = [torch.randn(2, 3, *shape) for shape in shapes]
    target = [torch.zeros(2, 1, *shape) for shape in shapes]
    for t in target:
        t[0, 0, :2] = 2
    outputs, target = outputs[: len(trainer.loss.weight_factors)], target[: len(trainer.loss.weight_factors)]
    gradients = on_two_ranks(tmp_path, _supervised, trainer, outputs, target)
    expected = {}
    for present in ((True, False, True), (True, False, False)):
        second = [x[1:].clone().requires_grad_() for x in outputs]
        trainer.supervised_loss(second, [t[1:] for t in target], [torch.tensor(present)] * len(second)).backward()
        expected[present[2]] = second[0].grad
    torch.testing.assert_close(gradients[1], expected[True])
    assert not torch.allclose(gradients[1], expected[False])


@pytest.mark.parametrize(
    "more",
    [{}, {"passes": "lean"}, {"passes": "joint"}, {"predict_with": "ema"}],
    ids=["paired", "lean", "joint", "average"],
)
def test_two_ranks_with_half_a_batch_step_like_one_with_all_of_it(tiny, make_trainer, tmp_path, more):

    settings = {"cps_rampup": 0.0, **more}
    together = make_trainer("nnUNetTrainerCPS", tiny(), settings=settings)
    assert not together.configuration_manager.batch_dice  # or the Dice of halves is not the Dice of all
    batch = a_batch(together)
    apart = make_trainer("nnUNetTrainerCPS", tiny(), settings=settings)
    for trainer in (together, apart):
        trainer.on_train_start()
        assert ("average" in trainer.training_modules) == ("predict_with" in more)
    ranks = on_two_ranks(tmp_path, half_a_step, apart, batch)
    loss = together.train_step(batch)["loss"]
    values = together._mean_values()
    for n, p in all_weights(together):
        torch.testing.assert_close(ranks[0]["weights"][n], p.detach(), rtol=1e-4, atol=1e-6, msg=n)
        assert torch.equal(ranks[0]["weights"][n], ranks[1]["weights"][n])
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, loss)
    for name, value in ranks[0]["values"].items():  # the log is the mean over the ranks
        assert value == pytest.approx(values[name], rel=1e-4)
        assert value == ranks[1]["values"][name]


@pytest.mark.slow
def test_compiled_ranks_step_as_plain_ones(tiny, make_trainer, tmp_path, monkeypatch):
    """Networks and losses are traced with the collectives of batch Dice and of SHTA's references between them."""
    found = {}
    for way in ("plain", "compiled"):
        (tmp_path / way).mkdir()
        trainer = make_trainer("nnUNetTrainerSHTA_CPS", tiny("2d"), settings={"cps_rampup": 0.0, "shta_attach": "all"})
        assert trainer.configuration_manager.batch_dice
        assert isinstance(trainer.network, torch._dynamo.OptimizedModule) == (way == "compiled")
        found[way] = on_two_ranks(tmp_path / way, half_a_step, trainer, a_batch(trainer))
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        monkeypatch.setattr(type(trainer), "_do_i_compile", lambda self: True)
    for plain, compiled in zip(found["plain"], found["compiled"], strict=True):
        torch.testing.assert_close(compiled["loss"], plain["loss"])
        for name, weight in plain["weights"].items():
            torch.testing.assert_close(compiled["weights"][name], weight, rtol=1e-3, atol=1e-6, msg=name)
