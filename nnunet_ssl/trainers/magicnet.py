"""MagicNet: partition and recovery of cubes (Chen, Bai, Shen, Li, Yu, Wang, CVPR 2023)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_ssl.declared import Count, Counts, Decay, Positive, Share, Weight, Whole, declared, setting
from nnunet_ssl.errors import UserError
from nnunet_ssl.losses.class_counts import class_counts
from nnunet_ssl.losses.cubes import (
    blended_pseudo_labels,
    center_crop,
    class_weights,
    fits,
    legal_counts,
    location_loss,
    mix,
    partition,
    random_order,
    recover,
    reflect_pad,
    unmix,
)
from nnunet_ssl.losses.pseudo_labels import hard_pseudo_labels
from nnunet_ssl.losses.squared_dice import squared_dice_loss
from nnunet_ssl.networks.ema import noisy
from nnunet_ssl.networks.location_head import LocationHead
from nnunet_ssl.trainers.base import Batch, Stream, full_resolution
from nnunet_ssl.trainers.mean_teacher import WithTeacher
from nnunet_ssl.trainers.settings import SSLSettings


@declared
class MagicNetSettings(SSLSettings):
    """Settings of MagicNet. The five weights are the authors' times four, so that nnU-Net's own loss keeps weight 1."""

    magicnet_cubes: Counts = setting(
        (),
        "Cubes along each axis, for both branches; `[]` is up to three, as the patch and the network's strides allow. "
        "With `[1, 1, 1]`, a mean teacher remains",
        symbol="N",
    )
    magicnet_direct_weight: Weight = setting(1.0, "Weight of nnU-Net's loss on whole labeled patches", paper=0.25)
    magicnet_cross_weight: Weight = setting(
        1.0, "Weight of Dice on labeled patches whose cubes were exchanged across images", paper=0.25
    )
    magicnet_within_weight: Weight = setting(1.0, "Weight of Dice on labeled patches seen cube by cube", paper=0.25)
    magicnet_location_weight: Weight = setting(0.4, "Weight of the location of cubes", paper=0.1)
    magicnet_weight: Weight = setting(
        0.4, "Full weight of the consistency with the pseudo-labels", symbol="w", paper=0.1
    )
    magicnet_rampup: Share = setting(1.0, "Share of the training over which w grows")
    magicnet_ema_decay: Decay = setting(
        0.99, "Share of its weights that the teacher keeps per step; less in the first steps", symbol="alpha"
    )
    magicnet_noise: Weight = setting(
        0.1,
        "Standard deviation of the noise on the teacher's images, clipped at twice this value; 0 disables it. Images "
        "are normalized: 0.1 is small",
    )
    magicnet_blend_start: Whole = setting(100, "Steps before the pseudo-labels are blended")  # the histogram must fill
    magicnet_blend_temperature: Positive = setting(
        1.0, "Larger values take more of the rare classes from the cubes", symbol="T_dist"
    )
    # averages over 20 steps, the code's window
    magicnet_histogram_decay: Decay = setting(0.95, "Decay of the running class counts that give omega")
    magicnet_dice: Literal["nnunet", "squared"] = setting(
        "nnunet",
        "Dice of the cross, within and consistency terms: nnU-Net's, or Dice with squared denominators over all "
        "classes and the whole batch",
        paper="squared",
    )
    magicnet_mirroring: bool = setting(True, "nnU-Net's mirroring, in training and hence in prediction", paper=False)
    magicnet_location_dim: Count = setting(512, "Width of the location head", paper=4096)


class nnUNetTrainerMagicNet(WithTeacher):  # noqa: N801
    """MagicNet: patches as magic cubes that are taken apart, exchanged between images, and put together again.

    The student (the plans' network, which predicts) learns from whole patches, from patches whose cubes were exchanged
    across the labeled and unlabeled images (positions stay), and from cubes seen one by one. A head on the bottleneck
    tells where a cube was. Unlabeled images learn from the pseudo-labels of an EMA teacher, blended with what the
    student says of single cubes.

    The paper recovers embeddings and classifies them. nnU-Net's last layer, like the authors', acts on each voxel by
    itself, so recovering its logits is the same, and it holds less.

    Cubes are in one order everywhere, so two faults of the released code are not here: its cubes of "within" came back
    with their first and last axis swapped, and a fork blended unlabeled images with cubes of labeled ones.
    """

    paper = "Chen et al., MagicNet: Multi-Organ Segmentation via Magic-Cube Partition and Recovery, CVPR 2023"
    Settings = MagicNetSettings
    supports_regions = False
    settings: MagicNetSettings

    # ------------------------------------------------------------------ what is built

    def initialize(self) -> None:
        """Beside the whole network its two halves are run, on cubes; compiled as nnU-Net compiles."""
        super().initialize()
        self._encode, self._decode = (
            self.compiled(module) for module in (self.plans_network.encoder, self.plans_network.decoder)
        )

    @property
    def teacher_decay(self) -> float:
        """alpha."""
        return self.settings.magicnet_ema_decay

    def build_training_modules(self) -> dict[str, nn.Module]:
        """The teacher, with the class counts of its pseudo-labels, and the location head if there are cubes."""
        network = self.plans_network
        self.require_decoder(network, "to run on cubes")
        self._choose_cubes()
        modules = super().build_training_modules()
        modules["teacher"].register_buffer("class_counts", torch.zeros(self.label_manager.num_segmentation_heads))
        if (num_cubes := math.prod(self.within_counts)) > 1:
            with self.seeded("location"):
                modules["location"] = LocationHead(
                    network.encoder.output_channels[-1],
                    len(self.within_counts),
                    num_cubes,
                    self.settings.magicnet_location_dim,
                )
        return modules

    def _choose_cubes(self) -> None:
        """Counts across images, where the network sees whole patches, and within one, where it sees single cubes."""
        patch_size, wanted = list(self.configuration_manager.patch_size), list(self.settings.magicnet_cubes)
        stride = self.total_stride = [int(s) for s in np.prod(self.plans_network.encoder.strides, axis=0)]
        if not wanted:
            self.cross_counts = legal_counts(patch_size, [1] * len(patch_size))
            self.within_counts = legal_counts(patch_size, stride)
        elif len(wanted) == len(patch_size) and all(
            n == 1 or fits(n, length, s, padded=True) for n, length, s in zip(wanted, patch_size, stride, strict=True)
        ):
            self.cross_counts = self.within_counts = wanted
        else:
            raise UserError(
                f"magicnet_cubes {wanted} does not suit the patch {patch_size} of '{self.configuration_name}'; give a "
                f"divisor for each axis that leaves cubes of more than {by(stride)} voxels, the network's total "
                "stride, or [] for the default."
            )

        across, within = (
            [length // n for length, n in zip(patch_size, counts, strict=True)]
            for counts in (self.cross_counts, self.within_counts)
        )
        padded = [size + -size % s for size, s in zip(within, stride, strict=True)]
        message = f"across images {by(self.cross_counts)} cubes of {by(across)} voxels; within an image "
        if math.prod(self.within_counts) == 1:
            message += "none, so no location, and pseudo-labels are the teacher's alone"
        else:
            message += f"{by(self.within_counts)} cubes of {by(within)} voxels"
            if padded != within:
                message += f", reflected to {by(padded)} for the network's total stride {by(stride)}"
        self.print_to_log_file(f"MagicNet: {message}")

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:  # noqa: N802
        """nnU-Net's; without mirroring as nnU-Net's own nnUNetTrainerNoMirroring does it, in prediction too."""
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if not self.settings.magicnet_mirroring:
            mirror_axes = self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, mirror_axes

    # ------------------------------------------------------------------ the step

    def term_weights(self) -> dict[str, float]:
        """Constant weights, and w(t) of the consistency, which grows along a sigmoid."""
        settings = self.settings
        return {
            **super().term_weights(),
            "sup": settings.magicnet_direct_weight,
            "cross": settings.magicnet_cross_weight,
            "within": settings.magicnet_within_weight,
            "location": settings.magicnet_location_weight,
            "consistency": settings.magicnet_weight * self.rampup(settings.magicnet_rampup),
        }

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """Whole patches, cubes of labeled images, cubes of unlabeled images, exchanged cubes.

        The last pass holds a labeled and an unlabeled batch at once, and cannot be split: each mixed volume has
        voxels of several images, and each image's Dice needs its voxels from several mixed volumes.
        """
        labeled, unlabeled = batch
        self.start_teacher()

        # o = H(f(x))
        yield {"sup": self.loss(self.forward("first", labeled), labeled.target)}

        # o_w = H(recover(f(cubes)))
        target, of_cubes = full_resolution(labeled.target), None
        if "location" in self.training_modules:
            of_cubes, location = self._cube_by_cube(labeled.images)
            terms = {"within": self._dice(of_cubes, target), "location": location / 2}
            del of_cubes  # before the pass is backpropagated: a local name keeps logits alive
            yield terms
            of_cubes, location = self._cube_by_cube(unlabeled.images, decoder_learns=False)
            yield {"location": location / 2}

        # o_c = H(recover(f(exchanged cubes))); only this prediction of unlabeled images learns from pseudo-labels
        labels = self._pseudo_labels(unlabeled.images, of_cubes)
        del of_cubes
        of_labeled, of_unlabeled = self._exchanged(labeled.images, unlabeled.images)
        terms = {"cross": self._dice(of_labeled, target), "consistency": self._dice(of_unlabeled, labels)}
        del of_labeled, of_unlabeled
        yield terms

    def _cube_by_cube(self, images: Tensor, decoder_learns: bool = True) -> tuple[Tensor, Tensor]:
        """Each cube by itself through the student.

        Args:
            images: ``[B, C, *patch]``.
            decoder_learns: without it the decoder runs without gradient; the encoder learns from the location alone.

        Returns:
            Logits ``[B, K, *patch]``, put together from the cubes; the location loss.
        """
        cubes = partition(images, self.within_counts)
        of_image = cubes.shape[:2]
        skips = self._encode(reflect_pad(cubes.flatten(0, 1), self.total_stride))
        positions = self.training_modules["location"](skips[-1]).unflatten(0, of_image)
        right = positions.detach().argmax(2) == torch.arange(of_image[1], device=positions.device)
        self.log_value("location_accuracy", right.float().mean())
        location = location_loss(positions)
        with nullcontext() if decoder_learns else torch.no_grad():
            logits = center_crop(full_resolution(self._decode(skips)), cubes.shape[3:])
            return recover(logits.unflatten(0, of_image), self.within_counts), location

    def _exchanged(self, *images: Tensor) -> tuple[Tensor, ...]:
        """The student on patches with cubes exchanged between all images, its logits given back to their owners.

        Args:
            images: batches ``[B, C, *patch]`` that exchange with each other.

        Returns:
            Logits ``[B, K, *patch]`` for each batch.
        """
        batch_size, counts = len(images[0]), self.cross_counts
        cubes = partition(torch.cat(images), counts)
        order = random_order(*cubes.shape[:2], cubes.device)
        mixed = recover(mix(cubes, order), counts)
        # in batches of the size that the compiled network knows already
        outputs = (self.forward("first", Stream(part, None)) for part in mixed.split(batch_size))
        logits = torch.cat([full_resolution(output) for output in outputs])
        return recover(unmix(partition(logits, counts), order), counts).split(batch_size)

    @torch.no_grad()
    def _pseudo_labels(self, images: Tensor, of_cubes: Tensor | None) -> Tensor:
        """The teacher's hard decision on noisy images, blended with the student's on cubes of the same images."""
        settings, counts = self.settings, self.training_modules["teacher"].class_counts
        teacher_logits = self.forward("teacher", Stream(noisy(images, settings.magicnet_noise), None))
        labels = hard_pseudo_labels(teacher_logits)
        if of_cubes is not None and self.global_step >= settings.magicnet_blend_start:
            omega = class_weights(counts, settings.magicnet_blend_temperature)
            blended = blended_pseudo_labels(teacher_logits, labels, of_cubes, omega)
            self.log_value("blend_changed", (blended != labels).float().mean())
            labels = blended
        counts.lerp_(self.summed(class_counts(labels, len(counts))), 1 - settings.magicnet_histogram_decay)
        return labels

    def _dice(self, logits: Tensor, target: Tensor) -> Tensor:
        """Dice alone, at full resolution: nnU-Net's (which is negative) or the paper's."""
        loss, mask = self.full_resolution_loss, None
        if loss.ignore_label is not None:
            mask = target != loss.ignore_label
            target = torch.where(mask, target, 0)
        if self.settings.magicnet_dice == "squared":
            return squared_dice_loss(logits, target, mask)
        return loss.dc(logits, target, loss_mask=mask)


def by(sizes: list[int]) -> str:
    """``[2, 3]`` -> ``2 x 3``."""
    return " x ".join(map(str, sizes))
