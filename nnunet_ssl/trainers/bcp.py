"""BCP: Bidirectional Copy-Paste (Bai et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_ssl.declared import Part, Share, Weight, declared, setting
from nnunet_ssl.losses.components import largest_of_each_class
from nnunet_ssl.losses.partial import partial_dice_and_cross_entropy
from nnunet_ssl.losses.pseudo_labels import labels_and_confidence
from nnunet_ssl.trainers.base import Batch, Stream, full_resolution
from nnunet_ssl.trainers.mean_teacher import Taught, TeacherSettings
from nnunet_ssl.views.boxes import random_boxes
from nnunet_ssl.views.mixing import Patches, exchanged, labeled_patches, pasted, rolled


@declared
class BCPSettings(TeacherSettings):
    """Settings of BCP."""

    teacher_weight: Weight = setting(0.5, "Full weight of voxels with pseudo-labels", symbol="alpha")
    teacher_rampup: Share = setting(0.0, "Share of the training over which that weight grows; BCP has none")
    bcp_pretraining: Share = setting(0.25, "Share of the training in which labeled images alone are mixed")
    bcp_side: Part = setting(0.667, "Side of the box, as a share of the patch's", symbol="beta")
    bcp_largest_component: bool = setting(
        True, "Pseudo-labels keep the largest component of each class; `false` where a class has several parts"
    )


class nnUNetTrainerBCP(Taught):  # noqa: N801
    """BCP: labeled and unlabeled images swap a box, and the labels and the teacher's pseudo-labels swap with them.

    At first labeled images are mixed with each other, and no unlabeled image is used; then the teacher starts as the
    student. Every image is in a mixed one twice, once within the box and once around it. All is learned with the code's
    Dice and cross-entropy, part by part, at each resolution with nnU-Net's weights.
    """

    paper = "Bai et al., Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation, CVPR 2023"
    Settings = BCPSettings

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """One pass of labeled images at first, then one for each direction."""
        regions, ignore_label = self.label_manager.has_regions, self.label_manager.ignore_label
        labeled = labeled_patches(batch.labeled.images, full_resolution(batch.labeled.target), regions, ignore_label)
        boxes = self._boxes(labeled.images)
        start = round(self.settings.bcp_pretraining * self.total_steps)
        if self.global_step < start:
            mixed = pasted(boxes, rolled(labeled), labeled)
            yield {"sup": self._loss(self.forward("first", Stream(mixed.images, None)), mixed.labels, mixed.counts)}
            return

        self.start_teacher(start)
        unlabeled = self._pseudo_labeled(batch.unlabeled.images)
        mixed_pair = exchanged(boxes, labeled, unlabeled)
        del labeled, unlabeled
        for mixed, with_labels in zip(mixed_pair, (~boxes, boxes), strict=True):
            outputs = self.forward("first", Stream(mixed.images, None))
            terms = {
                "sup": 0.5 * self._loss(outputs, mixed.labels, mixed.counts & with_labels),
                "consistency": 0.5 * self._loss(outputs, mixed.labels, mixed.counts & ~with_labels),
            }
            del outputs  # before the pass is backpropagated: a local name keeps logits alive
            yield terms

    def _boxes(self, images: Tensor) -> Tensor:
        """A box for each pair of images ``[B, C, *patch]``, all of one size."""
        patch_size = images.shape[2:]
        side = np.maximum((self.settings.bcp_side * np.array(patch_size)).astype(int), 1)
        return random_boxes(self.draws("box"), np.tile(side, (len(images), 1)), patch_size, images.device)

    def _pseudo_labeled(self, images: Tensor) -> Patches:
        """The teacher's hard decision on images ``[B, C, *patch]``, of each class the largest component."""
        regions = self.label_manager.has_regions
        labels, _ = labels_and_confidence(self.of_teacher(images), regions)
        if self.settings.bcp_largest_component:
            labels = largest_of_each_class(labels, self.label_manager.num_segmentation_heads, regions)
        return Patches(images, labels, torch.ones_like(labels[:, :1], dtype=torch.bool))

    def _loss(self, outputs: list[Tensor] | Tensor, labels: Tensor, counts: Tensor) -> Tensor:
        """Dice and cross-entropy of the voxels that count, at each resolution."""
        if not self.enable_deep_supervision:
            return partial_dice_and_cross_entropy(outputs, labels, counts, self.label_manager.has_regions)

        def scaled(x: Tensor, like: Tensor) -> Tensor:  # as nnU-Net scales its targets
            return (
                x
                if x.shape[2:] == like.shape[2:]
                else F.interpolate(x.float(), like.shape[2:], mode="nearest-exact").to(x.dtype)
            )

        return sum(
            weight
            * partial_dice_and_cross_entropy(
                logits, scaled(labels, logits), scaled(counts, logits), self.label_manager.has_regions
            )
            for logits, weight in zip(outputs, self.loss.weight_factors, strict=True)
            if weight
        )
