"""MagicNet's training-only head that says where in a patch a cube comes from."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LocationHead(nn.Module):
    """Position of a cube from its bottleneck feature: two linear layers on the flattened feature.

    The bottleneck is brought to two voxels along each axis first (it has just these where a cube is as small as it may
    be), so that the size of the head does not depend on the plans. Not to one, the mean: instance normalization has set
    each channel's mean over the cube to a constant, so little of the position would be left.

    Source: Chen et al., "MagicNet" (CVPR 2023), with LayerNorm for the authors' BatchNorm1d.

    Args:
        in_channels: of the bottleneck.
        dim: 2 or 3, number of spatial axes.
        num_positions: N, cubes of a patch.
        hidden_dim: width between the two layers.
    """

    def __init__(self, in_channels: int, dim: int, num_positions: int, hidden_dim: int) -> None:
        super().__init__()
        self._pool = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[dim]
        self.head = nn.Sequential(
            nn.Linear(in_channels * 2**dim, hidden_dim),
            nn.LayerNorm(hidden_dim),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden_dim, num_positions),
        )

    def forward(self, bottleneck: Tensor) -> Tensor:
        """``[M, C, *bottleneck]``, any float dtype -> logits of the positions, float32 ``[M, N]``."""
        return self.head(self._pool(bottleneck.float(), 2).flatten(1)).float()
