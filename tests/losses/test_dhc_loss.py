"""DHC's weights and losses, against the card's equations written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_ssl.losses.dhc import (
    DifficultyWeights,
    FrequencyWeights,
    weighted_cross_entropy,
    weighted_dice_and_cross_entropy,
)

STEPS = np.array([[[50, 4, 1], [60, 9, 2], [55, 6, 4]], [[52, 2, 0], [56, 9, 3], [60, 6, 4]]], dtype=float)


def test_difficulty_is_what_is_missed_and_unlearned():
    """Two steps: the second class is unlearned, the third has lost all of its voxels."""
    found = DifficultyWeights(3, least=0.0)
    assert found.weights.tolist() == [1, 1, 1]
    eps, last, learned, unlearned, missed = 1e-8, np.full(3, 1e-8), np.zeros(3), np.zeros(3), np.ones(3)
    for right, predicted, labeled in STEPS:
        found.update(*(torch.tensor(x, dtype=torch.float32) for x in (right, predicted, labeled)))
        dice = (2 * right + eps) / (predicted + labeled + eps)
        change, ratio = dice - last, np.log(dice / last)
        learned = 0.98 * learned + 0.02 * np.maximum(change, 0) * ratio
        unlearned = 0.98 * unlearned + 0.02 * np.minimum(change, 0) * ratio
        missed, last = 0.98 * missed + 0.02 * (1 - dice), dice
    weights = ((unlearned + eps) / (learned + eps)) ** 0.2 * missed
    np.testing.assert_allclose(found.weights.numpy(), weights / weights.max(), rtol=1e-4)
    assert found.weights.argmax() == 2


def test_the_difficulty_of_a_class_that_is_not_there_stays():
    """The authors' code gives it a Dice of 0.5, so that it is learned and unlearned from patch to patch."""
    found = DifficultyWeights(3, least=0.0)
    for right, predicted, labeled in STEPS:
        found.update(*(torch.tensor(x, dtype=torch.float32) for x in (right, predicted, labeled)))
    before = {name: state[1].item() for name, state in found.named_buffers() if name != "weights"}
    found.update(*(torch.tensor([float(n), 0.0, float(n)]) for n in (10, 12, 11)))
    assert {name: state[1].item() for name, state in found.named_buffers() if name != "weights"} == before
    assert found.last[0].item() == pytest.approx(20 / 23)


def test_rare_classes_weigh_most():
    found = FrequencyWeights(3, least=0.0)
    found.start(torch.tensor([1e6, 1e4, 1e2]))
    np.testing.assert_allclose(found.weights, [0, 0.5, 1], atol=1e-6)
    found.update(torch.tensor([1e6, 1e4, 1e4]))
    n = np.array([1e6, 1e4, 0.99e2 + 1e2])
    np.testing.assert_allclose(found.weights, np.log(1e6 / n) / np.log(1e6 / n.min()), rtol=1e-5, atol=1e-6)


def test_one_batch_without_a_class_hardly_moves_the_weights():
    """In the authors' code its weight is log(max / 1e-8) in that step: that of the second would fall to 0.14."""
    found = FrequencyWeights(3, least=0.0)
    found.start(torch.tensor([1e6, 1e4, 1e2]))
    found.update(torch.tensor([1e6, 1e4, 0.0]))
    np.testing.assert_allclose(found.weights, [0, 0.5, 1], atol=1e-3)


@pytest.mark.parametrize("counts", [[0.0, 0, 0], [7, 7, 7], [9, 0, 0]])
def test_weights_are_finite_whatever_the_counts(counts):
    found = FrequencyWeights(3, least=0.1)
    found.start(torch.tensor(counts))
    difficulty = DifficultyWeights(3, least=0.1)
    for _ in range(300):  # all is right: nothing is difficult
        difficulty.update(*[torch.tensor(counts)] * 3)
    for weights in (found.weights, difficulty.weights):
        assert weights.isfinite().all()
        assert (weights >= 0.1 - 1e-6).all()
        assert weights.max() <= 1
    assert found.weights.max() == 1


def test_the_background_that_is_easy_keeps_some_weight():
    """Or the network that predicts is hardly told where there is nothing: 0.05 on ACDC."""
    found = DifficultyWeights(2, least=0.1)
    for _ in range(200):
        found.update(*(torch.tensor(x) for x in ([990.0, 2.0], [995.0, 5.0], [995.0, 5.0])))
    assert found.weights.tolist() == pytest.approx([0.1, 1.0])


@pytest.mark.parametrize("ignore_label", [None, 3])
def test_losses_voxel_by_voxel(ignore_label):
    rng = np.random.default_rng(0)
    logits, w = rng.normal(size=(2, 3, 4, 5)), np.array([0.1, 0.5, 1.0])
    y = rng.integers(0, 3 if ignore_label is None else 4, (2, 4, 5))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ce = total = 0.0
    tp, size = np.zeros(3), np.zeros(3)
    for b, i, j in np.ndindex(y.shape):
        if (k := y[b, i, j]) == ignore_label:
            continue
        ce, total = ce - w[k] * np.log(p[b, k, i, j]), total + w[k]
        tp[k] += p[b, k, i, j]
        size += p[b, :, i, j]
        size[k] += 1
    dice = (2 * tp + 1) / (size + 1)
    arguments = torch.tensor(logits), torch.tensor(y[:, None]), torch.tensor(w).float(), ignore_label
    assert weighted_cross_entropy(*arguments).item() == pytest.approx(ce / total, rel=1e-5)
    expected = ce / total + 3 * (w[1] * (1 - dice[1]) + w[2] * (1 - dice[2])) / 2
    assert weighted_dice_and_cross_entropy(*arguments).item() == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_weight_says_nothing():
    """Torch's own weighted mean would be 0 / 0, say where there is background alone and it has no weight."""
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = weighted_cross_entropy(logits, torch.zeros(1, 1, 4, 4, dtype=torch.int16), torch.tensor([0.0, 1.0]))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
