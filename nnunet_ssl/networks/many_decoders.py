"""MC-Net+'s network in training: the plans' own, and further decoders on its encoder that upsample another way."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn


def copied_decoder(network: Any) -> Any:
    """A copy of the decoder of one of nnU-Net's U-Nets, without the encoder that it refers to: that is shared."""
    return copy.deepcopy(network.decoder, {id(network.decoder.encoder): None})


def resampling_decoder(network: Any, mode: Literal["linear", "nearest"]) -> nn.Module:
    """A decoder like the network's own, with weights of its own, that interpolates in place of transposed convolutions.

    After each interpolation there is a convolution with the kernel of the stage, to the channels of the skip.

    Args:
        network: one of nnU-Net's U-Nets.
        mode: of the interpolation; linear keeps the corners, as in the authors' code.
    """
    decoder = copied_decoder(network)
    kernels = network.encoder.kernel_sizes[-2::-1]  # coarsest first, as transpconvs
    for i, (up, kernel) in enumerate(zip(decoder.transpconvs, kernels, strict=True)):
        dim = len(up.stride)
        linear = {"mode": ("bilinear", "trilinear")[dim - 2], "align_corners": True}
        decoder.transpconvs[i] = nn.Sequential(
            nn.Upsample(scale_factor=tuple(map(float, up.stride)), **linear if mode == "linear" else {"mode": mode}),
            (nn.Conv2d, nn.Conv3d)[dim - 2](
                up.in_channels, up.out_channels, kernel, padding="same", bias=up.bias is not None
            ),
        )
    if hasattr(network, "initialize"):
        decoder.apply(network.initialize)
    return decoder


class ManyDecoders(nn.Module):
    """A view of a plans' network that runs further decoders on the same skips.

    Args:
        network: one of nnU-Net's U-Nets; its ``encoder`` and ``decoder`` are found here by the same names.
        decoders: what takes its encoder's skips too, by name.
    """

    def __init__(self, network: Any, decoders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.encoder = network.encoder
        self.decoder = network.decoder
        self.others = nn.ModuleDict(decoders)

    def forward(self, x: Tensor) -> dict[str, list[Tensor] | Tensor]:
        """``[B, C, *patch]`` -> what each decoder gives, by name; the network's own is ``"own"`` and the first."""
        skips = self.encoder(x)
        return {"own": self.decoder(skips), **{name: decoder(skips) for name, decoder in self.others.items()}}
