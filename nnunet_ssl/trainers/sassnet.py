"""SASSNet: Shape-aware Semi-supervised Segmentation (Li, Zhang, He, MICCAI 2020)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nnunet_ssl.declared import Count, Positive, Share, Weight, declared, setting
from nnunet_ssl.networks.discriminator import Discriminator
from nnunet_ssl.networks.frozen import frozen
from nnunet_ssl.trainers.base import Batch
from nnunet_ssl.trainers.dtc import DistanceSettings, RegressesDistances


@declared
class SASSNetSettings(DistanceSettings):
    """Settings of SASSNet."""

    sassnet_weight: Weight = setting(0.01, "Full weight of the adversarial term", symbol="lambda")
    sassnet_rampup: Share = setting(1.0, "Share of the training over which that weight grows")
    sassnet_width: Count = setting(
        64, "Channels of the discriminator's first layer; each further one has twice as many"
    )
    sassnet_lr: Positive = setting(1e-4, "Learning rate of the discriminator's Adam, constant")


class nnUNetTrainerSASSNet(RegressesDistances):  # noqa: N801
    """SASSNet: a discriminator makes distance maps of unlabeled images look like those of labeled ones.

    A discriminator sees images with their regressed maps and tells which are labeled. "Real" are the maps that the
    network regresses of labeled images, not those of the labels, as in the code. The segmentation predicts.

    The discriminator sees labeled patches alone that were drawn as unlabeled ones are, uniformly: of a batch nnU-Net
    forces the last ones to hold foreground, and by how much there is it could tell the streams apart.
    """

    paper = "Li et al., Shape-aware Semi-supervised 3D Semantic Segmentation for Medical Images, MICCAI 2020"
    Settings = SASSNetSettings

    def build_training_modules(self) -> dict[str, nn.Module]:
        """The regression head and the discriminator."""
        with self.seeded("discriminator"):
            patch_size, width = self.configuration_manager.patch_size, self.settings.sassnet_width
            discriminator = Discriminator(self.num_maps, self.num_input_channels, patch_size, width)
        return {**super().build_training_modules(), "discriminator": discriminator}

    def build_own_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The discriminator has Adam."""
        learning = self.training_modules["discriminator"].parameters()
        fused = self.device.type == "cuda" or None  # or the scaler waits for the device
        adam = torch.optim.Adam(learning, self.settings.sassnet_lr, betas=(0.9, 0.99), fused=fused)
        return {**super().build_own_optimizers(), "discriminator": adam}

    def term_weights(self) -> dict[str, float]:
        """lambda grows along a sigmoid."""
        weight = self.settings.sassnet_weight * self.rampup(self.settings.sassnet_rampup)
        return {**super().term_weights(), "adversarial": weight}

    @property
    def num_drawn_uniformly(self) -> int:
        """How many labeled patches of a batch nnU-Net does not force to hold foreground; all, where it forces all."""
        return round(self.batch_size * (1 - self.oversample_foreground_percent)) or self.batch_size

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """A pass for each stream, then the discriminator on what both have given."""
        discriminator = self.training_modules["discriminator"]
        outputs, of_labeled = self.run(batch.labeled)
        yield {
            "sup": self.loss(outputs, batch.labeled.target),
            "distance": self.distance_loss(of_labeled, batch.labeled.target),
        }
        del outputs  # before the next forward: a local name keeps logits alive
        of_labeled = of_labeled.detach()

        outputs, of_unlabeled = self.run(batch.unlabeled)
        del outputs
        discriminator.eval()  # without dropout it judges, and with it it learns
        with frozen(discriminator):
            adversarial, _ = discriminator.error(of_unlabeled, batch.unlabeled.images, labeled=True)
        discriminator.train()
        yield {"adversarial": adversarial}
        of_unlabeled = of_unlabeled.detach()

        n = self.num_drawn_uniformly
        error, right = discriminator.error(of_labeled[:n], batch.labeled.images[:n], labeled=True)
        error_unlabeled, right_unlabeled = discriminator.error(of_unlabeled, batch.unlabeled.images, labeled=False)
        self.log_value("discriminator_right", (right + right_unlabeled) / 2)
        yield {"discriminator": (error + error_unlabeled) / 2}
