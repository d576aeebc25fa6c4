"""The paired baseline of every semi-supervised trainer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from nnunet_ssl.trainers.base import Batch, nnUNetTrainerSSL


class nnUNetTrainerLabeledOnly(nnUNetTrainerSSL):  # noqa: N801
    """nnU-Net on the labeled cases alone: the paired baseline.

    The same loss, schedule and initial weights as nnU-Net's own trainer, and from one seed the same labeled batches in
    the same order as the semi-supervised trainers of this package.
    """

    paper = "Isensee et al., nnU-Net, Nature Methods 2021"
    uses_unlabeled = False

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """nnU-Net's own loss."""
        yield {"sup": self.loss(self.forward("first", batch.labeled), batch.labeled.target)}
