"""GA-CPS: CPS with gradient-aware losses (Qi, Wu, Chan, ECCV 2024)."""

from __future__ import annotations

import torch.distributed as dist
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor

from nnunet_ssl.declared import Percentage, Share, declared, setting
from nnunet_ssl.losses.ga import GACELoss, GALoss, present_classes
from nnunet_ssl.trainers.base import full_resolution
from nnunet_ssl.trainers.cps import CrossSupervisionSettings, nnUNetTrainerCPS


@declared
class GACPSSettings(CrossSupervisionSettings):
    """Settings of GA-CPS; weight and ramp-up as in CPS, so that the two differ by their losses alone."""

    ga_topk: Percentage = setting(
        10.0,
        "Percentage of labeled voxels, the hardest ones, that enter the cross-entropy with labels; `100` is all. "
        "With pseudo-labels, all voxels always enter",
        symbol="k",
    )
    ga_gamma: Share = setting(
        0.5,
        "Exponent of the total number of voxels in the normalizer of a class: `1` is the plain mean, `0` the sum of "
        "the class means",
        symbol="gamma",
    )


class nnUNetTrainerGACPS(nnUNetTrainerCPS):  # noqa: N801
    """GA-CPS: cross pseudo supervision whose losses give rare and absent classes more gradient.

    Labels: GACE of the hardest voxels plus GADice, at each scale of deep supervision with nnU-Net's weights.
    Pseudo-labels: GACE of all voxels at full resolution, without a Dice. nnU-Net's validation loss stays nnU-Net's.

    Departures from the authors' code, each with its reason: see ``docs/methods.md``. The one to know when reading
    this: their cross term counts the voxels of each class over labeled and unlabeled images together; here each of
    the two is counted by itself and the mean is taken, as in CPS.
    """

    paper = "Qi et al., Gradient-Aware for Class-Imbalanced Semi-supervised Medical Image Segmentation, ECCV 2024"
    Settings = GACPSSettings
    supports_regions = False

    def initialize(self) -> None:
        """As CPS; and the losses, with nnU-Net's weights of the scales."""
        super().initialize()
        ignore_label = self.label_manager.ignore_label
        self.supervised_loss = GALoss(self.settings.ga_topk, self.settings.ga_gamma, ignore_label)
        if self.enable_deep_supervision:
            self.supervised_loss = DeepSupervisionWrapper(self.supervised_loss, self.loss.weight_factors)
        self.cross_loss = GACELoss(100, self.settings.ga_gamma)

    def _supervised_loss(self, outputs: list[Tensor] | Tensor, target: list[Tensor] | Tensor) -> Tensor:
        """GACE and GADice. Which classes are absent is decided at full resolution, for all scales and GPUs."""
        manager = self.label_manager
        present = present_classes(full_resolution(target), manager.num_segmentation_heads, manager.ignore_label)
        if self.is_ddp:
            present = present.int()
            dist.all_reduce(present, dist.ReduceOp.MAX)
            present = present > 0
        if not self.enable_deep_supervision:
            return self.supervised_loss(outputs, target, present)
        return self.supervised_loss(outputs, target, [present] * len(outputs))

    def _cross_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """GACE of all voxels."""
        return self.cross_loss(logits, labels)
