"""The dependence of CauSSL, against the closed form of its largest value, and where its gradients go."""

from __future__ import annotations

import pytest
import torch

from nnunet_ssl.losses.dependence import best_combinations, dependence


def some(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def share_in_span(filters, others):
    """Of each filter the squared share of it that lies in the span of the others, by an orthonormal basis."""
    basis, _ = torch.linalg.qr(others.double().T)
    return (filters.double() @ basis).square().sum(1) / filters.double().square().sum(1)


def test_it_is_the_mean_square_cosine_over_filters_then_layers():
    layers = [(some(4, 10), some(3, 10, seed=1), some(4, 3, seed=2)), (some(2, 6), some(2, 6, seed=3), some(2, 2))]
    expected = 0.0
    for w1, w2, p in layers:
        for row, other in zip(w1, p @ w2, strict=True):
            expected += float((row @ other) ** 2 / (row @ row) / (other @ other)) / len(w1) / 2
    assert dependence(*zip(*layers, strict=True)).item() == pytest.approx(expected, rel=1e-5)


def test_the_best_combinations_give_the_share_in_the_span_which_no_other_exceeds():
    w1, w2 = some(6, 40), some(5, 40, seed=1)
    best = best_combinations(w1, w2)
    value = dependence([w1], [w2], [best]).item()
    assert value == pytest.approx(share_in_span(w1, w2).mean().item(), rel=1e-4)
    for seed in range(5):
        assert dependence([w1], [w2], [best + 0.05 * some(6, 5, seed=seed)]).item() < value


def test_filters_that_are_combinations_have_one_and_orthogonal_ones_none():
    w2 = some(3, 20)
    assert dependence([some(4, 3) @ w2], [w2], [best_combinations(some(4, 3) @ w2, w2)]).item() == pytest.approx(1)
    apart = torch.eye(6)
    assert dependence([apart[:3]], [apart[3:]], [best_combinations(apart[:3], apart[3:])]) == 0


@pytest.mark.parametrize("what", ["equal", "zero"])
def test_filters_that_depend_on_each_other_do_no_harm(what):
    w1, w2 = some(4, 30), some(4, 30, seed=1)
    w2[1:] = w2[0] if what == "equal" else 0.0
    best = best_combinations(w1, w2)
    assert best.isfinite().all()
    assert dependence([w1], [w2], [best]).item() == pytest.approx(share_in_span(w1, w2[:1]).mean().item(), rel=1e-3)
    assert dependence([w1], [torch.zeros_like(w2)], [best_combinations(w1, torch.zeros_like(w2))]) == 0


def test_gradients_reach_the_filters_and_neither_the_others_nor_the_combinations():
    w1, w2, p = some(4, 12).requires_grad_(), some(3, 12, seed=1).requires_grad_(), some(4, 3).requires_grad_()
    dependence([w1], [w2], [p]).backward()
    assert w1.grad.any()
    assert w2.grad is None
    assert p.grad is None
