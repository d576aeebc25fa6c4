"""nnU-Net's SGD as one kernel: the same steps, and the same state in a checkpoint. The kernel is there on a CPU too."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.steps import a_batch, parameters
from torch import nn

from nnunet_ssl.trainers.optimizers import fused


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.01, weight_decay=3e-5, momentum=0.99, nesterov=True)


def both():
    """A plain optimizer and a fused one of equal parameters, of which the last gets no gradient."""
    torch.manual_seed(0)
    plain = nn.ParameterList(torch.randn(shape) for shape in ((3, 4), (5,), (2,)))
    one_kernel = copy.deepcopy(plain)
    return (plain, sgd(plain)), (one_kernel, fused(sgd(one_kernel)))


def give_gradients(seed, *networks):
    for network in networks:
        torch.manual_seed(seed)
        for p in list(network)[:-1]:
            p.grad = torch.randn_like(p)


def assert_close(a, b):
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_it_steps_like_the_plain_one_and_takes_over_from_it_and_back():
    (a, plain), (b, one_kernel) = both()
    for seed in range(6):
        give_gradients(seed, a, b)
        plain.step()
        one_kernel.step()
        assert_close(a, b)
        if seed == 2:  # as --c does, with the other's checkpoint
            states = [copy.deepcopy(optimizer.state_dict()) for optimizer in (plain, one_kernel)]
            assert states[0]["param_groups"] == states[1]["param_groups"]
            assert states[0]["state"].keys() == states[1]["state"].keys() == {0, 1}
            plain.load_state_dict(states[1])
            one_kernel.load_state_dict(states[0])
            assert plain.param_groups[0]["fused"] is None
            assert one_kernel.param_groups[0]["fused"] is True


def test_groups_that_are_added_later_are_nnunets():
    _, (_, one_kernel) = both()
    one_kernel.add_param_group({"params": [nn.Parameter(torch.ones(2))], "weight_decay": 0.0})
    first, added = (
        {k: v for k, v in g.items() if k not in ("params", "weight_decay")} for g in one_kernel.param_groups
    )
    assert first == added


def test_a_first_step_that_overflows_leaves_nothing_behind():
    (a, plain), (b, one_kernel) = both()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in b]
    scaler.scale(sum(p.sum() for p in list(b)[:-1])).backward()
    b[0].grad[0, 0] = torch.inf
    scaler.unscale_(one_kernel)
    scaler.step(one_kernel)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, q) for p, q in zip(b, before, strict=True))
    assert not any(state["momentum_buffer"].any() for state in one_kernel.state.values())
    for seed in range(2):
        give_gradients(seed, a, b)
        plain.step()
        scaler.step(one_kernel)
        scaler.update()
        assert_close([*a][2:], [*b][2:])


@pytest.mark.parametrize("name", ["nnUNetTrainerCPS", "nnUNetTrainerSHTA_CPS"])
def test_trainers_take_it_on_a_gpu_alone(tiny, make_trainer, name):
    trainer = make_trainer(name, tiny())
    assert not trainer.optimizer.defaults["fused"]
    plain = copy.deepcopy(trainer.optimizer.state_dict()["param_groups"])
    batch, device = a_batch(trainer), trainer.device
    trainer.device = torch.device("cuda")  # which nothing but the choice looks at here
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    trainer._configure_training_optimizers()
    trainer.device = device
    for optimizer, schedule in (
        (trainer.optimizer, trainer.lr_scheduler),
        (trainer.training_optimizer, trainer.training_lr_scheduler),
    ):
        assert all(group["fused"] for group in optimizer.param_groups)
        schedule.step(3)
        assert {group["lr"] for group in optimizer.param_groups} == set(schedule.get_last_lr())
        assert optimizer.param_groups[0]["lr"] < trainer.initial_lr
    trainer.lr_scheduler.step(0)
    assert trainer.optimizer.state_dict()["param_groups"] == plain
    assert trainer.train_step(batch)["loss"].isfinite()


def test_a_scaler_changes_no_step(tiny, make_trainer):
    """Gradients are clipped as they are without it."""
    stepped = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        torch.manual_seed(0)
        trainer = make_trainer("nnUNetTrainerCPS", tiny("2d"), settings={"cps_rampup": 0.0})
        trainer.grad_scaler = scaler
        trainer.train_step(a_batch(trainer))
        stepped.append({name: p.detach().clone() for name, p in parameters(trainer).items()})
    for name, p in stepped[0].items():
        torch.testing.assert_close(p, stepped[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_both_networks_have_one_learning_rate(tiny, make_trainer):
    trainer = make_trainer("nnUNetTrainerCPS", tiny("2d"))
    trainer.current_epoch = 1
    trainer.on_train_epoch_start()
    first, second = (o.param_groups[0]["lr"] for o in (trainer.optimizer, trainer.training_optimizer))
    assert first == second < trainer.initial_lr
