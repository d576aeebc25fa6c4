"""nnU-Net on labelled images in the shapes of unlabelled ones: the trainer to start with."""

from __future__ import annotations

from nnunet_ssl.declared import Share, declared, setting
from nnunet_ssl.trainers.labeled_only import nnUNetTrainerLabeledOnly
from nnunet_ssl.trainers.settings import SSLSettings


@declared
class WarpsSettings(SSLSettings):
    """Half of the labelled patches are of warps."""

    warped_share: Share = setting(0.5, "As for all trainers")


class nnUNetTrainerWarps(nnUNetTrainerLabeledOnly):  # noqa: N801
    """nnU-Net on the labelled cases and on warps of them: labelled images registered onto unlabelled ones.

    Image and label are warped together, so the label is right even where the registration is not; what is new is the
    shape. Before the training starts, the warps are made that are missing (``nnUNetv2_ssl_warp`` makes them ahead).
    """

    paper = "registration as in Zhao et al., CVPR 2019 (there learned, here by demons)"
    Settings = WarpsSettings
    settings: WarpsSettings
