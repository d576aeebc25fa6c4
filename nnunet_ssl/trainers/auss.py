"""AUSS: Anatomically-aware Uncertainty for Semi-supervised Segmentation (Adiga, Dolz, Lombaert, MedIA 2024)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nnunet_ssl.declared import Part, Weight, declared, setting
from nnunet_ssl.losses.masked import masked_mean
from nnunet_ssl.losses.pseudo_labels import labels_and_confidence
from nnunet_ssl.losses.ramps import sigmoid_rampup
from nnunet_ssl.losses.squared_dice import squared_dice_loss
from nnunet_ssl.networks.denoising_autoencoder import DenoisingAutoencoder
from nnunet_ssl.networks.ema import noisy
from nnunet_ssl.trainers.base import Batch, full_resolution
from nnunet_ssl.trainers.mean_teacher import MeanTeacherSettings, Taught
from nnunet_ssl.views.label_errors import with_errors
from nnunet_ssl.views.mixing import labeled_patches

NOISE = 0.1  # on the autoencoder's input, as the authors have it


@declared
class AUSSSettings(MeanTeacherSettings):
    """Settings of AUSS."""

    auss_share: Part = setting(
        0.2, "Share of the training in which the autoencoder learns, and the teacher does not yet teach"
    )
    auss_gamma: Weight = setting(
        1.0, "How much less a voxel counts where the teacher is implausible; 0 is Mean Teacher", symbol="gamma"
    )


class nnUNetTrainerAUSS(Taught):  # noqa: N801
    """AUSS: a mean teacher, followed only where an autoencoder finds its segmentation plausible.

    First the autoencoder learns to undo errors that labels of the training patches are given. Then it is frozen, and
    the student approaches the teacher on all patches, less where the autoencoder would correct the teacher.
    """

    paper = (
        "Adiga et al., Anatomically-aware Uncertainty for Semi-supervised Image Segmentation, Medical Image Analysis "
        "2024"
    )
    Settings = AUSSSettings

    def build_training_modules(self) -> dict[str, nn.Module]:
        """The teacher and the autoencoder."""
        with self.seeded("autoencoder"):
            heads, patch_size = self.label_manager.num_segmentation_heads, self.configuration_manager.patch_size
            autoencoder = DenoisingAutoencoder(heads, patch_size)
        return {**super().build_training_modules(), "autoencoder": autoencoder}

    @property
    def first_steps(self) -> float:
        """Steps in which the autoencoder learns."""
        return self.settings.auss_share * self.total_steps

    def term_weights(self) -> dict[str, float]:
        """The weight grows along a sigmoid, from when the autoencoder is frozen."""
        after, length = self.global_step - self.first_steps, self.total_steps - self.first_steps
        weight = self.settings.teacher_weight * sigmoid_rampup(after, self.settings.teacher_rampup * length)
        return {**super().term_weights(), "consistency": weight if after >= 0 else 0.0}

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """A pass for the labels, then one of the autoencoder or one of unlabeled images."""
        self.start_teacher()
        learns = self.global_step < self.first_steps
        self.training_modules["autoencoder"].train(learns)  # each step, since each epoch the base says train()

        target = full_resolution(batch.labeled.target)
        regions, ignore_label = self.label_manager.has_regions, self.label_manager.ignore_label
        # before the loss, which may overwrite what is ignored
        _, labels, valid = labeled_patches(batch.labeled.images, target, regions, ignore_label)
        masks = self._masks(labels)
        outputs = self.forward("first", batch.labeled)
        terms = {"sup": self.loss(outputs, batch.labeled.target)}
        if learns:
            del outputs
            yield terms
            yield {"autoencoder": self._of_autoencoder(masks, valid)}
            return
        terms["consistency"] = 0.5 * self._consistency(outputs, batch.labeled.images)
        del outputs  # before the next forward: a local name keeps logits alive
        yield terms

        outputs = self.forward("first", batch.unlabeled)
        yield {"consistency": 0.5 * self._consistency(outputs, batch.unlabeled.images)}

    def _of_autoencoder(self, masks: Tensor, valid: Tensor) -> Tensor:
        """Half of the mean squared error and the Dice loss of labels that it is given with errors."""
        regions = self.label_manager.has_regions
        errors = with_errors(masks, self.draws("errors"), self.configuration_manager.spacing, not regions)
        logits = self.training_modules["autoencoder"](noisy(errors.float(), NOISE)).float()
        valid = valid.expand_as(masks)
        squared = masked_mean((logits.sigmoid() - masks.float()).square(), valid)
        foreground = slice(None) if regions else slice(1, None)
        dice = squared_dice_loss(*(x[:, foreground] for x in (logits, masks, valid)), smooth=1e-5, regions=True)
        return 0.5 * (squared + dice)

    def _consistency(self, outputs: list[Tensor] | Tensor, images: Tensor) -> Tensor:
        """``sum m (p_student - p_teacher)^2 / sum m`` over voxels and classes, 0-dim float32."""
        teacher = self.of_teacher(noisy(images, self.settings.teacher_noise))
        with torch.no_grad():
            masks = self._masks(labels_and_confidence(teacher, self.label_manager.has_regions)[0])
            plausible = self.training_modules["autoencoder"](masks.float()).float().sigmoid()
            weights = (-self.settings.auss_gamma * (plausible - teacher).square()).exp()  # m
        self.log_value("teacher_believed", weights.mean())
        return (weights * (self.probabilities(outputs) - teacher).square()).sum() / weights.sum()

    def _masks(self, labels: Tensor) -> Tensor:
        """Labels ``[B, 1, *patch]`` as masks ``[B, K, *patch]``, bool, background first; of regions they are masks."""
        if self.label_manager.has_regions:
            return labels
        heads = self.label_manager.num_segmentation_heads
        masks = torch.zeros(len(labels), heads, *labels.shape[2:], dtype=torch.bool, device=labels.device)
        return masks.scatter_(1, labels.long(), True)
