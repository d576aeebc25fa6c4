"""SASSNet's adversary: tells from images and distance maps whether the images are labeled."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = 4
DROPOUT = 0.5  # of whole channels, after all layers but the last


class Discriminator(nn.Module):
    """Four convolutions that halve the resolution, a global mean, and two logits.

    Maps and images have a first layer each, and what they give is added. An axis that is down to one voxel keeps it.

    Source: the authors' code (Li, Zhang, He, "Shape-aware Semi-supervised 3D Semantic Segmentation for Medical Images",
    MICCAI 2020), in 2D too, and with a global mean, whatever the patch.

    Args:
        num_maps: channels of the maps.
        num_channels: of the images.
        patch_size: of both, 2D or 3D.
        width: channels of the first layer; each further one has twice as many.
    """

    def __init__(self, num_maps: int, num_channels: int, patch_size: Sequence[int], width: int = 64) -> None:
        super().__init__()
        dim = len(patch_size)
        conv: Any = {2: nn.Conv2d, 3: nn.Conv3d}[dim]
        dropout = {2: nn.Dropout2d, 3: nn.Dropout3d}[dim]
        size, widths = list(patch_size), [width * 2**i for i in range(LAYERS)]

        def halving(in_channels: int, out_channels: int) -> nn.Module:
            kernel = [4 if n > 1 else 3 for n in size]
            return conv(in_channels, out_channels, kernel, [2 if n > 1 else 1 for n in size], 1)

        self.of_maps, self.of_images = halving(num_maps, width), halving(num_channels, width)
        layers: list[nn.Module] = [nn.LeakyReLU(0.2), dropout(DROPOUT)]
        for narrow, wide in pairwise(widths):
            size = [max(1, n // 2) for n in size]
            layers += [halving(narrow, wide), nn.LeakyReLU(0.2), dropout(DROPOUT)]
        self.layers = nn.Sequential(*layers[:-1])
        self.head = nn.Linear(widths[-1], 2)

    def forward(self, maps: Tensor, images: Tensor) -> Tensor:
        """``[B, M, *patch]`` and ``[B, C, *patch]`` -> logits of unlabeled and labeled, float32 ``[B, 2]``."""
        feature = self.layers(self.of_maps(maps) + self.of_images(images))
        return self.head(feature.flatten(2).mean(2)).float()

    def error(self, maps: Tensor, images: Tensor, labeled: bool) -> tuple[Tensor, Tensor]:
        """The cross-entropy with "all of these are labeled", or none, and the share that is told so; both 0-dim."""
        logits = self(maps, images)
        truth = logits.new_full((len(logits),), int(labeled)).long()
        return F.cross_entropy(logits, truth), (logits.max(1).indices == truth).float().mean()
