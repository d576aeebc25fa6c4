"""CPS: Cross Pseudo Supervision (Chen, Yuan, Zeng, Wang, CVPR 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal

import torch
from dynamic_network_architectures.initialization.weight_init import InitWeights_XavierUniform
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from torch import Tensor, nn

from nnunet_ssl.declared import Share, Weight, declared, setting
from nnunet_ssl.losses.pseudo_labels import hard_pseudo_labels, pseudo_label_cross_entropy
from nnunet_ssl.trainers.base import Batch, Stream, full_resolution, nnUNetTrainerSSL
from nnunet_ssl.trainers.settings import SSLSettings


@declared
class TwinSettings(SSLSettings):
    """Settings of two networks that teach each other, on whatever images."""

    cps_weight: Weight = setting(1.0, "Full weight of the cross term", symbol="lambda", paper=0.1)
    cps_rampup: Share = setting(0.4, "Share of the training over which the weight grows", paper=1.0)
    cps_init: Literal["xavier", "he"] = setting(
        "xavier", "How the second network's weights are drawn; the first has nnU-Net's own `\"he\"`"
    )


@declared
class CrossSupervisionSettings(TwinSettings):
    """Settings of two networks that teach each other on the same images, whatever their losses."""

    cps_on_labeled: bool = setting(True, "Whether the cross term also covers labeled patches")


@declared
class CPSSettings(CrossSupervisionSettings):
    """Settings of CPS."""

    cps_loss: Literal["dice_ce", "ce"] = setting(
        "dice_ce", "Cross term: nnU-Net's Dice and cross-entropy, or only cross-entropy", paper="ce"
    )


class nnUNetTrainerCPS(nnUNetTrainerSSL):  # noqa: N801
    """CPS: two networks, each supervised by the labels and by the other's hard pseudo-labels.

    The first network is the one that validates, is saved and predicts. Both see the same augmented images. The cross
    term is taken at full resolution, on hard labels without a confidence threshold and without gradient. Where both
    streams take part it is the mean over the two, so that each stream can be a separate pass; for the cross-entropy
    that is the mean over all voxels.
    """

    paper = "Chen et al., Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision, CVPR 2021"
    Settings = CPSSettings

    def networks(self) -> dict[str, nn.Module]:
        """The plans' network and its twin."""
        return {**super().networks(), "second": self.training_modules["second"]}

    def build_training_modules(self) -> dict[str, nn.Module]:
        """The second network: from the same plans, with its own weights."""
        with self.seeded("second"):
            second = self.build_network_architecture(
                self.plans_manager,
                self.configuration_manager,
                self.num_input_channels,
                self.label_manager.num_segmentation_heads,
                self.enable_deep_supervision,
            )
            if self.settings.cps_init == "xavier":
                second.apply(InitWeights_XavierUniform())
        return {**super().build_training_modules(), "second": second}

    def term_weights(self) -> dict[str, float]:
        """The cross term grows along a sigmoid."""
        weight = self.settings.cps_weight * self.rampup(self.settings.cps_rampup)
        return {**super().term_weights(), "cps": weight}

    @property
    def crosses_labeled(self) -> bool:
        """Whether the cross term also covers labeled patches."""
        return self.settings.cps_on_labeled

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """For each stream a pass of each network."""
        for stream in batch:
            yield from self.in_turn(stream, stream)

    def in_turn(self, of_first: Stream, of_second: Stream) -> Iterator[dict[str, Tensor]]:
        """A pass of each network, on its view of the same images.

        Paired: both networks run, then each is backpropagated. Lean: the second network gives its pseudo-labels without
        gradient and runs again when its turn comes, so that one network's pass is all that is held at any time. Without
        a cross term neither has to wait for the other.
        """
        crosses = self._crosses(of_first)
        paired = crosses and self.settings.passes != "lean"
        second = None
        if crosses:
            with nullcontext() if paired else torch.no_grad():
                second = self.forward("second", of_second)
        of_feature = self.take_terms_of_features()
        labels_of_second = self._pseudo_labels(second)
        if not paired:
            second = None

        first = self.forward("first", of_first)
        labels_of_first = self._pseudo_labels(first)
        terms = self._terms("sup", of_first, first, labels_of_second)
        del first  # before the pass is backpropagated, here and below: a local name keeps logits alive
        yield terms

        if second is None:
            second = self.forward("second", of_second)
        terms = self._terms("sup_second", of_second, second, labels_of_first)
        del second
        yield terms | of_feature

    def _terms(
        self, supervised: str, stream: Stream, outputs: list[Tensor] | Tensor, labels: Tensor | None
    ) -> dict[str, Tensor]:
        """What one network learns from one stream: its labels, if it has any, and the other network's."""
        terms = {}
        if stream.target is not None:
            terms[supervised] = self._supervised_loss(outputs, stream.target)
        if self._crosses(stream):
            share = 0.5 if self.crosses_labeled else 1.0
            terms["cps"] = share * self._cross_loss(full_resolution(outputs), labels)
        return terms

    def _crosses(self, stream: Stream) -> bool:
        return stream.target is None or self.crosses_labeled

    def _pseudo_labels(self, outputs: list[Tensor] | Tensor | None) -> Tensor | None:
        if outputs is None:
            return None
        manager = self.label_manager
        return hard_pseudo_labels(full_resolution(outputs), manager.has_regions, manager.has_ignore_label)

    def _supervised_loss(self, outputs: list[Tensor] | Tensor, target: list[Tensor] | Tensor) -> Tensor:
        """L_sup of one network: nnU-Net's own loss."""
        return self.loss(outputs, target)

    def _cross_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What one network learns from the other's pseudo-labels, at full resolution."""
        if self.settings.cps_loss == "ce":
            return pseudo_label_cross_entropy(logits, labels, self.label_manager.has_regions)
        loss = self.full_resolution_loss
        if type(loss) is DC_and_CE_loss and loss.ignore_label is not None:
            # Nothing is ignored here, and nnU-Net's sum of the two would wait for the device to tell it so.
            return loss.weight_ce * loss.ce(logits, labels) + loss.weight_dice * loss.dc(logits, labels)
        return loss(logits, labels)
