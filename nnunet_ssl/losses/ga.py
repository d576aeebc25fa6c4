"""Gradient-aware losses: soft Dice and top-k cross-entropy for classes of very different size.

Source: Qi, Wu, Chan, "Gradient-Aware for Class-Imbalanced Semi-Supervised Medical Image Segmentation" (ECCV 2024), and
the authors' code, which the equations below follow. The letters are the code's; E1 to E4 number what it computes:

    E1  D_c = 1 - (2 sum_v p y + s) / (sum_v p^2 + sum_v y^2 + s)         class c has voxels in the batch
    E2  D_c = sum_v sg(p_v / N) p_v                                       class c has none; sg stops the gradient
    E3  GADice = 1/K sum_c D_c                                            background included
    E4  GACE = sum_c [ sum_{v selected, y_v = c} l_v ] / (n_c^(1 - gamma) M^gamma + s)

p are probabilities, y one-hot labels, N is the number of voxels of the batch, l_v the cross-entropy of a voxel. The M
voxels with the largest l_v are selected; n_c of them are of class c. All sums run over batch and space.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_ssl.losses.class_counts import class_counts
from nnunet_ssl.losses.masked import labels_and_valid
from nnunet_ssl.losses.squared_dice import probabilities_and_one_hot, squared_dice_per_class

Number = TypeVar("Number", int, Tensor)

EPS = 1e-10  # s of E1 and E4


def present_classes(target: Tensor, num_classes: int, ignore_label: int | None = None) -> Tensor:
    """Which classes have a voxel in a batch.

    Args:
        target: ``[B, 1, *spatial]`` of any integer type. Negative values (nnU-Net's padding) count as background.
        num_classes: K, with background.
        ignore_label: voxels with this value do not count.

    Returns:
        ``[K]`` bool.
    """
    labels, valid = labels_and_valid(target, ignore_label)
    return class_counts(labels, num_classes, valid) > 0


class GADiceLoss(nn.Module):
    """Soft Dice whose absent classes are pushed down in proportion to their probability (E1 to E3).

    In soft Dice a class that has no voxel in the batch has next to no gradient, however much of it is predicted. Here
    each voxel's probability p of it has the gradient p / (N K).

    With deep supervision a small organ may have voxels at full resolution and none at a coarse scale. It is not absent,
    so it must not be pushed down there: say with ``present`` which classes the full-resolution target has. One that is
    present but has no voxel at the scale at hand contributes nothing.

    Args:
        ignore_label: voxels with this value count neither in p nor in y nor in N.
    """

    def __init__(self, ignore_label: int | None = None) -> None:
        super().__init__()
        self.ignore_label = ignore_label

    def forward(self, logits: Tensor, target: Tensor, present: Tensor | None = None) -> Tensor:
        """Compute GADice, in fp32 regardless of autocast.

        Args:
            logits: ``[B, K, *spatial]``, 2D or 3D, any float type.
            target: ``[B, 1, *spatial]`` of any integer type, in ``0 .. K - 1`` or the ignore label.
            present: ``[K]`` bool of :func:`present_classes` for the full-resolution target; None takes it from
                ``target``.

        Returns:
            0-dim float32; 0, with zero gradient, where no voxel is valid.

        Raises:
            RuntimeError: if a label is out of range (on a GPU as a device assertion).
        """
        labels, valid = labels_and_valid(target, self.ignore_label)
        p, y = probabilities_and_one_hot(logits, labels, valid)
        num_voxels = labels.numel() if valid is None else valid.sum().clamp(min=1)  # N

        over = [0, *range(2, p.ndim)]
        dice = squared_dice_per_class(p, y, EPS)  # E1
        push_down = (p.detach() * p).sum(over) / num_voxels  # E2
        if present is not None:
            push_down = torch.where(present, 0.0, push_down)
        return torch.where(y.sum(over) > 0, dice, push_down).mean()  # E3


class GACELoss(nn.Module):
    """Cross-entropy of the hardest voxels, each class normalized by a mix of its own and the total number (E4).

    A voxel's weight falls with the number of its class: with ``gamma`` 0.5 it is ``1 / sqrt(n_c M)``, where the plain
    mean has ``1 / M``. ``gamma`` 1 is the plain mean over the selected voxels, 0 the sum of the class means.

    Args:
        k: percentage of the voxels that is selected, in (0, 100]; 100 takes all, without ranking them. At least one
            voxel is, if there is one.
        gamma: exponent of the total number in the mix, in [0, 1].
        ignore_label: voxels with this value are removed first: they are neither ranked nor counted.
    """

    def __init__(self, k: float, gamma: float, ignore_label: int | None = None) -> None:
        super().__init__()
        self.k = k
        self.gamma = gamma
        self.ignore_label = ignore_label
        self._share = Fraction(k).limit_denominator(1_000_000) / 100  # in integers, 10 % of 30 is 3

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute GACE, in fp32 regardless of autocast.

        Args:
            logits: ``[B, K, *spatial]``, 2D or 3D, any float type.
            target: ``[B, 1, *spatial]`` of any integer type, in ``0 .. K - 1`` or the ignore label.

        Returns:
            0-dim float32; 0, with zero gradient, where no voxel is valid.

        Raises:
            IndexError: if a label is out of range (on a GPU as a device assertion).
        """
        labels, valid = labels_and_valid(target, self.ignore_label)
        losses = F.cross_entropy(logits.float(), labels[:, 0], reduction="none").flatten()  # l_v
        labels = labels.flatten()
        valid = None if valid is None else valid.flatten()
        if self.k < 100:
            losses, labels, valid = self._hardest(losses, labels, valid)

        counts = class_counts(labels, logits.shape[1], valid)  # n_c
        total = counts.sum()  # M
        weights = 1 / (counts ** (1 - self.gamma) * total**self.gamma + EPS)
        weights = weights[labels]
        if valid is not None:
            weights = torch.where(valid, weights, 0.0)
        return (losses * weights).sum()  # E4

    def _hardest(self, losses: Tensor, labels: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The M voxels with the largest loss: losses, labels, and which of those count.

        With an ignore label M depends on the number of valid voxels, which stays on its device: as many voxels are
        taken as M can be, the largest loss first, and the first M of them count.
        """
        if valid is None:
            losses, at = losses.topk(max(1, self._part_of(losses.numel())), sorted=False)
            return losses, labels[at], None
        num_valid = valid.sum()
        _, at = losses.masked_fill(~valid, -torch.inf).topk(max(1, self._part_of(losses.numel())))
        rank = torch.arange(len(at), device=at.device)
        return losses[at], labels[at], rank < torch.minimum(self._part_of(num_valid).clamp(min=1), num_valid)

    def _part_of(self, number: Number) -> Number:
        return number * self._share.numerator // self._share.denominator


class GALoss(nn.Module):
    """L_sup of GA-CPS for one network at one scale: GACE of the hardest voxels plus GADice.

    Args:
        k: of :class:`GACELoss`.
        gamma: of :class:`GACELoss`.
        ignore_label: voxels with this value take no part.
    """

    def __init__(self, k: float, gamma: float, ignore_label: int | None = None) -> None:
        super().__init__()
        self.ce = GACELoss(k, gamma, ignore_label)
        self.dice = GADiceLoss(ignore_label)

    def forward(self, logits: Tensor, target: Tensor, present: Tensor | None = None) -> Tensor:
        """The sum of both, 0-dim float32; arguments as in :class:`GADiceLoss`."""
        return self.ce(logits, target) + self.dice(logits, target, present)
