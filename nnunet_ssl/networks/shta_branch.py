"""SHTA's training-only branch: tokens from a decoder feature, their embedding, and the losses on it (Fig. 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnunet_ssl.losses.shta import DEFAULTS, SHTALoss, SHTALossSettings, SHTATerms, token_class_distribution


def token_stride(patch_size: Sequence[int], spacing: Sequence[float], batch_size: int, max_tokens: int) -> list[int]:
    """Voxels per token along each axis: three or four, fewer along axes with thick slices, always a divisor.

    The paper's Table IV (3.76 % of the tokens are 2.47 k) fits 32 x 32 x 32 tokens of 3 x 3 x 3 voxels in its 96^3
    patches. So the aim is three voxels, and four along axes of 128 voxels or more and in 2D; where the finest spacing
    is not an axis' own, it shrinks in proportion. nnU-Net's patches are seldom multiples of three: the nearest divisor
    is taken, and of two equally near ones the larger (4 for 40). While a batch has more than ``max_tokens`` tokens, the
    aim grows along all axes alike, so that tokens keep their shape.

    Args:
        patch_size: voxels along each axis.
        spacing: of the same axes, in mm.
        batch_size: labeled samples in a step.
        max_tokens: labeled tokens that a step may have.

    Returns:
        The stride along each axis.
    """
    aims = [
        (4 if n >= 128 or len(patch_size) == 2 else 3) * min(spacing) / mm
        for n, mm in zip(patch_size, spacing, strict=True)
    ]
    growth = 1.0
    while True:
        stride = [nearest_divisor(n, max(1, round(growth * aim))) for n, aim in zip(patch_size, aims, strict=True)]
        num_tokens = batch_size * math.prod(n // s for n, s in zip(patch_size, stride, strict=True))
        if num_tokens <= max_tokens or stride == list(patch_size):
            return stride
        growth *= 1.1


def nearest_divisor(number: int, aim: int) -> int:
    """The divisor of ``number`` that is nearest to ``aim``, and of two the larger."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - aim), -d))


class SHTABranch(nn.Module):
    """``T = P(F_A)``, ``Z = g(T)``, ``Y_tok = TokDist(Y)`` (Eq. 1), and the losses on them.

    P is average pooling over a token, the same operator that makes class shares out of labels, so features and shares
    stay aligned. g is LayerNorm, Linear, GELU, Linear. Runs in fp32 under autocast: sums over tens of thousands of
    tokens, ``1 / temperature`` and norms are not safe in half precision. (The pooling itself reads the feature as it
    is, to hold no fp32 copy of it; torch accumulates the sums in fp32.)

    Args:
        in_channels: C of the decoder feature.
        stride: voxels per token along each axis, see :func:`token_stride`.
        num_classes: K with background.
        hidden_dim: width of g.
        embedding_dim: C_z.
        ignore_label: label that is not counted, if any.
        settings: of the losses.
    """

    def __init__(
        self,
        in_channels: int,
        stride: Sequence[int],
        num_classes: int,
        hidden_dim: int,
        embedding_dim: int,
        ignore_label: int | None = None,
        settings: SHTALossSettings = DEFAULTS,
    ) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.min_valid_fraction = settings.shta_min_valid_fraction
        self.embed = nn.Sequential(
            nn.LayerNorm(in_channels),
            nn.Linear(in_channels, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, embedding_dim),
        )
        self.loss = SHTALoss(num_classes, embedding_dim, settings)

    def forward(self, feature: Tensor, labels: Tensor) -> SHTATerms:
        """Compute the SHTA terms of a labeled batch.

        Args:
            feature: ``[B, C, *patch]``, the last decoder feature of labeled samples.
            labels: ``[B, 1, *patch]`` integer labels at full resolution.

        Returns:
            The terms of :class:`nnunet_ssl.losses.shta.SHTATerms`.
        """
        counted = None if self.ignore_label is None else labels != self.ignore_label
        with torch.autocast(feature.device.type, enabled=False):
            y_tok, _ = token_class_distribution(
                labels[:, 0], self.stride, self.num_classes, self.ignore_label, self.min_valid_fraction
            )
            return self.loss(self.embed(self.tokens(feature, counted)).flatten(0, 1), y_tok.flatten(0, 1))

    def tokens(self, feature: Tensor, counted: Tensor | None = None) -> Tensor:
        """P of Eq. 1: the mean feature of each token.

        Args:
            feature: ``[B, C, *patch]``.
            counted: voxels that the means are over, ``[B, 1, *patch]`` bool; None for all. A token without any is 0.

        Returns:
            ``[B, L, C]`` float32, in C order.
        """
        if counted is None:
            means = average_pool(feature, self.stride).float()
        else:
            share = average_pool(counted.float(), self.stride)
            means = average_pool(feature * counted, self.stride).float()
            means = means / torch.where(share > 0, share, 1.0)
        return means.flatten(2).transpose(1, 2)


def average_pool(feature: Tensor, stride: Sequence[int]) -> Tensor:
    """Means over boxes of ``stride`` voxels, in 2D and 3D; unlike torch's pooling also for bfloat16 on the CPU.

    Args:
        feature: ``[B, C, *spatial]``; ``stride`` divides ``spatial``.

    Returns:
        ``[B, C, *grid]``, dtype of ``feature``.
    """
    grid = [size for n, s in zip(feature.shape[2:], stride, strict=True) for size in (n // s, s)]
    inside_a_box = [3 + 2 * axis for axis in range(len(stride))]
    return feature.reshape(*feature.shape[:2], *grid).mean(inside_a_box)
