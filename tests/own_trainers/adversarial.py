"""A user's own trainer, in a folder of ``nnUNet_extTrainer``: a toy whose adversary has an optimizer of its own.

It reads the last decoder feature of both streams. A discriminator tells whether a voxel's feature is of a labeled
image; the network shall give unlabeled images features that pass for labeled ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_ssl.networks.frozen import frozen
from nnunet_ssl.trainers.base import Batch, nnUNetTrainerSSL


class nnUNetTrainerAdversarial(nnUNetTrainerSSL):  # noqa: N801
    """Features of unlabeled images that a discriminator takes for those of labeled ones."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  (nnU-Net's own signature)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 7  # as users write it; _<N>epochs says otherwise

    def build_training_modules(self) -> dict[str, nn.Module]:
        channels = self.plans_network.decoder.seg_layers[-1].in_channels
        with self.seeded("discriminator"):
            discriminator = nn.Sequential(nn.Linear(channels, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
        return {**super().build_training_modules(), "discriminator": discriminator}

    def build_own_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        learning = self.training_modules["discriminator"].parameters()
        return {**super().build_own_optimizers(), "discriminator": torch.optim.Adam(learning, 1e-3)}

    def tapped_networks(self) -> set[str]:
        return super().tapped_networks() | {"first"}

    def term_weights(self) -> dict[str, float]:
        return {**super().term_weights(), "adversarial": 0.1}

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        outputs, labeled = self.forward_with_feature("first", batch.labeled)
        yield {"sup": self.loss(outputs, batch.labeled.target)}
        labeled = labeled.detach()
        del outputs

        _, unlabeled = self.forward_with_feature("first", batch.unlabeled)
        with frozen(self.training_modules["discriminator"]):
            adversarial = self._error(unlabeled, 1.0)
        yield {"adversarial": adversarial}
        yield {"discriminator": (self._error(labeled, 1.0) + self._error(unlabeled.detach(), 0.0)) / 2}

    def _error(self, feature: Tensor, labeled: float) -> Tensor:
        said = self.training_modules["discriminator"](feature.movedim(1, -1)).float()
        return F.binary_cross_entropy_with_logits(said, torch.full_like(said, labeled))
