"""Entropy as a share of the largest: by hand, against SciPy, and its gradient."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from nnunet_ssl.losses.entropy import entropy, entropy_of_logits


@pytest.mark.parametrize("num_classes", [2, 5, 14])
def test_it_goes_from_0_to_1_whatever_the_number_of_classes(num_classes):
    sure, unsure = torch.zeros(1, num_classes, 1), torch.full((1, num_classes, 1), 1 / num_classes)
    sure[:, 0] = 1
    assert entropy(sure).item() == 0
    assert entropy(unsure).item() == pytest.approx(1)
    assert entropy_of_logits(torch.zeros(1, num_classes, 1)).item() == pytest.approx(1)


def test_as_scipy_has_it():
    logits = torch.randn(2, 4, 3, 5, dtype=torch.float16) * 4
    prob = logits.float().softmax(1)
    expected = torch.from_numpy(scipy.stats.entropy(prob.double().numpy(), axis=1, base=4)).float()
    for found in (entropy(prob), entropy_of_logits(logits)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)


def test_regions_are_unsure_each_for_itself():
    prob = torch.tensor([0.5, 1.0, 0.25])[None, :, None]
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert entropy(prob, regions=True).item() == pytest.approx((1 + 0 + quarter) / 3)
    logits = torch.logit(torch.tensor([0.5, 0.9, 0.25]))[None, :, None]
    torch.testing.assert_close(entropy_of_logits(logits, regions=True), entropy(logits.sigmoid(), regions=True))


@pytest.mark.parametrize("regions", [False, True])
def test_the_gradient_is_finite_where_a_class_has_all(regions):
    logits = torch.tensor([[1000.0, -1000.0, 0.0]])[..., None].requires_grad_()
    entropy_of_logits(logits, regions).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("regions", [False, True])
def test_less_entropy_is_downhill(regions):
    logits = torch.tensor([[0.3, 0.1]])[..., None].requires_grad_()
    before = entropy_of_logits(logits, regions).sum()
    before.backward()
    assert entropy_of_logits(logits - logits.grad, regions).sum() < before
