"""SS-Net: Smoothness and class Separation (Wu, Wu, Wu, Ge, Cai, MICCAI 2022)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_ssl.declared import Positive, Share, Weight, declared, setting
from nnunet_ssl.losses.pseudo_labels import likeliest_class
from nnunet_ssl.losses.squared_dice import squared_dice_to_soft_labels
from nnunet_ssl.networks.frozen import frozen
from nnunet_ssl.networks.prototype_head import PrototypeHead
from nnunet_ssl.trainers.base import Batch, Stream, full_resolution, nnUNetTrainerSSL
from nnunet_ssl.trainers.settings import SSLSettings


@declared
class SSNetSettings(SSLSettings):
    """Settings of SS-Net."""

    ssnet_weight: Weight = setting(1.0, "Full weight of smoothness, and with the next setting of separation")
    ssnet_rampup: Share = setting(0.4, "Share of the training over which that weight grows")
    ssnet_separation: Weight = setting(0.1, "Weight of separation within that weight")
    ssnet_noise: Positive | None = setting(
        None,
        "Root mean square of the adversarial noise on images, which are normalized; `null` is 0.01 in 3D and 0.1 in 2D",
        symbol="epsilon",
    )


class nnUNetTrainerSSNet(nnUNetTrainerSSL):  # noqa: N801
    """SS-Net: predictions withstand adversarial noise, and voxel features stay near the prototypes of their class.

    Smoothness is virtual adversarial training: noise in the direction that changes the prediction most. Separation
    pulls the embeddings of voxels to those of labeled voxels that the network has right.
    """

    paper = (
        "Wu et al., Exploring Smoothness and Class-Separation for Semi-supervised Medical Image Segmentation, "
        "MICCAI 2022"
    )
    Settings = SSNetSettings
    supports_regions = False

    def initialize(self) -> None:
        """As the base; then how far the noise goes, and what it is measured by."""
        super().initialize()
        patch = self.configuration_manager.patch_size
        self.noise = self.settings.ssnet_noise or {2: 0.1, 3: 0.01}[len(patch)]
        self.disagreement = self.compiled(squared_dice_to_soft_labels)

    def tapped_networks(self) -> set[str]:
        """Embeddings are of the last decoder feature, of both streams."""
        return super().tapped_networks() | {"first"}

    def build_training_modules(self) -> dict[str, nn.Module]:
        """The head with the prototypes."""
        self.require_decoder(self.plans_network, "to embed the last feature of")
        channels = self.plans_network.decoder.seg_layers[-1].in_channels
        with self.seeded("prototypes"):
            head = PrototypeHead(channels, self.label_manager.num_segmentation_heads)
        return {**super().build_training_modules(), "prototypes": head}

    def term_weights(self) -> dict[str, float]:
        """Both grow along a sigmoid."""
        weight = self.settings.ssnet_weight * self.rampup(self.settings.ssnet_rampup)
        return {**super().term_weights(), "smoothness": weight, "separation": self.settings.ssnet_separation * weight}

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """For each stream a pass, and one of its images with noise; smoothness is the mean over both."""
        head: PrototypeHead = self.training_modules["prototypes"]
        for stream in batch:
            outputs, feature = self.forward_with_feature("first", stream)
            before = self.probabilities(outputs).detach()
            labels, terms = likeliest_class(before), {}
            if stream.target is not None:
                terms["sup"] = self.loss(outputs, stream.target)
                predicted, labels = labels, full_resolution(stream.target)
                head.remember(feature, torch.where(predicted == labels, labels, 0))
            terms["separation"] = head(feature, labels)
            del outputs, feature  # before the next forward: a local name keeps maps alive
            yield terms
            yield {"smoothness": 0.5 * self._smoothness(stream.images, before)}

    def _smoothness(self, images: Tensor, before: Tensor) -> Tensor:
        """L_lds: how far noise moves the probabilities ``before``, in the direction in which they move most.

        One power step: the gradient of that distance at random noise, to the noise alone.
        """
        radius = self.noise * math.sqrt(images[0].numel())
        direction = unit(torch.rand_like(images) - 0.5).requires_grad_()
        with frozen(self.plans_network):
            moved = self._distance(images + radius * direction, before)
        if self.grad_scaler is not None:  # or it would underflow; the norm below takes the scale away
            moved = self.grad_scaler.scale(moved)
        (direction,) = torch.autograd.grad(moved, direction)
        return self._distance(images + radius * unit(direction), before)

    def _distance(self, images: Tensor, before: Tensor) -> Tensor:
        return self.disagreement(full_resolution(self.forward("first", Stream(images, None))), before)


def unit(noise: Tensor) -> Tensor:
    """Each sample of ``[B, ...]`` with an L2 norm of 1; 0 if it is not finite, as after an overflow."""
    finite = noise.flatten(1).nan_to_num(0.0, 0.0, 0.0)
    return F.normalize(finite, eps=torch.finfo(finite.dtype).tiny).view_as(noise)
