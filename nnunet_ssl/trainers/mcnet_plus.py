"""MC-Net+: Mutual Consistency Network (Wu, Ge, Zhang, Xu, Zhang, Xia, Cai, MedIA 2022)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from nnunet_ssl.declared import Positive, Share, Weight, declared, setting
from nnunet_ssl.losses.consistency import pseudo_label_consistency
from nnunet_ssl.networks.many_decoders import ManyDecoders, resampling_decoder
from nnunet_ssl.trainers.base import Batch, full_resolution, nnUNetTrainerSSL
from nnunet_ssl.trainers.settings import SSLSettings

DECODERS = ("linear", "nearest")  # beside the plans' own; each by its interpolation
# of the authors' scripts, for images of two and three dimensions
PUBLISHED = {
    2: {"mcnet_supervised": 1.0, "mcnet_weight": 0.1, "mcnet_rampup": 1.0},
    3: {"mcnet_supervised": 0.5, "mcnet_weight": 1.0, "mcnet_rampup": 0.4},
}


@declared
class MCNetPlusSettings(SSLSettings):
    """Settings of MC-Net+."""

    mcnet_supervised: Weight | None = setting(
        None, "Weight of each decoder's loss on labels; `null` is 0.5 in 3D and 1 in 2D", symbol="lambda"
    )
    mcnet_weight: Weight | None = setting(
        None, "Full weight of the mutual consistency; `null` is 1 in 3D and 0.1 in 2D", symbol="beta"
    )
    mcnet_rampup: Share | None = setting(
        None, "Share of the training over which that weight grows; `null` is 0.4 in 3D and 1 in 2D"
    )
    mcnet_temperature: Positive = setting(0.1, "Temperature of the sharpening", symbol="T")
    mcnet_detach_target: bool = setting(False, "No gradient through the sharpened target")


class nnUNetTrainerMCNetPlus(nnUNetTrainerSSL):  # noqa: N801
    """MC-Net+: three decoders that upsample in different ways learn each other's sharpened predictions.

    Each decoder approaches the sharpened probabilities of each other one, at full resolution. The plans' own network,
    with transposed convolutions, predicts; the other two decoders are of training alone.
    """

    paper = "Wu et al., Mutual Consistency Learning for Semi-supervised Medical Image Segmentation, MedIA 2022"
    Settings = MCNetPlusSettings

    def initialize(self) -> None:
        """As the base; then the weights, and the consistency, compiled."""
        super().initialize()
        published = PUBLISHED[len(self.configuration_manager.patch_size)]
        given = {name: getattr(self.settings, name) for name in published}
        self.weights = {name: published[name] if value is None else value for name, value in given.items()}
        self.consistency = self.compiled(pseudo_label_consistency)

    def build_training_modules(self) -> dict[str, nn.Module]:
        """The further decoders."""
        self.require_decoder(self.plans_network, "to put further decoders beside")
        modules = super().build_training_modules()
        for mode in DECODERS:
            with self.seeded("decoder", mode):
                modules[f"decoder_{mode}"] = resampling_decoder(self.plans_network, mode)
        return modules

    def networks(self) -> dict[str, nn.Module]:
        """The plans' network, run together with the further decoders."""
        decoders = {mode: self.training_modules[f"decoder_{mode}"] for mode in DECODERS}
        return {**super().networks(), "first": ManyDecoders(self.plans_network, decoders)}

    def term_weights(self) -> dict[str, float]:
        """lambda for each decoder; beta grows along a sigmoid."""
        of_decoders = ["sup", *(f"sup_{mode}" for mode in DECODERS)]
        supervised = dict.fromkeys(of_decoders, self.weights["mcnet_supervised"])
        weight = self.weights["mcnet_weight"] * self.rampup(self.weights["mcnet_rampup"])
        return {**super().term_weights(), **supervised, "mutual": weight}

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """A pass for each stream, of all decoders; the consistency is the mean over both."""
        for stream in batch:
            outputs = self.forward("first", stream)
            terms = {}
            if stream.target is not None:
                for name, of_decoder in outputs.items():
                    terms["sup" if name == "own" else f"sup_{name}"] = self.loss(of_decoder, stream.target)
            terms["mutual"] = 0.5 * self.consistency(
                [full_resolution(of_decoder) for of_decoder in outputs.values()],
                self.settings.mcnet_temperature,
                self.settings.mcnet_detach_target,
                self.label_manager.has_regions,
            )
            del outputs  # before the next forward: a local name keeps logits alive
            yield terms
