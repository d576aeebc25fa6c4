"""nnU-Net on labeled images in the shapes of unlabeled ones: the trainer to start with."""

from __future__ import annotations

from nnunet_ssl.declared import Share, declared, setting
from nnunet_ssl.trainers.labeled_only import nnUNetTrainerLabeledOnly
from nnunet_ssl.trainers.settings import SSLSettings


@declared
class WarpsSettings(SSLSettings):
    """Half of the labeled patches are of warps."""

    warped_share: Share = setting(0.5, "As for all trainers")


class nnUNetTrainerWarps(nnUNetTrainerLabeledOnly):  # noqa: N801
    """nnU-Net on the labeled cases and on warps of them: labeled images registered onto unlabeled ones.

    Image and label are warped together, so the label is right even where the registration is not; what is new is the
    shape. Before the training starts, the warps are made that are missing (``nnUNetv2_ssl_warp`` makes them ahead).
    """

    paper = "registration as in Zhao et al., CVPR 2019 (there learned, here by demons)"
    Settings = WarpsSettings
    settings: WarpsSettings
