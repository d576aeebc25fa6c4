"""Class separation of SS-Net: which voxels are drawn, and the loss against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from nnunet_ssl.losses.prototypes import draw_of_each_class, prototype_loss


def test_every_voxel_of_a_class_is_as_likely_and_no_other_is_drawn():
    labels = torch.randint(-1, 5, (2, 1, 6, 5, 4), generator=torch.Generator().manual_seed(0))  # 4 and -1: no class
    labels[labels == 2] = 0
    torch.manual_seed(0)
    places, present = draw_of_each_class(labels.to(torch.int16), 4, 20000)
    assert present.tolist() == [True, False, True]
    assert places.shape == (3, 20000)
    assert places.min() >= 0
    assert places.max() < labels.numel()
    for row, c in ((0, 1), (2, 3)):
        drawn = places[row].bincount(minlength=labels.numel())
        count = int((labels == c).sum())
        assert (labels.flatten()[drawn > 0] == c).all()
        assert int((drawn > 0).sum()) == count
        assert drawn[drawn > 0].float().std() < 2 * math.sqrt(20000 / count)


def test_no_voxel_is_drawn_twice_where_there_are_enough():
    labels = (torch.arange(4 * 4096) % 4 == 0).long()
    places, _ = draw_of_each_class(labels, 2, 1024)
    assert len(places.unique()) == 1024
    few, _ = draw_of_each_class((torch.arange(4096) < 30).long(), 2, 64)
    assert set(few.flatten().tolist()) == set(range(30))


def test_a_class_of_one_voxel_and_none_at_all():
    labels = torch.zeros(10, dtype=torch.int16)
    assert draw_of_each_class(labels, 3, 4)[1].tolist() == [False, False]
    labels[7] = 2
    places, present = draw_of_each_class(labels, 3, 4)
    assert present.tolist() == [False, True]
    assert places[1].tolist() == [7] * 4


def some(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_the_weighted_mean_of_pairs_within_each_class_that_counts():
    h, z, a, b = some(3, 4, 5), some(3, 2, 5, seed=1), some(3, 4, seed=2).abs(), some(3, 2, seed=3).abs()
    expected = 0.0
    for c in (0, 2):
        for m in range(4):
            for n in range(2):
                cosine = float(h[c, m] @ z[c, n] / (h[c, m].norm() * z[c, n].norm()))
                expected += float(a[c, m] * b[c, n]) * (1 - cosine) / (2 * 4 * 2)
    assert prototype_loss(h, z, a, b, torch.tensor([True, False, True])).item() == pytest.approx(expected, rel=1e-5)


def test_without_a_class_that_counts_it_is_zero_with_zero_gradients():
    h = some(2, 4, 5).requires_grad_()
    loss = prototype_loss(h, torch.zeros(2, 3, 5), torch.ones(2, 4), torch.ones(2, 3), torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert not h.grad.any()
