"""SASNet's consistency losses against the paper's formulas, their gradients, and the cases that have no voxel."""

from __future__ import annotations

import pytest
import torch

from nnunet_ssl.losses.branches import Branches
from nnunet_ssl.losses.consistency import pseudo_label_consistency, segmentation_regression_consistency, sharpen

SHAPES = [(2, 4, 5, 6), (3, 2, 7, 4), (2, 3, 4, 3, 5)]  # [B, K, *spatial], 2D and 3D


def some_probabilities(shape, seed=0, scale=2.0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).softmax(1)


def sharpened(p: torch.Tensor, temperature: float) -> torch.Tensor:
    """The formula as written, in double precision."""
    power = p.double() ** (1 / temperature)
    return power / power.sum(1, keepdim=True)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_sharpening_is_the_formula_and_sums_to_one(shape, temperature):
    prob = some_probabilities(shape)
    result = sharpen(prob, temperature)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, sharpened(prob, temperature).float())
    torch.testing.assert_close(result.sum(1), torch.ones_like(result[:, 0]))


def test_two_classes_are_sharpened_as_in_the_authors_code():
    p = torch.linspace(0, 1, 101)
    q = 1 - p
    binary = p**10 / (p**10 + q**10)
    result = sharpen(torch.stack((q, p))[None], 0.1)[0, 1]
    torch.testing.assert_close(result, binary, rtol=1e-4, atol=1e-7)  # 1 - p is rounded before its tenth power


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nothing_underflows_in_low_precision(dtype):
    """p^10 of float16 is 0 below 0.19: ten equal classes would be 0 / 0."""
    prob = torch.full((1, 10, 2, 2), 0.1, dtype=dtype)
    torch.testing.assert_close(sharpen(prob, 0.1), torch.full((1, 10, 2, 2), 0.1))
    tiny = torch.tensor([1e-20, 3e-20, 1 - 4e-20]).view(1, 3, 1, 1)
    assert sharpen(tiny, 0.1).flatten().tolist() == [0, 0, 1]


@pytest.mark.parametrize("temperature", [0.1, 0.02, 2.0])
def test_gradients_are_finite_where_probabilities_are_zero_and_one(temperature):
    rows = [[0.0, 0.0, 1.0], [0.5, 0.5, 0.0], [1e-38, 1e-42, 1.0], [0.0, 0.0, 0.0], [0.2, 0.3, 0.5]]
    prob = torch.tensor(rows).T[None, :, :, None].requires_grad_()  # [1, 3, 5, 1]
    result = sharpen(prob, temperature)
    (result * torch.tensor([1.0, -2.0, 3.0]).view(1, 3, 1, 1)).sum().backward()
    assert result.isfinite().all()
    assert prob.grad.isfinite().all()
    assert prob.grad[0, :, 4, 0].abs().max() > 0


def test_the_gradient_of_sharpening_is_that_of_the_formula():
    prob = some_probabilities((2, 3, 2, 2), scale=0.5)
    weights = torch.randn(prob.shape, generator=torch.Generator().manual_seed(1))
    mine, oracle = prob.clone().requires_grad_(), prob.double().requires_grad_()
    (sharpen(mine, 0.1) * weights).sum().backward()
    (sharpened(oracle, 0.1) * weights).sum().backward()
    torch.testing.assert_close(mine.grad, oracle.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_plc_is_the_sum_over_ordered_pairs(shape):
    low, high = some_probabilities(shape, 0), some_probabilities(shape, 1)
    branches = [low.double(), high.double()]
    expected = 0.0
    for i in range(2):
        for j in range(2):
            if i != j:
                expected += ((branches[i] - sharpened(branches[j], 0.1)) ** 2).mean()
    result = pseudo_label_consistency(Branches(high, low), 0.1)
    assert result.dtype == torch.float32
    assert result.ndim == 0
    torch.testing.assert_close(result, expected.float())
    torch.testing.assert_close(pseudo_label_consistency(Branches(low, high), 0.1), result)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_plc_is_the_equation(shape):
    low, high = some_probabilities(shape, 0), some_probabilities(shape, 1)
    expected = sum((a - b) ** 2 for a, b in zip(low.flatten().tolist(), high.flatten().tolist(), strict=True))
    assert pseudo_label_consistency(Branches(high, low), None).item() == pytest.approx(expected / low.numel(), rel=1e-5)
    assert pseudo_label_consistency(Branches(low, low), None) == 0


def test_sharpened_plc_asks_equal_branches_to_be_certain():
    unsure, sure = torch.full((1, 2, 3, 3), 0.5), torch.eye(2).view(1, 2, 2, 1)
    unsure[:, 0] = 0.6
    unsure[:, 1] = 0.4
    assert pseudo_label_consistency(Branches(unsure, unsure), 0.1) > 0.1
    assert pseudo_label_consistency(Branches(sure, sure), 0.1) == 0


def test_plc_moves_both_branches_and_through_the_target_unless_it_is_detached():
    def gradients(**options):
        low = some_probabilities((2, 3, 4, 4), 0).requires_grad_()
        high = some_probabilities((2, 3, 4, 4), 1).requires_grad_()
        pseudo_label_consistency(Branches(high, low), 0.1, **options).backward()
        return low, high

    low, high = gradients(detach_target=True)
    n = low.numel()
    torch.testing.assert_close(low.grad, 2 * (low - sharpen(high, 0.1)).detach() / n)
    torch.testing.assert_close(high.grad, 2 * (high - sharpen(low, 0.1)).detach() / n)

    through_target = gradients()
    oracle = [p.detach().double().requires_grad_() for p in (low, high)]
    pairs = ((oracle[0], oracle[1]), (oracle[1], oracle[0]))
    sum(((p - sharpened(q, 0.1)) ** 2).mean() for p, q in pairs).backward()
    for mine, other, detached in zip(through_target, oracle, (low, high), strict=True):
        torch.testing.assert_close(mine.grad, other.grad.float(), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(mine.grad, detached.grad)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 1, 4, 3, 5)])  # [B, K - 1, *spatial]
def test_src_is_the_mean_over_the_voxels_of_the_maps_that_count(shape):
    generator = torch.Generator().manual_seed(0)
    regression, sdm = torch.randn(shape, generator=generator).tanh(), torch.randn(shape, generator=generator).tanh()
    present = torch.rand(shape[:2], generator=generator) < 0.6
    present[0, 0], present[1, 0] = True, False
    expected, voxels = 0.0, 0
    for b in range(shape[0]):
        for k in range(shape[1]):
            if present[b, k]:
                expected += ((sdm[b, k] - regression[b, k]) ** 2).sum().item()
                voxels += sdm[b, k].numel()
    result = segmentation_regression_consistency(regression, sdm, present)
    assert result.dtype == torch.float32
    assert result.ndim == 0
    assert result.item() == pytest.approx(expected / voxels, rel=1e-5)


def test_src_reaches_the_maps_that_count_and_no_other():
    regression = torch.zeros(2, 2, 3, 3, requires_grad=True)
    present = torch.tensor([[True, False], [False, True]])
    segmentation_regression_consistency(regression, torch.full((2, 2, 3, 3), 0.5), present).backward()
    expected = torch.where(present, -2 * 0.5 / 18, 0.0)[..., None, None].expand(2, 2, 3, 3)
    torch.testing.assert_close(regression.grad, expected)


def test_src_without_any_map_is_zero_with_zero_gradients():
    regression = torch.full((2, 2, 3, 3), 0.3, requires_grad=True)
    result = segmentation_regression_consistency(
        regression, torch.zeros(2, 2, 3, 3), torch.zeros(2, 2, dtype=torch.bool)
    )
    result.backward()
    assert result == 0
    assert torch.equal(regression.grad, torch.zeros_like(regression))


def test_losses_are_in_full_precision_under_autocast():
    low, high = some_probabilities((2, 3, 4, 4), 0).bfloat16(), some_probabilities((2, 3, 4, 4), 1).bfloat16()
    regression, sdm = low[:, 1:], high[:, 1:].float()
    present = torch.ones(2, 2, dtype=torch.bool)

    def values(low, high, regression):
        return (
            sharpen(low, 0.1),
            pseudo_label_consistency(Branches(high, low), 0.1),
            pseudo_label_consistency(Branches(high, low), None),
            segmentation_regression_consistency(regression, sdm, present),
        )

    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = values(low, high, regression)
    for a, b in zip(under_autocast, values(low.float(), high.float(), regression.float()), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_no_value_is_read():
    """Meta tensors have none: reading one raises."""
    prob = torch.rand(2, 3, 4, 4, device="meta")
    assert pseudo_label_consistency(Branches(prob, prob), 0.1).shape == ()
    assert segmentation_regression_consistency(prob, prob, torch.ones(2, 3, device="meta").bool()).shape == ()
