"""SKCDF: Semantic Knowledge Complementarity based Decoupling Framework (Zhang et al., CVPR 2025)."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nnunet_ssl.declared import Decay, Share, Weight, declared, setting
from nnunet_ssl.losses.class_balance import ClassBalance
from nnunet_ssl.losses.class_counts import class_counts
from nnunet_ssl.losses.masked import labels_and_valid
from nnunet_ssl.losses.partial import partial_dice_and_cross_entropy
from nnunet_ssl.losses.pseudo_labels import likeliest_class
from nnunet_ssl.networks.knowledge_exchange import ExchangingPath, KnowledgeExchange
from nnunet_ssl.networks.many_decoders import copied_decoder
from nnunet_ssl.trainers.base import Batch, Stream, full_resolution, nnUNetTrainerSSL
from nnunet_ssl.trainers.settings import SSLSettings


@declared
class SKCDFSettings(SSLSettings):
    """Settings of SKCDF."""

    skcdf_weight: Weight = setting(1.0, "Full weight of unlabeled images", symbol="w", paper=10.0)
    skcdf_rampup: Share = setting(1.0, "Share of the training over which that weight grows")
    skcdf_balanced: Weight = setting(1.0, "Weight of the balanced heads within both kinds of images")
    skcdf_decay: Decay = setting(
        0.99, "What a head keeps in a step beside its balanced head, and the unlabeled decoder beside the labeled one"
    )


class nnUNetTrainerSKCDF(nnUNetTrainerSSL):  # noqa: N801
    """SKCDF: one encoder with a decoder for labeled images and one for unlabeled ones, which learns its pseudo-labels.

    The labeled decoder sees bottlenecks that labeled and unlabeled images have exchanged. Each decoder has a second
    head that learns from class-balanced voxels. By a moving average a little of each balanced head goes into the head
    beside it, and of the labeled decoder into the unlabeled one, in each step.

    The unlabeled decoder is that of the plans' network, and it predicts, as in the paper; here it has no attention.
    """

    paper = (
        "Zhang et al., Semantic Knowledge Complementarity based Decoupling Framework for Semi-supervised "
        "Class-imbalanced Medical Image Segmentation, CVPR 2025"
    )
    Settings = SKCDFSettings
    supports_regions = False

    def tapped_networks(self) -> set[str]:
        """The balanced head reads the last decoder feature."""
        return super().tapped_networks() | {"first"}

    def build_training_modules(self) -> dict[str, nn.Module]:
        """The labeled decoder, the exchange, both balanced heads, and the classes' frequencies."""
        network = self.plans_network
        self.require_decoder(network, "to put a second decoder and balanced heads beside")
        dim = len(self.configuration_manager.patch_size)
        with self.seeded("exchange"):
            exchange = KnowledgeExchange(network.encoder.output_channels[-1], dim)
        return {
            **super().build_training_modules(),
            "decoder": copied_decoder(network),
            "exchange": exchange,
            "balanced": copy.deepcopy(network.decoder.seg_layers[-1]),
            "balanced_labeled": copy.deepcopy(network.decoder.seg_layers[-1]),
            "classes": ClassBalance(self.label_manager.num_segmentation_heads),
        }

    def networks(self) -> dict[str, nn.Module]:
        """The plans' network, and the same encoder with the labeled decoder."""
        exchange, decoder, balanced = (self.training_modules[n] for n in ("exchange", "decoder", "balanced_labeled"))
        return {**super().networks(), "labeled": ExchangingPath(self.plans_network, exchange, decoder, balanced)}

    def term_weights(self) -> dict[str, float]:
        """w grows along a sigmoid."""
        weight = self.settings.skcdf_weight * self.rampup(self.settings.skcdf_rampup)
        balanced = self.settings.skcdf_balanced
        return {
            **super().term_weights(),
            "sup_balanced": balanced,
            "pseudo": weight,
            "pseudo_balanced": weight * balanced,
        }

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """A pass of both kinds of images through the labeled decoder, one of unlabeled images through the other."""
        if self.global_step == 0:
            self._leak(0.0, [(labeled, own) for own, labeled in self._decoders()])  # -pretrained_weights are in by now
        classes: ClassBalance = self.training_modules["classes"]
        labels, valid = labels_and_valid(full_resolution(batch.labeled.target), self.label_manager.ignore_label)
        counts = class_counts(labels, self.label_manager.num_segmentation_heads, valid)
        classes.update(self.summed(counts), self.global_step)

        both = Stream(torch.cat([batch.labeled.images, batch.unlabeled.images]), None)
        outputs, balanced, of_unlabeled, balanced_of_unlabeled = self.forward("labeled", both)
        pseudo, pseudo_balanced = likeliest_class(full_resolution(of_unlabeled)), likeliest_class(balanced_of_unlabeled)
        drawn = classes.draw(labels)
        self.log_value("drawn", drawn.float().mean())
        terms = {
            "sup": self.loss(outputs, batch.labeled.target),
            "sup_balanced": partial_dice_and_cross_entropy(
                balanced, labels, drawn if valid is None else drawn & valid, over_all=True
            ),
        }
        del outputs, balanced, of_unlabeled, balanced_of_unlabeled  # before the next forward
        yield terms

        outputs, feature = self.forward_with_feature("first", batch.unlabeled)
        balanced = self.training_modules["balanced"](feature)
        drawn = classes.draw(pseudo_balanced, self.global_step / self.total_steps)
        yield {
            "pseudo": partial_dice_and_cross_entropy(
                full_resolution(outputs), pseudo, torch.ones_like(pseudo, dtype=torch.bool)
            ),
            "pseudo_balanced": partial_dice_and_cross_entropy(balanced, pseudo_balanced, drawn, over_all=True),
        }

    def after_step(self) -> None:
        """A little of each balanced head goes into its head, and of the labeled decoder into the unlabeled one."""
        super().after_step()
        modules, decay = self.training_modules, self.settings.skcdf_decay
        own, labeled = self.plans_network.decoder.seg_layers[-1], modules["decoder"].seg_layers[-1]
        self._leak(decay, pairs(own, modules["balanced"]) + pairs(labeled, modules["balanced_labeled"]))
        self._leak(decay, self._decoders())

    def _decoders(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Of the unlabeled and of the labeled decoder, balanced heads included."""
        modules = self.training_modules
        return pairs(self.plans_network.decoder, modules["decoder"]) + pairs(
            modules["balanced"], modules["balanced_labeled"]
        )

    @torch.no_grad()
    def _leak(self, decay: float, of_both: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Each first one becomes ``decay`` of itself and for the rest the second."""
        get_ema_multi_avg_fn(decay)(*map(list, zip(*of_both, strict=True)), None)


def pairs(module: nn.Module, other: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Parameters of one and of the other, for every one that the other has."""
    return [(module.get_parameter(name), parameter) for name, parameter in other.named_parameters()]
