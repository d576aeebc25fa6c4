"""SKCDF's exchange between labeled and unlabeled images: attention over the channels of the bottleneck.

Source: Zhang et al., "Semantic Knowledge Complementarity based Decoupling Framework for Semi-supervised
Class-imbalanced Medical Image Segmentation" (CVPR 2025), the authors' code, in 2D too and for bottlenecks of any size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_ssl.networks.feature_tap import FeatureTap

HEADS = 2


class ChannelAttention(nn.Module):
    """The channels of an image are complemented by those channels of another image that are like them.

    Each head has a query of every channel of the one and a key and a value of every channel of the other, by depthwise
    convolutions. Their ``C x C`` products over all positions are normalized and become weights by a softmax; what they
    select, the mean over heads, is added, and then a layer of one convolution. Both end in zeros at the start, so that
    nothing is changed.

    Args:
        channels: C.
        dim: 2 or 3.
        local: whether each half of each axis attends by itself, rather than all positions together.
    """

    def __init__(self, channels: int, dim: int, local: bool) -> None:
        super().__init__()
        conv: Any = {2: nn.Conv2d, 3: nn.Conv3d}[dim]
        self.local = local
        self.norm, self.norm_other, self.norm_out = (nn.GroupNorm(1, channels) for _ in range(3))
        self.query, self.key, self.value = (
            conv(channels, HEADS * channels, 3, padding=1, groups=channels, bias=False) for _ in range(3)
        )
        self.project, self.layer = conv(channels, channels, 1), conv(channels, channels, 1)
        for last in (self.project, self.layer):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """``[B, C, *spatial]`` of one image and of the other -> the same of the one."""
        with torch.autocast(x.device.type, enabled=False):  # sums over all positions, and a softmax over C
            x, other = x.float(), self.norm_other(other.float())
            found = self._attend(self.query(self.norm(x)), self.key(other), self.value(other))
            x = x + self.project(found)
            return x + F.gelu(self.layer(self.norm_out(x)))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, axis: int = 2) -> Tensor:
        """All ``[B, C * HEADS, *spatial]``; halved axis by axis where it is local, except for axes of one voxel."""
        if self.local and axis < query.ndim:
            halves = (part.tensor_split(min(2, query.shape[axis]), axis) for part in (query, key, value))
            return torch.cat([self._attend(q, k, v, axis + 1) for q, k, v in zip(*halves, strict=True)], axis)
        q, k, v = (part.unflatten(1, (-1, HEADS)).transpose(1, 2).flatten(3) for part in (query, key, value))
        weights = F.instance_norm(q @ k.transpose(2, 3)).softmax(3)  # [B, HEADS, C, C]
        return (weights @ v).mean(1).unflatten(2, query.shape[2:])


class KnowledgeExchange(nn.Module):
    """Attention by parts, then over all positions; each image of either kind attends to one of the other kind.

    Args:
        channels: of the bottleneck.
        dim: 2 or 3.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ChannelAttention(channels, dim, local) for local in (True, False))

    def forward(self, labeled: Tensor, unlabeled: Tensor) -> tuple[Tensor, Tensor]:
        """Bottlenecks ``[B, C, *spatial]`` -> the same; those of unlabeled images neither give nor take a gradient."""
        unlabeled = unlabeled.detach()
        for layer in self.layers:
            with torch.no_grad():
                of_unlabeled = layer(unlabeled, labeled)
            labeled, unlabeled = layer(labeled, unlabeled), of_unlabeled
        return labeled, unlabeled


class ExchangingPath(nn.Module):
    """A view of a plans' network: its encoder, the exchange, and a decoder with a second, balanced head.

    Args:
        network: one of nnU-Net's U-Nets.
        exchange: of its bottleneck's channels.
        decoder: like its own.
        balanced: takes the decoder's last feature.
    """

    def __init__(self, network: Any, exchange: nn.Module, decoder: nn.Module, balanced: nn.Module) -> None:
        super().__init__()
        self.encoder = network.encoder
        self.exchange = exchange
        self.tapped = FeatureTap(decoder)
        self.balanced = balanced

    def forward(self, x: Tensor) -> tuple[list[Tensor] | Tensor, Tensor, list[Tensor] | Tensor, Tensor]:
        """Run labeled images, and without gradient as many unlabeled ones.

        Args:
            x: ``[2 B, C, *patch]``, labeled images first.

        Returns:
            Of labeled images the decoder's outputs, and the balanced head's ``[B, K, *patch]``; the same of the others.
        """
        labeled, unlabeled = x.chunk(2)
        skips = self.encoder(labeled)
        with torch.no_grad():
            skips_unlabeled = self.encoder(unlabeled)
        bottlenecks = self.exchange(skips[-1], skips_unlabeled[-1])
        outputs, feature = self.tapped([*skips[:-1], bottlenecks[0]])
        balanced = self.balanced(feature)
        with torch.no_grad():
            outputs_unlabeled, feature_unlabeled = self.tapped([*skips_unlabeled[:-1], bottlenecks[1]])
            return outputs, balanced, outputs_unlabeled, self.balanced(feature_unlabeled)
