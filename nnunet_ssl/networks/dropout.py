"""Dropout where nnU-Net's networks have none."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def drop_channels_in_training(p: float, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
    """A forward pre-hook: dropout of whole channels of ``[B, C, *spatial]`` while ``module`` is in training.

    Args:
        p: probability that a channel is dropped; the others are scaled up.
        module: whose input is changed.
        inputs: its one input.
    """
    if not module.training:
        return None
    (feature,) = inputs
    return (F.dropout3d if feature.ndim == 5 else F.dropout2d)(feature, p)
