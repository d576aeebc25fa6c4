"""Reads the last decoder feature of a network in addition to its outputs, without changing the network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class FeatureTap(nn.Module):
    """A view of a plans' network whose forward also returns what ``decoder.seg_layers[-1]`` takes in.

    The feature leaves as an output of ``forward``. So ``torch.compile`` of this module sees one graph without side
    effects, and gradients flow as through any other output. The network keeps its parameters, its state dict and what
    it computes; outside of a tap's forward the hook does nothing.

    Args:
        network: any nnU-Net network with ``decoder.seg_layers`` (plain and residual-encoder U-Nets, 2D and 3D), or such
            a decoder itself, which takes skips instead of images.

    Raises:
        TypeError: if the network has no such decoder.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        decoder: Any = getattr(network, "decoder", network)
        if not hasattr(decoder, "seg_layers"):
            raise TypeError(f"{type(network).__name__} has no decoder.seg_layers to read the last decoder feature from")
        self.network = network
        self._kept: list[Tensor] | None = None
        self._hook = decoder.seg_layers[-1].register_forward_pre_hook(self._keep)

    def _keep(self, _head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._kept is not None:
            self._kept.append(inputs[0])

    def remove(self) -> None:
        """Leave the network without this tap's hook."""
        self._hook.remove()

    def forward(self, x: Tensor) -> tuple[Tensor | list[Tensor], Tensor]:
        """Run the network.

        Args:
            x: ``[B, C_in, *patch]``.

        Returns:
            The network's outputs as they are (a list with deep supervision), and the feature ``[B, C, *patch]``.
        """
        kept: list[Tensor] = []
        self._kept = kept
        outputs = self.network(x)
        self._kept = None
        return outputs, kept[0]
