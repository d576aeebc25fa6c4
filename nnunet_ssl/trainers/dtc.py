"""DTC: Dual-Task Consistency (Luo, Chen, Song, Wang, AAAI 2021)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nnunet_ssl.declared import Positive, Share, Weight, declared, setting
from nnunet_ssl.losses.consistency import dual_task_consistency, segmentation_regression_consistency
from nnunet_ssl.losses.sdm import signed_distance_maps
from nnunet_ssl.networks.regression_head import regression_head
from nnunet_ssl.trainers.base import Batch, Stream, full_resolution, nnUNetTrainerSSL
from nnunet_ssl.trainers.settings import SSLSettings


@declared
class DistanceSettings(SSLSettings):
    """Settings of every method that regresses the labels' distance maps."""

    distance_weight: Weight = setting(0.3, "Weight of the distance maps of labels", symbol="beta")


@declared
class DTCSettings(DistanceSettings):
    """Settings of DTC."""

    dtc_weight: Weight = setting(1.0, "Full weight of the consistency of the two tasks", symbol="lambda")
    dtc_rampup: Share = setting(1.0, "Share of the training over which that weight grows")
    dtc_steepness: Positive = setting(1500.0, "How steep the sigmoid is that turns a distance into a mask", symbol="k")


class RegressesDistances(nnUNetTrainerSSL):
    """A method with a head for the signed distance map of each foreground class, or region, that only training needs.

    The head reads the last decoder feature, as the segmentation head does, and learns the maps of the labels, which are
    computed for each patch on its device (:func:`nnunet_ssl.losses.sdm.signed_distance_maps`).
    """

    Settings = DistanceSettings

    def initialize(self) -> None:
        """As the base."""
        super().initialize()
        self._compiles = self._do_i_compile()  # which may write to the log, so not in each step

    def tapped_networks(self) -> set[str]:
        """The head reads the last decoder feature, of both streams."""
        return super().tapped_networks() | {"first"}

    @property
    def num_maps(self) -> int:
        """Foreground classes, or regions."""
        return self.label_manager.num_segmentation_heads - (not self.label_manager.has_regions)

    def build_training_modules(self) -> dict[str, nn.Module]:
        """The head."""
        self.require_decoder(self.plans_network, "to regress distances from the last feature of")
        head = regression_head(self.plans_network.decoder.seg_layers[-1], self.num_maps)
        return {**super().build_training_modules(), "regression": head}

    def term_weights(self) -> dict[str, float]:
        """beta."""
        return {**super().term_weights(), "distance": self.settings.distance_weight}

    def run(self, stream: Stream) -> tuple[list[Tensor] | Tensor, Tensor]:
        """The network's outputs, and the regressed maps ``[B, maps, *patch]``, float32 in (-1, 1)."""
        outputs, feature = self.forward_with_feature("first", stream)
        return outputs, self.training_modules["regression"](feature)

    def distance_loss(self, regression: Tensor, target: list[Tensor] | Tensor) -> Tensor:
        """The mean squared error of the maps ``[B, maps, *patch]`` that are known, 0-dim float32; 0 if none is.

        Unknown are those of a class without a boundary in the patch, and all of a patch with ignored voxels, where a
        boundary may be. The target is nnU-Net's.
        """
        return segmentation_regression_consistency(regression, *self._maps(full_resolution(target)))

    def _maps(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Signed distance maps of labels ``[B, 1 or regions, *patch]``: ``[B, maps, *patch]``; which are known."""
        manager, spacing = self.label_manager, self.configuration_manager.spacing
        if manager.has_regions:
            regions = labels[:, : self.num_maps].bool()
            ignored = labels[:, self.num_maps :].bool()  # one channel, or none
            found = signed_distance_maps(regions.flatten(0, 1), 2, spacing, self._compiles)
            sdm, present = (of_mask.view(*regions.shape[:2], *of_mask.shape[2:]) for of_mask in found)
        else:
            ignored = labels == manager.ignore_label if manager.has_ignore_label else torch.zeros_like(labels[:, :0])
            sdm, present = signed_distance_maps(labels[:, 0], self.num_maps + 1, spacing, self._compiles)
        return sdm, present & ~ignored.flatten(1).any(1, keepdim=True)


class nnUNetTrainerDTC(RegressesDistances):  # noqa: N801
    """DTC: the network segments and regresses distances to the boundary, and the two must agree.

    A steep sigmoid turns a regressed map into a mask. On labeled and unlabeled images it approaches the segmentation
    and the segmentation it: gradients flow into both. The segmentation predicts; the head is of training alone.
    """

    paper = "Luo et al., Semi-supervised Medical Image Segmentation through Dual-task Consistency, AAAI 2021"
    Settings = DTCSettings

    def initialize(self) -> None:
        """As the base; and the consistency, compiled."""
        super().initialize()
        self.consistency = self.compiled(dual_task_consistency)

    def term_weights(self) -> dict[str, float]:
        """lambda grows along a sigmoid."""
        weight = self.settings.dtc_weight * self.rampup(self.settings.dtc_rampup)
        return {**super().term_weights(), "dtc": weight}

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """A pass for each stream; the consistency is the mean over both."""
        outputs, regression = self.run(batch.labeled)
        terms = {
            "sup": self.loss(outputs, batch.labeled.target),
            "distance": self.distance_loss(regression, batch.labeled.target),
            "dtc": self._consistency(outputs, regression),
        }
        del outputs, regression  # before the next forward: a local name keeps maps alive
        yield terms

        yield {"dtc": self._consistency(*self.run(batch.unlabeled))}

    def _consistency(self, outputs: list[Tensor] | Tensor, regression: Tensor) -> Tensor:
        k, regions = self.settings.dtc_steepness, self.label_manager.has_regions
        return 0.5 * self.consistency(full_resolution(outputs), regression, k, regions)
