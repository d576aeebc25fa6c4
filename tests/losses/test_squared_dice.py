"""The squared Dice against a count class by class, with and without a mask."""

import pytest
import torch

from nnunet_ssl.losses.squared_dice import probabilities_and_one_hot, squared_dice_loss, squared_dice_per_class


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


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5)])
@pytest.mark.parametrize("channels", [1, 3])
def test_regions_one_by_one_with_a_mask_of_all_or_of_each(shape, channels):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, *shape), torch.rand(2, 3, *shape) > 0.6
    mask = torch.rand(2, channels, *shape) > 0.3
    expected = 0.0
    for k in range(3):
        inside = mask[:, min(k, channels - 1)]
        pk, yk = logits.sigmoid()[:, k][inside], labels[:, k][inside].float()
        expected += (1 - (2 * (pk * yk).sum() + 1e-5) / ((pk**2).sum() + (yk**2).sum() + 1e-5)) / 3
    torch.testing.assert_close(squared_dice_loss(logits, labels, mask, 1e-5, regions=True), expected)
    everywhere = torch.ones(2, 1, *shape, dtype=torch.bool)
    torch.testing.assert_close(
        squared_dice_loss(logits, labels, regions=True), squared_dice_loss(logits, labels, everywhere, regions=True)
    )
    nowhere = squared_dice_loss(logits.requires_grad_(), labels, ~everywhere, 1e-5, regions=True)
    nowhere.backward()
    assert nowhere == 0
    assert not logits.grad.any()
