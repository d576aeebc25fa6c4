"""UniMatch: weak-to-strong consistency with two strong views and one of features (Yang et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_ssl.declared import Decay, Share, Weight, declared, setting
from nnunet_ssl.losses.partial import partial_dice_and_cross_entropy
from nnunet_ssl.losses.pseudo_labels import labels_and_confidence
from nnunet_ssl.losses.squared_dice import squared_dice_of_shown
from nnunet_ssl.trainers.base import Batch, Stream, full_resolution
from nnunet_ssl.trainers.strong_view import StronglyViewed, StrongViewSettings
from nnunet_ssl.views.boxes import CUTMIX_SHARE, random_boxes, random_sides
from nnunet_ssl.views.mixing import Patches, pasted, rolled


@declared
class UniMatchSettings(StrongViewSettings):
    """Settings of UniMatch."""

    unimatch_strong_weight: Weight = setting(0.5, "Weight of each of the two strong views", symbol="lambda")
    unimatch_feature_weight: Weight = setting(1.0, "Weight of the view with dropped features", symbol="mu")
    unimatch_rampup: Share = setting(0.4, "Share of the training over which both weights grow", paper=0.0)
    unimatch_threshold: Share = setting(0.95, "Probability from which a voxel's pseudo-label counts", symbol="tau")
    unimatch_loss: Literal["dice", "dice_ce"] = setting(
        "dice", "With pseudo-labels: Dice, as the code for medical images, or Dice and cross-entropy"
    )
    unimatch_cutmix: Share = setting(0.5, "Probability that a strong view gets a box of another image's")
    unimatch_dropout: Decay = setting(0.5, "Share of the channels that are dropped between encoder and decoder")


class nnUNetTrainerUniMatch(StronglyViewed):  # noqa: N801
    """UniMatch: confident predictions on a weak view supervise strong views and thinned features.

    There are three: two strong views of the image, in which boxes come from another image of the batch, and the image
    itself with channels of its features dropped. One network, no teacher.

    An image's partner is the one before it in its batch, so one pass without gradient labels both.

    Raises:
        UserError: at the start, for a network without encoder and decoder.
    """

    paper = "Yang et al., Revisiting Weak-to-Strong Consistency in Semi-Supervised Semantic Segmentation, CVPR 2023"
    Settings = UniMatchSettings

    def initialize(self) -> None:
        """Beside the whole network its two halves are run, compiled as nnU-Net compiles."""
        super().initialize()
        network = self.plans_network
        self.require_decoder(network, "to drop features between")
        self._encode, self._decode = self.compiled(network.encoder), self.compiled(network.decoder)

    def term_weights(self) -> dict[str, float]:
        """Both weights grow along a sigmoid: at first what is sure is background alone."""
        settings, grown = self.settings, self.rampup(self.settings.unimatch_rampup)
        return {
            **super().term_weights(),
            "strong": settings.unimatch_strong_weight * grown,
            "feature": settings.unimatch_feature_weight * grown,
        }

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """A pass for the labels, one for each strong view, one for the features."""
        yield {"sup": self.loss(self.forward("first", batch.labeled), batch.labeled.target)}

        weak = self._pseudo_labeled(batch.unlabeled.images)
        for number in range(2):
            strong = self._strong(weak, number)
            yield {"strong": self._follow(self.forward("first", Stream(strong.images, None)), strong)}
        yield {"feature": self._follow(self._with_dropped_features(weak.images), weak)}

    @torch.no_grad()
    def _pseudo_labeled(self, images: Tensor) -> Patches:
        """The hard decision on weak views ``[B, C, *patch]``; it counts where it is sure."""
        prob = self.probabilities(self.forward("first", Stream(images, None)))
        labels, confidence = labels_and_confidence(prob, self.label_manager.has_regions)
        sure = confidence >= self.settings.unimatch_threshold
        self.log_value("unimatch_sure", sure.float().mean())
        return Patches(images, labels, sure)

    def _strong(self, weak: Patches, number: int) -> Patches:
        """A strong view with boxes of the partner's strong view and pseudo-labels."""
        rng = self.draws("strong", number)
        strong = weak._replace(images=self.strong_view(weak.images, rng))
        patch_size = weak.images.shape[2:]
        sides = random_sides(rng, len(weak.images), patch_size, CUTMIX_SHARE)
        sides *= rng.random((len(sides), 1)) < self.settings.unimatch_cutmix
        boxes = random_boxes(rng, sides, patch_size, weak.images.device)
        return pasted(boxes, rolled(strong), strong)

    def _with_dropped_features(self, images: Tensor) -> list[Tensor] | Tensor:
        drop = F.dropout3d if images.ndim == 5 else F.dropout2d
        return self._decode([drop(skip, self.settings.unimatch_dropout) for skip in self._encode(images)])

    def _follow(self, outputs: list[Tensor] | Tensor, patches: Patches) -> Tensor:
        """How far the outputs are from sure pseudo-labels, at full resolution; 0 where none is sure."""
        logits, regions = full_resolution(outputs), self.label_manager.has_regions
        if self.settings.unimatch_loss == "dice_ce":
            return partial_dice_and_cross_entropy(logits, patches.labels, patches.counts, regions, over_all=True)
        return squared_dice_of_shown(logits, patches.labels, patches.counts, regions)
