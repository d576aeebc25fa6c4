"""Dice and cross-entropy of the voxels that count, against those voxels alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nnunet_ssl.losses.partial import partial_dice_and_cross_entropy
from nnunet_ssl.losses.squared_dice import squared_dice_of_shown


@pytest.mark.parametrize("over_all", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("regions", [False, True])
def test_voxel_by_voxel(regions, channels, over_all):
    torch.manual_seed(0)
    logits, counts = torch.randn(2, 3, 4, 5, 6), torch.rand(2, channels if regions else 1, 4, 5, 6) > 0.4
    if regions:
        labels = torch.rand(2, 3, 4, 5, 6) > 0.5
        where = counts.expand_as(labels)
        ce = F.binary_cross_entropy(logits.sigmoid()[where], labels[where].float())
    else:
        labels = torch.randint(0, 3, (2, 1, 4, 5, 6), dtype=torch.int16)
        where = counts
        ce = -logits.softmax(1).gather(1, labels.long())[where].log().mean()
    expected = squared_dice_of_shown(logits, labels, counts, regions)
    expected = expected + ce * (where.float().mean() if over_all else 1)
    torch.testing.assert_close(partial_dice_and_cross_entropy(logits, labels, counts, regions, over_all), expected)


def test_where_nothing_counts_nothing_is_learned():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    labels = torch.zeros(1, 1, 4, 4, dtype=torch.int16)
    loss = partial_dice_and_cross_entropy(logits, labels, torch.zeros_like(labels, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
