"""DHC: Dual-debiased Heterogeneous Co-training (Wang and Li, MICCAI 2023)."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn

from nnunet_ssl.declared import Share, Weight, declared, setting
from nnunet_ssl.losses.class_counts import class_counts
from nnunet_ssl.losses.dhc import (
    DifficultyWeights,
    FrequencyWeights,
    weighted_cross_entropy,
    weighted_dice_and_cross_entropy,
)
from nnunet_ssl.losses.masked import labels_and_valid
from nnunet_ssl.losses.pseudo_labels import likeliest_class
from nnunet_ssl.trainers.base import Stream, full_resolution
from nnunet_ssl.trainers.cps import CrossSupervisionSettings, nnUNetTrainerCPS


@declared
class DHCSettings(CrossSupervisionSettings):
    """Settings of DHC.

    Weight and ramp-up of the cross term are the authors', not those of CPS: a class that the other network invents in
    the background weighs 1, the background that the label says there about 0.1. So a strong cross term outvotes labels.
    """

    cps_weight: Weight = setting(0.1, "Full weight of the cross term", symbol="lambda")
    cps_rampup: Share = setting(1.0, "Share of the training over which the weight grows")
    cps_init: Literal["xavier", "he"] = setting(
        "xavier", "How the second network's weights are drawn; the first has nnU-Net's own `\"he\"`", paper="he"
    )
    dhc_least_weight: Share = setting(
        0.1,
        "Least weight of a class in both networks, where the largest is 1; with `0` the second's background has none",
        paper=0.0,
    )


class nnUNetTrainerDHC(nnUNetTrainerCPS):  # noqa: N801
    """DHC: CPS whose two networks weight the classes differently, so that they do not share their biases.

    The first network weighs those most that it finds difficult on labels, the second those that are rare in its own
    pseudo-labels. Each weighs all of its losses so, with labels and with the other's pseudo-labels. Weights follow at
    the end of each step, from what the networks have predicted in it.
    """

    paper = (
        "Wang and Li, DHC: Dual-debiased Heterogeneous Co-training Framework for Class-imbalanced Semi-supervised "
        "Medical Image Segmentation, MICCAI 2023"
    )
    Settings = DHCSettings
    supports_regions = False

    def initialize(self) -> None:
        """As CPS; and a place for what a step counts."""
        super().initialize()
        self._counted: dict[str, Tensor] = {}  # voxels of each class

    def build_training_modules(self) -> dict[str, nn.Module]:
        """The second network, and the weights of both."""
        classes = self.label_manager.num_segmentation_heads
        weights = {
            "difficulty": DifficultyWeights(classes, self.settings.dhc_least_weight),
            "frequency": FrequencyWeights(classes, self.settings.dhc_least_weight),
        }
        return {**super().build_training_modules(), **weights}

    def _terms(
        self, supervised: str, stream: Stream, outputs: list[Tensor] | Tensor, labels: Tensor | None
    ) -> dict[str, Tensor]:
        """As CPS, with the weights of one network; what it predicts is counted."""
        is_first = supervised == "sup"
        weights = self.training_modules["difficulty" if is_first else "frequency"].weights
        self._count(is_first, stream, outputs)
        terms = {}
        if stream.target is not None:
            terms[supervised] = self._weighted_loss(outputs, stream.target, weights)
        if self._crosses(stream):
            share = 0.5 if self.crosses_labeled else 1.0
            terms["cps"] = share * weighted_cross_entropy(full_resolution(outputs), labels, weights)
        return terms

    def _weighted_loss(self, outputs: list[Tensor] | Tensor, target: list[Tensor] | Tensor, weights: Tensor) -> Tensor:
        """What one network learns from labels, with the same weights of the classes at all scales."""
        ignore_label = self.label_manager.ignore_label
        loss = partial(weighted_dice_and_cross_entropy, weights=weights, ignore_label=ignore_label)
        if self.enable_deep_supervision:
            loss = DeepSupervisionWrapper(loss, self.loss.weight_factors)
        return loss(outputs, target)

    @torch.no_grad()
    def _count(self, is_first: bool, stream: Stream, outputs: list[Tensor] | Tensor) -> None:
        classes = self.label_manager.num_segmentation_heads
        predicted = likeliest_class(full_resolution(outputs))
        if stream.target is None:
            if not is_first:
                self._counted["pseudo"] = class_counts(predicted, classes)
        elif is_first:
            labels, valid = labels_and_valid(full_resolution(stream.target), self.label_manager.ignore_label)
            right = predicted == labels
            self._counted["right"] = class_counts(labels, classes, right if valid is None else right & valid)
            self._counted["predicted"] = class_counts(predicted, classes, valid)
            self._counted["labeled"] = class_counts(labels, classes, valid)

    def after_step(self) -> None:
        """The weights follow, of all GPUs together."""
        super().after_step()
        for counts in self._counted.values():
            self.summed(counts)
        pseudo, labeled = self._counted.pop("pseudo"), self._counted["labeled"]
        frequency: FrequencyWeights = self.training_modules["frequency"]
        if self.global_step == 0:
            frequency.start(labeled)
        frequency.update(pseudo)
        self.training_modules["difficulty"].update(**self._counted)
