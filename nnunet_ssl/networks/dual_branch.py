"""SASNet's network: the plans' U-Net with a second, shallower decoder on the same encoder."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_ssl.errors import UserError
from nnunet_ssl.losses.branches import Branches
from nnunet_ssl.networks.feature_tap import FeatureTap

Branch = Literal["high", "low", "both", "each"]
DECODER_PARTS = ("transpconvs", "stages", "seg_layers")  # of nnU-Net's decoders: one entry a stage, coarsest first


class BranchOutputs(NamedTuple):
    """What one branch gives in training."""

    logits: list[Tensor] | Tensor  # [B, K, *patch]; with deep supervision a list, full resolution first
    feature: Tensor  # [B, C, *patch], what the full-resolution segmentation head takes in


class DualBranchUNet(nn.Module):
    """One encoder, two decoders (Section 3.1).

    The high-level decoder is the plans' own and starts from the bottleneck. The low-level decoder has the same build
    and starts ``low_level_start`` stages above it, from features that no deeper stage has touched. ``encoder`` and
    ``decoder`` keep their names, so the weights without ``low_decoder`` are a plain nnU-Net network.

    In training mode ``forward`` gives each branch's outputs. In evaluation it gives logits of the mean of the two
    branches' probabilities, which any softmax after it turns back into that mean; ``branch`` picks one of them instead,
    or with ``"each"`` both by name.

    The depth of the low-level decoder follows from the weights: ``load_state_dict`` rebuilds it as they need it. So
    nnU-Net's predictor, which knows the plans alone, loads every trained model.

    Args:
        network: a network of nnU-Net's plans, with ``encoder`` (returning skips) and ``decoder``.
        low_level_start: stages between the bottleneck and the start of the low-level decoder, from 1; 0 for none. None
            is 1, or 0 in a network of two stages.

    Raises:
        UserError: if the network is no such U-Net, or too shallow.
    """

    encoder: Any  # nnU-Net's, as are the decoders
    decoder: Any
    low_decoder: Any

    def __init__(self, network: nn.Module, low_level_start: int | None = None) -> None:
        super().__init__()
        if not all(hasattr(getattr(network, "decoder", None), name) for name in DECODER_PARTS):
            raise UserError(
                f"SASNet cannot be built on {type(network).__name__}: it needs one of nnU-Net's U-Nets, with an "
                "encoder and a decoder of stages; use other plans, or nnUNetTrainerCPS."
            )
        self.encoder = network.encoder
        self.decoder = network.decoder
        self._initialize = getattr(network, "initialize", None)
        self.branch: Branch = "both"
        self._build_low_decoder(min(1, len(self.decoder.stages) - 1) if low_level_start is None else low_level_start)
        self.register_load_state_dict_pre_hook(_fit_low_decoder)

    def _build_low_decoder(self, low_level_start: int) -> None:
        """A copy of the high-level decoder without its first stages, with its own weights."""
        stages = len(self.decoder.stages)
        if not 0 <= low_level_start < stages:
            raise UserError(
                f"sasnet_low_level_start is {low_level_start}, but the plans' decoder has {stages} stage(s): it must "
                f"be 0 (no low-level branch) to {stages - 1}."
            )
        for tap in getattr(self, "_taps", ()):
            tap.remove()
        self.low_level_start = low_level_start
        self.low_decoder = None
        if low_level_start:
            low = copy.deepcopy(self.decoder, {id(self.decoder.encoder): None})  # the encoder is shared, not copied
            for name in DECODER_PARTS:
                setattr(low, name, getattr(low, name)[low_level_start:])
            if self._initialize is not None:
                low.apply(self._initialize)
            self.low_decoder = low
        # Not registered: a tap has no weights, and would list its decoder's weights a second time.
        self._taps = tuple(map(FeatureTap, self.decoders.named().values()))

    @property
    def decoders(self) -> Branches:
        """The decoder of each branch."""
        return Branches(self.decoder, self.low_decoder)

    def set_deep_supervision(self, enabled: bool) -> None:
        """Let all outputs of the decoders leave, or the full-resolution one alone."""
        for decoder in self.decoders.named().values():
            decoder.deep_supervision = enabled

    def forward(self, x: Tensor) -> Branches | list[Tensor] | Tensor:
        """Run the network.

        Args:
            x: ``[B, C_in, *patch]``.

        Returns:
            In training the :class:`BranchOutputs` of each branch. In evaluation what a plain network gives: logits
            ``[B, K, *patch]``, with deep supervision a list, full resolution first; with branch ``"each"`` those of
            each branch.
        """
        skips = self.encoder(x)
        if self.training:
            inputs = (skips, skips[: -self.low_level_start])
            return Branches(*(BranchOutputs(*tap(i)) for tap, i in zip(self._taps, inputs, strict=False)))
        if self.low_decoder is None or self.branch == "high":
            return self.decoder(skips)
        low = self.low_decoder(skips[: -self.low_level_start])
        if self.branch == "low":
            return low
        branches = Branches(self.decoder(skips), low)
        return branches if self.branch == "each" else mean_of_branches(branches)


def mean_of_branches(logits: Branches) -> list[Tensor] | Tensor:
    """Logits whose softmax is the mean of the branches' softmax, in fp32.

    Args:
        logits: ``[B, K, *spatial]`` of both branches, or lists of them with full resolution first. Coarse outputs that
            only the high-level branch has stay its own.
    """
    if isinstance(logits.high, Tensor):
        log_probabilities = torch.stack([F.log_softmax(branch.float(), 1) for branch in logits])
        return torch.logsumexp(log_probabilities, 0) - math.log(2)
    means = [mean_of_branches(Branches(*pair)) for pair in zip(*logits, strict=False)]
    return means + list(logits.high[len(means) :])


def low_level_start_of(weights: Mapping[str, Tensor], prefix: str = "") -> int:
    """``low_level_start`` of the network whose state dict this is; its names may begin with ``prefix``."""

    def stages(decoder: str) -> int:
        start = f"{prefix}{decoder}.stages."
        return len({key.removeprefix(start).split(".")[0] for key in weights if key.startswith(start)})

    low = stages("low_decoder")
    return stages("decoder") - low if low else 0


def _fit_low_decoder(network: DualBranchUNet, state_dict: dict, prefix: str, *_: object) -> None:
    """Before weights are loaded: give the low-level decoder the depth that they have."""
    low_level_start = low_level_start_of(state_dict, prefix)
    if low_level_start != network.low_level_start:
        network._build_low_decoder(low_level_start)
        network.to(next(network.parameters()).device)
