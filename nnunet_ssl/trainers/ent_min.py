"""Entropy minimization (Grandvalet and Bengio, NeurIPS 2004; for segmentation Vu et al., ADVENT, CVPR 2019)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from nnunet_ssl.declared import Share, Weight, declared, setting
from nnunet_ssl.losses.entropy import entropy_of_logits
from nnunet_ssl.trainers.base import Batch, full_resolution, nnUNetTrainerSSL
from nnunet_ssl.trainers.settings import SSLSettings


@declared
class EntMinSettings(SSLSettings):
    """Settings of entropy minimization."""

    entmin_weight: Weight = setting(0.1, "Full weight of the entropy", symbol="lambda")
    entmin_rampup: Share = setting(1.0, "Share of the training over which the weight grows")
    entmin_on_labeled: bool = setting(True, "Whether the entropy of labeled images also counts")


class nnUNetTrainerEntMin(nnUNetTrainerSSL):  # noqa: N801
    """Entropy minimization: the network learns to be confident on unlabeled images.

    The entropy is a share of ln K, with K from the plans; ported code has the number of classes written out. It is
    taken at full resolution, on voxels with the ignore label too, since no label is asked. ADVENT's adversary is not
    here, as it is not in the code that papers compare with.
    """

    paper = (
        "Vu et al., ADVENT: Adversarial Entropy Minimization for Domain Adaptation in Semantic Segmentation, CVPR 2019"
    )
    Settings = EntMinSettings

    def term_weights(self) -> dict[str, float]:
        """lambda grows along a sigmoid."""
        weight = self.settings.entmin_weight * self.rampup(self.settings.entmin_rampup)
        return {**super().term_weights(), "entropy": weight}

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """A pass for each stream; the entropy is the mean over both."""
        on_labeled = self.settings.entmin_on_labeled
        outputs = self.forward("first", batch.labeled)
        terms = {"sup": self.loss(outputs, batch.labeled.target)}
        if on_labeled:
            terms["entropy"] = 0.5 * self._entropy(outputs)
        del outputs  # before the next forward: a local name keeps logits alive
        yield terms

        yield {"entropy": (0.5 if on_labeled else 1.0) * self._entropy(self.forward("first", batch.unlabeled))}

    def _entropy(self, outputs: list[Tensor] | Tensor) -> Tensor:
        return entropy_of_logits(full_resolution(outputs), self.label_manager.has_regions).mean()
