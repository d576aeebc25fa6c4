"""The squared Dice against a count class by class, with and without a mask."""

import pytest
import torch

from nnunet_ssl.losses.squared_dice import (
    probabilities_and_one_hot,
    squared_dice_loss,
    squared_dice_of_shown,
    squared_dice_per_class,
    squared_dice_to_soft_labels,
)


@pytest.mark.parametrize(("classes", "shape"), [(2, (4, 5)), (14, (3, 4, 5))])
def test_squared_dice_class_by_class(classes, shape):
    torch.manual_seed(0)
    logits = torch.randn(2, classes, *shape)
    labels = torch.randint(0, max(1, classes - 1), (2, 1, *shape), dtype=torch.int16)  # the last class is absent
    mask = torch.rand(2, 1, *shape) > 0.3
    p = logits.softmax(1)
    for m in (None, mask):
        expected = 0.0
        for k in range(classes):
            inside = torch.ones_like(labels[:, 0], dtype=torch.bool) if m is None else m[:, 0]
            pk, yk = p[:, k][inside], (labels[:, 0] == k)[inside].float()
            dice = (2 * (pk * yk).sum() + 1e-10) / ((pk**2).sum() + (yk**2).sum() + 1e-10)
            expected += (1 - dice) / classes
        torch.testing.assert_close(squared_dice_loss(logits, labels, m), expected)
    assert squared_dice_loss(logits.bfloat16(), labels).dtype == torch.float32


def test_a_class_without_voxels_has_a_dice_loss_of_one_and_a_perfect_one_of_zero():
    labels = torch.tensor([[[[0, 0], [0, 1]]]])
    logits = 200.0 * torch.tensor([[[[1, 1], [1, 0]], [[0, 0], [0, 0.5]], [[0, 0], [0, 0.5]]]])
    p, y = probabilities_and_one_hot(logits, labels)  # the last voxel is half class 1, half class 2
    assert y.dtype == torch.bool
    assert squared_dice_per_class(p, y).tolist() == pytest.approx([0, 1 - 1 / 1.25, 1])


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 4, 3, 4, 2)])
def test_soft_labels_have_their_squares_in_the_denominator_and_the_least_where_both_are_the_same(shape):
    """The authors' 3D form of SS-Net has it at one-hot probabilities instead."""
    generator = torch.Generator().manual_seed(0)
    logits, q = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator).softmax(1)
    p = logits.softmax(1)
    one, other = p.flatten().tolist(), q.flatten().tolist()
    difference = sum((a - b) ** 2 for a, b in zip(one, other, strict=True))
    expected = difference / (sum(a * a for a in one) + sum(b * b for b in other))
    assert squared_dice_to_soft_labels(logits, q).item() == pytest.approx(expected, rel=1e-5)
    assert squared_dice_to_soft_labels(logits, p).item() == pytest.approx(0, abs=1e-6)
    assert squared_dice_to_soft_labels(10 * logits, p) > 0.01


def test_soft_labels_of_a_class_that_neither_shows_say_next_to_nothing():
    """By class they would say 0.98 of 1e-4 against 1e-2, and a third of the whole."""
    logits = torch.zeros(1, 3, 8, 8)
    logits[:, 0] = 10
    q = logits.softmax(1)
    p = torch.stack([logits[:, 0], logits[:, 1], logits[:, 2] + 5], 1)
    assert 0 < squared_dice_to_soft_labels(p, q) < 1e-4


@pytest.mark.parametrize("regions", [False, True])
def test_of_classes_that_are_shown_alone(regions):
    """By the plain loss of those classes one by one; what is not shown where it counts says nothing."""
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, 6, 7, requires_grad=True)
    mask = torch.rand(2, 4 if regions else 1, 5, 6, 7) < 0.5
    if regions:
        labels = torch.rand(2, 4, 5, 6, 7) < 0.3
        labels[:, 2] = False
    else:
        labels = torch.randint(0, 4, (2, 1, 5, 6, 7))
        labels[labels == 2] = 0
        labels[~mask] = 2
    p, y = (x.double() for x in probabilities_and_one_hot(logits, labels, mask, regions))
    each = [1 - 2 * (p[:, k] * y[:, k]).sum() / (p[:, k].square() + y[:, k]).sum() for k in (0, 1, 3)]
    loss = squared_dice_of_shown(logits, labels, mask, regions)
    torch.testing.assert_close(loss.double(), torch.stack(each).mean())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.any()
    assert not regions or not gradient[:, 2].any()
    assert squared_dice_of_shown(logits, labels, torch.zeros_like(mask), regions) == 0
    if regions:
        assert squared_dice_of_shown(logits, torch.zeros_like(labels), mask, regions) == 0


def test_voxels_of_regions_that_do_not_count_have_no_gradient():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    labels, mask = torch.rand(2, 3, 4, 5) > 0.5, torch.rand(2, 3, 4, 5) > 0.3
    squared_dice_loss(logits, labels, mask, regions=True).backward()
    assert (logits.grad[~mask] == 0).all()
    assert (logits.grad[mask] != 0).all()
