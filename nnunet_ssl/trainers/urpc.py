"""URPC: Uncertainty Rectified Pyramid Consistency (Luo et al., MICCAI 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor

from nnunet_ssl.declared import Decays, Share, TwoOrMore, Weight, declared, setting
from nnunet_ssl.errors import UserError
from nnunet_ssl.losses.urpc import uncertainty_rectified_consistency
from nnunet_ssl.networks.dropout import drop_channels_in_training
from nnunet_ssl.trainers.base import Batch, nnUNetTrainerSSL
from nnunet_ssl.trainers.settings import SSLSettings


@declared
class URPCSettings(SSLSettings):
    """Settings of URPC."""

    urpc_weight: Weight = setting(0.1, "Full weight of the consistency", symbol="lambda")
    urpc_rampup: Share = setting(1.0, "Share of the training over which the weight grows")
    urpc_scales: TwoOrMore = setting(
        4, "Number of resolutions that should agree; fewer if the network has fewer", symbol="S"
    )
    urpc_kl: Literal["mean_to_scale", "scale_to_mean"] = setting(
        "mean_to_scale",
        'Uncertainty: KL(pbar, p_s) as in the code; `"scale_to_mean"` is KL(p_s, pbar), as the paper writes it',
    )
    urpc_detach_mean: bool = setting(False, "No gradient through the mean of the scales")
    urpc_dropout: Decays = setting(
        (),
        "Dropout of whole channels before the heads of the scales, from deep to shallow, in training only; a shorter "
        "list applies to the shallowest scales",
        paper=(0.5, 0.3, 0.2, 0.1),
    )


class nnUNetTrainerURPC(nnUNetTrainerSSL):  # noqa: N801
    """URPC: one network whose predictions at several resolutions must agree on unlabeled images.

    The pyramid is nnU-Net's deep supervision: its outputs at the highest resolutions. The lowest, to which nnU-Net
    gives no weight, is left out; in a network of three stages, which has two outputs, it is part of the pyramid and
    gets half the weight of the other, so that every scale of the pyramid learns from labels.

    Departures from the authors' code: labels are compared with each scale at its own resolution and with nnU-Net's
    loss and weights, where the code interpolates all predictions and weights them alike. Dropout, if asked for, is
    before the heads, so that deeper scales do not add theirs to the shallower.

    Raises:
        UserError: at the start, for a network without two outputs, or dropout without ``decoder.seg_layers``.
    """

    paper = (
        "Luo et al., Efficient Semi-supervised Gross Target Volume of Nasopharyngeal Carcinoma Segmentation via "
        "Uncertainty Rectified Pyramid Consistency, MICCAI 2021"
    )
    Settings = URPCSettings

    def initialize(self) -> None:
        """As the base; then the pyramid, its consistency and the dropout before its heads."""
        super().initialize()
        outputs = len(self._get_deep_supervision_scales() or [])
        if outputs < 2:
            raise UserError(
                f"{type(self).__name__} compares a network's outputs at several resolutions, and the one of "
                f"'{self.configuration_name}' in {self.plans_manager.plans_name} gives {max(outputs, 1)}; use plans "
                "with at least three stages, with deep supervision, or nnUNetTrainerCPS."
            )
        self.consistency = self.compiled(uncertainty_rectified_consistency)
        self.num_scales = max(2, min(self.settings.urpc_scales, outputs - 1))
        if self.num_scales == outputs:
            self.loss = DeepSupervisionWrapper(self.full_resolution_loss, (2 / 3, 1 / 3))
        if self.settings.urpc_dropout:
            self._drop_features()

    def _drop_features(self) -> None:
        heads = getattr(getattr(self.plans_network, "decoder", None), "seg_layers", None)
        if heads is None:
            raise UserError(
                f"urpc_dropout cannot be used with the {type(self.plans_network).__name__} of "
                f"{self.plans_manager.plans_name}, which has no decoder.seg_layers; set it to []."
            )
        full_resolution_first = list(heads)[::-1][: self.num_scales]
        for head, p in zip(full_resolution_first, reversed(self.settings.urpc_dropout), strict=False):
            # before other hooks, so that what reads the head's input sees what the head sees
            head.register_forward_pre_hook(partial(drop_channels_in_training, p), prepend=True)

    def term_weights(self) -> dict[str, float]:
        """lambda grows along a sigmoid."""
        weight = self.settings.urpc_weight * self.rampup(self.settings.urpc_rampup)
        return {**super().term_weights(), "urpc": weight}

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """A pass for the labels, one for the consistency on unlabeled images."""
        yield {"sup": self.loss(self.forward("first", batch.labeled), batch.labeled.target)}

        pyramid = self.forward("first", batch.unlabeled)[: self.num_scales]
        settings, regions = self.settings, self.label_manager.has_regions
        consistency = self.consistency(pyramid, settings.urpc_kl, settings.urpc_detach_mean, regions)
        del pyramid  # before the pass is backpropagated: a local name keeps logits alive
        yield {"urpc": consistency}
