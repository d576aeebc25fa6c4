"""A training-only head that regresses signed distance maps from the last decoder feature."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class FullPrecisionTanh(nn.Tanh):
    """tanh in fp32 under autocast: that of float16 is flat from 5 on, where its gradient is exactly 0."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any float type, float32."""
        return super().forward(x.float())


def regression_head(segmentation_head: Any, num_maps: int) -> nn.Module:
    """A convolution of one voxel and tanh: ``[B, C, *patch]`` -> maps in (-1, 1), float32 ``[B, num_maps, *patch]``.

    It starts at zero, where tanh is steepest: with nnU-Net's momentum of 0.99, heads that start with random weights
    often end up where tanh is flat, and stay there.

    Args:
        segmentation_head: whose input it takes too, a convolution: ``decoder.seg_layers[-1]`` of nnU-Net's U-Nets.
        num_maps: a map a foreground class or region.
    """
    conv = type(segmentation_head)(segmentation_head.in_channels, num_maps, 1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, FullPrecisionTanh())
