"""CauSSL: Causality-inspired Semi-supervised Learning (Miao, Chen, Liu, Wei, Heng, ICCV 2023), its variant of CPS."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from nnunet_ssl.declared import Count, Share, Weight, declared, setting
from nnunet_ssl.losses.dependence import best_combinations, dependence
from nnunet_ssl.networks.filters import filters_of
from nnunet_ssl.trainers.base import Batch
from nnunet_ssl.trainers.cps import CPSSettings, nnUNetTrainerCPS


@declared
class CauSSLSettings(CPSSettings):
    """Settings of CauSSL; what it has of CPS is as in CPS, so that the two differ by the dependence alone."""

    cps_weight: Weight = setting(1.0, "As in CPS", symbol="lambda", paper=0.03)
    cps_on_labeled: bool = setting(True, "As in CPS", paper=False)
    cps_loss: Literal["dice_ce", "ce"] = setting("dice_ce", "As in CPS", paper="ce")
    caussl_weight: Weight = setting(3.0, "Weight of the dependence of the two networks", symbol="gamma")
    caussl_start: Share = setting(0.1, "Share of the training from which the dependence counts")
    caussl_every: Count = setting(60, "Steps after which the combinations of filters are fitted anew")


class nnUNetTrainerCauSSL(nnUNetTrainerCPS):  # noqa: N801
    """CauSSL on CPS: two networks that teach each other while their filters are kept independent.

    Every so many steps the linear combinations of one network's filters that come nearest to the other's are found,
    layer by layer; in every step both networks turn away from what the other's combinations say.
    """

    paper = "Miao et al., CauSSL: Causality-inspired Semi-supervised Learning for Medical Image Segmentation, ICCV 2023"
    Settings = CauSSLSettings
    settings: CauSSLSettings

    combinations: list[list[Tensor]] | None = None  # P(1|2) and P(2|1), of each layer

    def term_weights(self) -> dict[str, float]:
        """gamma."""
        return {**super().term_weights(), "dependence": self.settings.caussl_weight}

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """CPS's passes, and one of the weights alone."""
        yield from super().losses(batch)
        if self.global_step >= self.settings.caussl_start * self.total_steps:
            with torch.autocast(self.device.type, enabled=False):
                term = self._dependence()
            yield {"dependence": term}

    def _dependence(self) -> Tensor:
        """D(1|2) + D(2|1), 0-dim float32."""
        first, second = (filters_of(network) for network in self.networks().values())
        pairs = (first, second), (second, first)
        if self.combinations is None or self.global_step % self.settings.caussl_every == 0:
            self.combinations = [[best_combinations(*layer) for layer in zip(*pair, strict=True)] for pair in pairs]
        return sum(dependence(*pair, p) for pair, p in zip(pairs, self.combinations, strict=True))

    def training_state(self, filename: str) -> dict[str, Any]:
        """The combinations, which are of weights that have moved since."""
        state = super().training_state(filename)
        return state if self.combinations is None else {**state, "combinations": self.combinations}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        super().load_training_state(state)
        if "combinations" in state:  # copied: they are views of a file that the next save replaces
            self.combinations = [[p.to(self.device, copy=True) for p in layers] for layers in state["combinations"]]
