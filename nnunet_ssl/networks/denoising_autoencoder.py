"""AUSS's autoencoder of segmentations: gives a plausible one for any, through a narrow code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

WIDTH, WIDEST = 16, 256  # channels at full resolution, and the most
CODE = 512
SMALL = 6  # voxels of an axis that is not halved further


class DenoisingAutoencoder(nn.Module):
    """Convolutions that halve the resolution, two linear layers with a code of 512 numbers between, and the way back.

    There are no skips: what does not go through the code is lost. An axis is halved while it has more than 6 voxels, an
    even number. Batch normalization, since instance normalization would make patches of one class all alike.

    Source: Adiga, Dolz, Lombaert, "Anatomically-aware Uncertainty for Semi-supervised Image Segmentation" (MedIA 2024),
    the authors' code, in 2D too and for any patch.

    Args:
        num_maps: K, classes with background, or regions.
        patch_size: 2D or 3D; the linear layers are of this patch alone.
    """

    def __init__(self, num_maps: int, patch_size: Sequence[int]) -> None:
        super().__init__()
        dim = len(patch_size)
        conv: Any = {2: nn.Conv2d, 3: nn.Conv3d}[dim]
        transposed: Any = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dim]
        norm: Any = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dim]

        def block(convolution: nn.Module, channels: int) -> list[nn.Module]:
            return [convolution, norm(channels), nn.ReLU()]

        size, strides = list(patch_size), []
        while any(halved := [n > SMALL and n % 2 == 0 for n in size]):
            strides.append([1 + h for h in halved])
            size = [n // s for n, s in zip(size, strides[-1], strict=True)]
        widths = [min(WIDTH * 2**i, WIDEST) for i in range(len(strides) + 1)]

        down = block(conv(num_maps, WIDTH, 3, padding=1), WIDTH)
        for (narrow, wide), stride in zip(pairwise(widths), strides, strict=True):
            down += block(conv(narrow, wide, stride, stride), wide) + block(conv(wide, wide, 3, padding=1), wide)
        up: list[nn.Module] = []
        for (wide, narrow), stride in zip(pairwise(widths[::-1]), strides[::-1], strict=True):
            up += block(transposed(wide, narrow, stride, stride), narrow)
            up += block(conv(narrow, narrow, 3, padding=1), narrow)

        self.down = nn.Sequential(*down)
        features = widths[-1] * math.prod(size)
        self.code = nn.Sequential(nn.Flatten(), nn.Linear(features, CODE), nn.ReLU(), nn.Linear(CODE, features))
        self.up = nn.Sequential(nn.Unflatten(1, (widths[-1], *size)), *up, conv(WIDTH, num_maps, 1))

    def forward(self, masks: Tensor) -> Tensor:
        """Masks ``[B, K, *patch]``, float -> logits of each by itself, before a sigmoid, of the same shape."""
        return self.up(self.code(self.down(masks)))
