"""MiDSS: intermediate domains by copy-paste, and pseudo-labels of two contexts (Ma et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from nnunet_ssl.declared import Share, Weight, declared, setting
from nnunet_ssl.losses.partial import partial_dice_and_cross_entropy
from nnunet_ssl.losses.pseudo_labels import labels_and_confidence
from nnunet_ssl.trainers.base import Batch, Stream, full_resolution
from nnunet_ssl.trainers.mean_teacher import Taught, TeacherSettings
from nnunet_ssl.trainers.strong_view import StronglyViewed, StrongViewSettings
from nnunet_ssl.views.amplitude import amplitude_mixed
from nnunet_ssl.views.boxes import CUTMIX_SHARE, random_boxes, random_sides
from nnunet_ssl.views.mixing import Patches, exchanged, labeled_patches


@declared
class MiDSSSettings(StrongViewSettings, TeacherSettings):
    """Settings of MiDSS."""

    teacher_weight: Weight = setting(
        1.0, "Full weight w of the two mixes; that of the guided pseudo-labels is its square", symbol="w"
    )
    midss_threshold: Share = setting(0.95, "Probability from which a voxel's pseudo-label counts", symbol="tau")
    midss_amplitude: Share = setting(
        1.0, "Largest share of the unlabeled image's amplitudes in the labeled one's at the end; it grows from 0"
    )


class nnUNetTrainerMiDSS(StronglyViewed, Taught):  # noqa: N801
    """MiDSS: for unlabeled images from other domains than the labeled ones, by way of domains in between.

    Each labeled image, in the style of an unlabeled one, and a strong view of that exchange a box; the teacher labels
    what is unlabeled. It also sees both mixes of the weak views, and where it is sure in either context and says the
    same, the student learns this on the strong view.
    """

    paper = (
        "Ma et al., Constructing and Exploring Intermediate Domains in Mixed Domain Semi-supervised Medical Image "
        "Segmentation, CVPR 2024"
    )
    Settings = MiDSSSettings

    def term_weights(self) -> dict[str, float]:
        """w grows along a sigmoid."""
        weights = super().term_weights()
        return {**weights, "guided": weights["consistency"] ** 2}

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """A pass for the labels, one for each mix, one for the strong view."""
        self.start_teacher()
        yield {"sup": self.loss(self.forward("first", batch.labeled), batch.labeled.target)}

        regions, ignore_label = self.label_manager.has_regions, self.label_manager.ignore_label
        labeled = labeled_patches(batch.labeled.images, full_resolution(batch.labeled.target), regions, ignore_label)
        images = batch.unlabeled.images
        rng, patch_size = self.draws("midss"), images.shape[2:]
        boxes = random_boxes(rng, random_sides(rng, len(images), patch_size, CUTMIX_SHARE), patch_size, images.device)
        share = rng.uniform(0, self.settings.midss_amplitude * self.global_step / self.total_steps, len(images))

        unlabeled, guided = self._pseudo_labeled(images, labeled.images, boxes)
        strong = self.strong_view(images, rng)
        unlabeled, guided = unlabeled._replace(images=strong), guided._replace(images=strong)
        if self.settings.midss_amplitude:
            share = torch.from_numpy(share.astype(np.float32)).to(images.device, non_blocking=True)
            styled = amplitude_mixed(labeled.images, images, share)
            labeled = labeled._replace(images=self.strong_view.outside_stays_zero(styled, labeled.images))
        for mixed in exchanged(boxes, unlabeled, labeled):
            yield {"consistency": self._loss(mixed)}
        yield {"guided": self._loss(guided)}

    @torch.no_grad()
    def _pseudo_labeled(self, images: Tensor, labeled: Tensor, boxes: Tensor) -> tuple[Patches, Patches]:
        """What the teacher says of images, and where it says so in both contexts that boxes of labeled images make."""
        regions, threshold = self.label_manager.has_regions, self.settings.midss_threshold
        labels, confidence = labels_and_confidence(self.of_teacher(images), regions)
        around = self.of_teacher(torch.where(boxes, labeled, images))
        within = self.of_teacher(torch.where(boxes, images, labeled))
        labels_mixed, confidence_mixed = labels_and_confidence(torch.where(boxes, within, around), regions)
        sure = confidence > threshold
        agreed = sure & (confidence_mixed > threshold) & (labels == labels_mixed)
        self.log_value("midss_sure", sure.float().mean())
        self.log_value("midss_guided", agreed.float().mean())
        return Patches(images, labels, sure), Patches(images, labels_mixed, agreed)

    def _loss(self, patches: Patches) -> Tensor:
        """Dice and cross-entropy of what counts, at full resolution; the cross-entropy is a mean over all voxels."""
        logits = full_resolution(self.forward("first", Stream(patches.images, None)))
        regions = self.label_manager.has_regions
        return partial_dice_and_cross_entropy(logits, patches.labels, patches.counts, regions, over_all=True)
