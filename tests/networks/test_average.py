"""The average of a network's weights: its closed form, and that it changes places with them without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nnunet_ssl.networks.average import WeightAverage


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def expected_average(history, share):
    """Each step's weights times what the later steps leave of it, in float64.

    Args:
        history: the parameters after each step.
        share: as in the settings.
    """
    new = [min(1.0, 1 / (share * (step + 1))) for step in range(len(history))]
    kept = [n * torch.tensor([1 - m for m in new[i + 1 :]]).double().prod().item() for i, n in enumerate(new)]
    assert sum(kept) == pytest.approx(1)
    return [sum(k * p.double() for k, p in zip(kept, of_one, strict=True)) for of_one in zip(*history, strict=True)]


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_the_closed_form(share):
    trained = network()
    average, history = WeightAverage(trained, share), []
    for step in range(25):
        for p in trained.parameters():
            p.data += torch.randn_like(p)
        history.append(weights(trained))
        average.update(trained, step)
        for own, expected in zip(average.other, expected_average(history, share), strict=True):
            torch.testing.assert_close(own, expected.float())


def test_it_spans_the_last_share_of_any_number_of_steps():
    """Its center lies half of about twice that share back, and what was before twice of it hardly counts."""
    for steps in (1000, 100_000):
        weight, weights_of = 1.0, []
        for step in reversed(range(steps)):
            new = min(1.0, 1 / (0.1 * (step + 1)))
            weights_of.append(weight * new)
            weight *= 1 - new
        age = torch.tensor(weights_of, dtype=torch.float64)
        assert (age * torch.arange(steps)).sum() / steps == pytest.approx(0.09, abs=0.005)
        assert age[steps // 2 :].sum() < 0.002


def test_the_mean_of_all_with_share_1_and_the_network_itself_at_first():
    trained = network()
    mean, short, seen = WeightAverage(trained, 1.0), WeightAverage(trained, 0.25), []
    for step in range(4):
        nn.init.normal_(trained[0].weight)
        seen.append(trained[0].weight.detach().clone())
        mean.update(trained, step)
        short.update(trained, step)
        assert torch.equal(short.other[0], trained[0].weight)  # bit for bit
    torch.testing.assert_close(mean.other[0].data, torch.stack(seen).mean(0))


def test_exchanged_and_back_nothing_has_changed():
    trained = network()
    average = WeightAverage(trained, 1.0)
    trained(torch.randn(2, 1, 8, 8) + 5)
    for p in trained.parameters():
        p.data += 1
    tensors, raw, averaged = list(trained.parameters()), copy.deepcopy(trained.state_dict()), weights(average)
    with average.predicting(trained):
        with average.predicting(trained):  # as a checkpoint in the course of validation
            assert all(torch.equal(p, a) for p, a in zip(trained.parameters(), averaged, strict=True))
        assert average.in_network
        assert all(a is b for a, b in zip(trained.parameters(), tensors, strict=True))
        assert torch.equal(trained[1].running_mean, raw["1.running_mean"])  # batch norm's are the network's own
    assert not average.in_network
    assert all(torch.equal(t, raw[n]) for n, t in trained.state_dict().items())
    assert all(torch.equal(p, a) for p, a in zip(average.parameters(), averaged, strict=True))


def test_it_neither_has_nor_stops_gradients():
    trained = network()
    average = WeightAverage(trained, 0.5)
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    trained(torch.randn(2, 1, 8, 8)).square().mean().backward()
    optimizer.step()
    average.update(trained, 0)
    with average.predicting(trained):
        pass
    trained(torch.randn(2, 1, 8, 8)).square().mean().backward()
    assert all(p.requires_grad and p.grad is not None for p in trained.parameters())
    assert all(not p.requires_grad and p.grad is None for p in average.parameters())
