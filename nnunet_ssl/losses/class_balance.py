"""Voxels drawn so that all classes have about as many: what the balanced heads of SKCDF learn from (CVPR 2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClassBalance(nn.Module):
    """How often voxels of a class are drawn: ``min n / n_c``, so that all have as many as there are of the rarest.

    n are means over the labeled patches so far. A class without voxels yet counts neither as the rarest, which would
    leave none of the others, nor is any of its voxels left out.

    Args:
        num_classes: K, with background.
    """

    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(num_classes))

    @torch.no_grad()
    def update(self, counts: Tensor, step: int) -> None:
        """Take the voxels of each class, ``[K]`` float32, of this step, a number from 0."""
        self.counts.lerp_(counts, 1 / (step + 1))

    def shares(self) -> Tensor:
        """``[K]`` float32 in (0, 1]."""
        known = self.counts > 0
        rarest = torch.where(known, self.counts, torch.inf).min()
        return torch.where(known, rarest / self.counts, 1.0)

    @torch.no_grad()
    def draw(self, labels: Tensor, progress: float = 1.0) -> Tensor:
        """Which voxels are drawn: of class c each with ``1 - progress (1 - share of c)``, all at first.

        Args:
            labels: int64 below K, of any shape.
            progress: from 0 to 1.

        Returns:
            bool of that shape.
        """
        probability = 1 - progress * (1 - self.shares())
        return torch.rand(labels.shape, device=labels.device) < probability[labels]
