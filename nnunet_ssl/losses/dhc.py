"""Class weights of DHC, by difficulty and by frequency, and the losses that take them.

Source: Wang and Li, "DHC: Dual-debiased Heterogeneous Co-training Framework for Class-imbalanced Semi-supervised
Medical Image Segmentation" (MICCAI 2023), and the authors' code. Weights matter by their ratios only; the largest is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnunet_ssl.losses.masked import labels_and_valid
from nnunet_ssl.losses.pseudo_labels import cross_entropy_map
from nnunet_ssl.losses.squared_dice import probabilities_and_one_hot

EPS = 1e-8
DIFFICULTY_DECAY = 49 / 50  # of the averages; both are the authors'
FREQUENCY_DECAY = 0.99
DAMPING = 1 / 5  # exponent of unlearning over learning


class DifficultyWeights(nn.Module):
    """DiffDW: a class weighs more the lower its Dice is, and the more it is unlearned and the less learned.

    Let d be the Dice of a class in this step, d' that in the last step in which it was there. Averages run over steps::

        l = E[ max(d - d', 0) log(d / d') ]         how fast it is learned
        u = E[ min(d - d', 0) log(d / d') ]         how fast it is unlearned, positive too
        w = ((u + eps) / (l + eps))^(1/5) E[1 - d]

    All state is in buffers, float32 ``[K]``.

    Args:
        num_classes: K, with background.
        least: the smallest weight.
    """

    weights: Tensor
    last: Tensor
    learned: Tensor
    unlearned: Tensor
    missed: Tensor

    def __init__(self, num_classes: int, least: float) -> None:
        super().__init__()
        self.least = least
        for name in ("weights", "missed"):
            self.register_buffer(name, torch.ones(num_classes))
        for name in ("learned", "unlearned"):
            self.register_buffer(name, torch.zeros(num_classes))
        self.register_buffer("last", torch.full((num_classes,), EPS))

    @torch.no_grad()
    def update(self, right: Tensor, predicted: Tensor, labeled: Tensor) -> None:
        """Take what was predicted in a step. A class that is neither predicted nor labeled stays as it is.

        Args:
            right: voxels of each class that are predicted rightly, ``[K]`` float32.
            predicted: voxels that are predicted to be of it.
            labeled: voxels that are of it.
        """
        total = predicted + labeled
        dice = (2 * right + EPS) / (total + EPS)
        change = dice - self.last
        speed = change * (dice / self.last).log()
        there = total > 0
        for average, new in (
            (self.learned, torch.where(change > 0, speed, 0.0)),
            (self.unlearned, torch.where(change > 0, 0.0, speed)),
            (self.missed, 1 - dice),
        ):
            average.lerp_(torch.where(there, new, average), 1 - DIFFICULTY_DECAY)
        self.last.copy_(torch.where(there, dice, self.last))
        weights = ((self.unlearned + EPS) / (self.learned + EPS)) ** DAMPING * self.missed
        self.weights.copy_(scaled(weights, self.least))


class FrequencyWeights(nn.Module):
    """DistDW: a class weighs more the fewer voxels are of it, ``w = log(max n / n_c)``.

    n are averages over steps, float32 ``[K]``; they begin with labels and go on with pseudo-labels. The authors average
    weights: with a class that is missing in one batch, its n near to 0 makes all others small.

    Args:
        num_classes: K, with background.
        least: the smallest weight; with 0 the most frequent class, which is the background, has none.
    """

    weights: Tensor
    counts: Tensor

    def __init__(self, num_classes: int, least: float) -> None:
        super().__init__()
        self.least = least
        self.register_buffer("weights", torch.ones(num_classes))
        self.register_buffer("counts", torch.zeros(num_classes))

    @torch.no_grad()
    def start(self, counts: Tensor) -> None:
        """Begin with the voxels of each class, ``[K]`` float32."""
        self.counts.copy_(counts)
        self._weigh()

    @torch.no_grad()
    def update(self, counts: Tensor) -> None:
        """Take the voxels of each class of a step, ``[K]`` float32."""
        self.counts.lerp_(counts, 1 - FREQUENCY_DECAY)
        self._weigh()

    def _weigh(self) -> None:
        counts = self.counts.clamp(min=1)
        rarity = (counts.max() / counts).log()
        weights = scaled(rarity, self.least)
        self.weights.copy_(torch.where(rarity.max() > 0, weights, 1.0))  # all are equally frequent


def scaled(weights: Tensor, least: float) -> Tensor:
    """Weights ``[K]`` with a largest of 1 and none below ``least``."""
    return (weights / weights.max().clamp(min=EPS)).clamp(min=least)


def weighted_cross_entropy(logits: Tensor, target: Tensor, weights: Tensor, ignore_label: int | None = None) -> Tensor:
    """The mean of the cross-entropy, each voxel with the weight of its class, in fp32.

    Args:
        logits: ``[B, K, *spatial]``, any float type.
        target: ``[B, 1, *spatial]``, any integer type.
        weights: ``[K]`` float32.
        ignore_label: voxels with this value do not count.

    Returns:
        0-dim float32; 0, with zero gradients, where no voxel has a weight.
    """
    labels, valid = labels_and_valid(target, ignore_label)
    of_voxels = weights[labels] if valid is None else torch.where(valid, weights[labels], 0.0)
    return (of_voxels * cross_entropy_map(logits, labels)).sum() / of_voxels.sum().clamp(min=EPS)


def weighted_dice_and_cross_entropy(
    logits: Tensor, target: Tensor, weights: Tensor, ignore_label: int | None = None
) -> Tensor:
    """``K mean_c w_c (1 - Dice_c)`` over foreground classes c, of the whole batch, plus the above.

    ``Dice_c = (2 sum p y + 1) / (sum p + sum y + 1)``; arguments as above. The authors' weights reach up to K, which
    the cross-entropy does not notice.

    Returns:
        0-dim float32.
    """
    labels, valid = labels_and_valid(target, ignore_label)
    p, y = probabilities_and_one_hot(logits, labels, valid)
    over = [0, *range(2, p.ndim)]
    dice = (2 * (p * y).sum(over) + 1) / (p.sum(over) + y.sum(over) + 1)
    of_foreground = (weights * (1 - dice))[1:].mean()
    return len(weights) * of_foreground + weighted_cross_entropy(logits, target, weights, ignore_label)
