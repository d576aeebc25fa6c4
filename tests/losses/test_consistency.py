"""Consistency losses against the papers' formulas, their gradients, and the cases that have no voxel."""

from __future__ import annotations

import math

import pytest
import torch

from nnunet_ssl.losses.branches import Branches
from nnunet_ssl.losses.consistency import (
    dual_task_consistency,
    pseudo_label_consistency,
    segmentation_regression_consistency,
)

SHAPES = [(2, 4, 5, 6), (3, 2, 7, 4), (2, 3, 4, 3, 5)]  # [B, K, *spatial], 2D and 3D


def some_logits(shape, seed=0, scale=2.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sharpened(p: torch.Tensor, temperature: float) -> torch.Tensor:
    """The formula as written, in double precision."""
    power = p.double() ** (1 / temperature)
    return power / power.sum(1, keepdim=True)


def plc_as_written(low: torch.Tensor, high: torch.Tensor, temperature: float) -> torch.Tensor:
    """The sum over ordered pairs of branches, of logits, in double precision."""
    p, q = low.double().softmax(1), high.double().softmax(1)
    return ((p - sharpened(q, temperature)) ** 2).mean() + ((q - sharpened(p, temperature)) ** 2).mean()


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_plc_is_the_sum_over_ordered_pairs(shape, temperature):
    low, high = some_logits(shape, 0), some_logits(shape, 1)
    result = pseudo_label_consistency(Branches(high, low), temperature)
    assert result.dtype == torch.float32
    assert result.ndim == 0
    torch.testing.assert_close(result, plc_as_written(low, high, temperature).float())
    torch.testing.assert_close(pseudo_label_consistency(Branches(low, high), temperature), result)


@pytest.mark.parametrize("temperature", [0.3, None])
@pytest.mark.parametrize("regions", [False, True])
def test_of_three_branches_every_pair_counts_and_regions_are_sharpened_each_by_itself(regions, temperature):
    branches = [some_logits(SHAPES[0], seed) for seed in range(3)]
    p = [x.double().sigmoid() if regions else x.double().softmax(1) for x in branches]
    expected = 0.0
    for i in range(3):
        for j in range(3):
            if temperature is None:
                expected += (p[i] - p[j]).square().mean() / 2  # each pair once
            elif i != j:
                two = torch.stack([p[j], 1 - p[j]], 1) if regions else p[j]
                target = sharpened(two, temperature)
                expected += (p[i] - (target[:, 0] if regions else target)).square().mean()
    result = pseudo_label_consistency(branches, temperature, regions=regions)
    assert result.item() == pytest.approx(expected.item(), rel=1e-5)


def test_two_classes_are_sharpened_as_in_the_authors_code():
    p, r = torch.linspace(0.01, 0.99, 99).double(), 0.3
    binary = p**10 / (p**10 + (1 - p) ** 10)
    expected = (r - binary).square() + (p - r**10 / (r**10 + (1 - r) ** 10)).square()  # the same for both classes
    for one, value in zip(p.tolist(), expected.tolist(), strict=True):
        low, high = (torch.tensor([1 - x, x]).log().view(1, 2, 1, 1) for x in (one, r))
        assert pseudo_label_consistency(Branches(high, low), 0.1).item() == pytest.approx(value, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nothing_underflows_in_low_precision(dtype):
    """p^10 of float16 is 0 below 0.19: ten equal classes would be 0 / 0."""
    equal = torch.zeros((1, 10, 2, 2), dtype=dtype)
    assert pseudo_label_consistency(Branches(equal, equal), 0.1) == 0
    sure = torch.tensor([-46.0, -45.0, 0.0], dtype=dtype).view(1, 3, 1, 1)
    assert pseudo_label_consistency(Branches(sure, sure), 0.1) < 1e-30


@pytest.mark.parametrize("temperature", [0.1, 0.02, 2.0])
def test_gradients_are_finite_where_probabilities_are_zero_and_one(temperature):
    rows = [[-200.0, -300.0, 100.0], [5.0, 5.0, -1e4], [-87.0, -97.0, 0.0], [0.0, 0.0, 0.0], [0.2, 0.3, 0.5]]
    low, high = (torch.tensor(rows).T[None, :, :, None].clone().requires_grad_() for _ in range(2))  # [1, 3, 5, 1]
    result = pseudo_label_consistency(Branches(high.flip(2), low), temperature)
    result.backward()
    assert result.isfinite()
    for x in (low, high):
        assert x.grad.isfinite().all()
        assert x.grad[0, :, 4, 0].abs().max() > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_plc_is_the_equation(shape):
    low, high = some_logits(shape, 0), some_logits(shape, 1)
    pairs = zip(low.softmax(1).flatten().tolist(), high.softmax(1).flatten().tolist(), strict=True)
    expected = sum((a - b) ** 2 for a, b in pairs) / low.numel()
    assert pseudo_label_consistency(Branches(high, low), None).item() == pytest.approx(expected, rel=1e-5)
    assert pseudo_label_consistency(Branches(low, low), None) == 0


def test_sharpened_plc_asks_equal_branches_to_be_certain():
    unsure = torch.tensor([0.6, 0.4]).log().view(1, 2, 1, 1).expand(1, 2, 3, 3)
    sure = 200 * torch.eye(2).view(1, 2, 2, 1)
    assert pseudo_label_consistency(Branches(unsure, unsure), 0.1) > 0.1
    assert pseudo_label_consistency(Branches(sure, sure), 0.1) == 0


def test_plc_moves_both_branches_and_through_the_target_unless_it_is_detached():
    def gradients(**options):
        low = some_logits((2, 3, 4, 4), 0).requires_grad_()
        high = some_logits((2, 3, 4, 4), 1).requires_grad_()
        pseudo_label_consistency(Branches(high, low), 0.1, **options).backward()
        return low.grad, high.grad

    def oracle(detach):
        x = [some_logits((2, 3, 4, 4), seed).double().requires_grad_() for seed in range(2)]
        p, q = (one.softmax(1) for one in x)
        for_p, for_q = sharpened(q, 0.1), sharpened(p, 0.1)
        if detach:
            for_p, for_q = for_p.detach(), for_q.detach()
        (((p - for_p) ** 2).mean() + ((q - for_q) ** 2).mean()).backward()
        return [one.grad.float() for one in x]

    found = {detach: gradients(detach_target=detach) for detach in (False, True)}
    for detach, of_branches in found.items():
        for mine, expected in zip(of_branches, oracle(detach), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
    for through, detached in zip(found[False], found[True], strict=True):
        assert not torch.allclose(through, detached)


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


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_dual_task_consistency_is_the_mean_square_of_mask_and_segmentation(shape, regions):
    logits, k = some_logits(shape), 7.0
    regression = some_logits(shape, 1, 0.2).tanh()
    regression = regression if regions else regression[:, 1:]
    p = 1 / (1 + torch.exp(-logits.double())) if regions else logits.double().softmax(1)[:, 1:]
    expected = (1 / (1 + torch.exp(k * regression.double())) - p).square().mean()
    result = dual_task_consistency(logits, regression, k, regions)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_steep_sigmoid_has_its_gradients_in_half_precision_too():
    """At k = 1500 and a distance of 0.002 the slope is 71; in float16 it would be of a product that is coarse."""
    logits = torch.zeros(1, 2, 1, 1, dtype=torch.float16, requires_grad=True)
    regression = torch.full((1, 1, 1, 1), 0.002, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        dual_task_consistency(logits, regression, 1500.0).backward()
    m = 1 / (1 + math.exp(3.0))
    assert regression.grad.item() == pytest.approx(2 * (m - 0.5) * -1500 * m * (1 - m), rel=1e-4)
    assert logits.grad[0, 1].item() == pytest.approx(-2 * (m - 0.5) / 4, rel=1e-3)


def test_losses_are_in_full_precision_under_autocast():
    low, high = some_logits((2, 3, 4, 4), 0).bfloat16(), some_logits((2, 3, 4, 4), 1).bfloat16()
    regression, sdm = low[:, 1:], high[:, 1:].float()
    present = torch.ones(2, 2, dtype=torch.bool)

    def values(low, high, regression):
        return (
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
    x = torch.rand(2, 3, 4, 4, device="meta")
    assert pseudo_label_consistency(Branches(x, x), 0.1).shape == ()
    assert segmentation_regression_consistency(x, x, torch.ones(2, 3, device="meta").bool()).shape == ()
