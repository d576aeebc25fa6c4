"""SS-Net's training-only head: embeddings of voxels, and a memory of prototypes of each class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnunet_ssl.losses.prototypes import draw_of_each_class, prototype_loss

DIM = 32
PROTOTYPES = 32  # of each class
VOXELS = 1024  # of each class, drawn from each stream


class PrototypeHead(nn.Module):
    """A projection, a prediction on it, and for each foreground class two selectors that weigh voxels and prototypes.

    Runs in fp32 under autocast. The prototypes are buffers, so they are saved and resumed as the weights are.

    Source: the authors' code of SS-Net, with LayerNorm for their BatchNorm1d: a class that is not in the batch has
    voxels of others here, which must not reach the others' statistics.

    Args:
        in_channels: C of the decoder feature.
        num_classes: K, with background, which has no prototypes.
    """

    prototypes: Tensor
    known: Tensor

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.project = two_layers(in_channels, DIM, nn.ReLU())
        self.predict = two_layers(DIM, DIM, nn.ReLU())
        self.weigh_voxels, self.weigh_prototypes = (
            nn.ModuleList(two_layers(DIM, 1, nn.LeakyReLU(0.2)) for _ in range(num_classes - 1)) for _ in range(2)
        )
        self.register_buffer("prototypes", torch.zeros(num_classes - 1, PROTOTYPES, DIM))
        self.register_buffer("known", torch.zeros(num_classes - 1, dtype=torch.bool))

    @torch.no_grad()
    def remember(self, feature: Tensor, labels: Tensor) -> None:
        """Replace the prototypes of every class that there is by its voxels that the selector values most.

        Args:
            feature: ``[B, C, *patch]``.
            labels: ``[B, 1, *patch]`` integer, 0 where the network is wrong.
        """
        with torch.autocast(feature.device.type, enabled=False):
            index, present = draw_of_each_class(labels, self.num_classes, VOXELS)
            z = self.project(voxels(feature, index))
            value = scores(self.weigh_voxels, z)
            again = index[:, 1:] == index[:, :-1]  # the same voxel: a prototype again only where there are too few
            value[:, 1:] = torch.where(again, -torch.inf, value[:, 1:])
            best = value.topk(PROTOTYPES, 1).indices
            z = z.gather(1, best[..., None].expand(-1, -1, DIM))
            self.prototypes.copy_(torch.where(present[:, None, None], z, self.prototypes))
            self.known |= present

    def forward(self, feature: Tensor, labels: Tensor) -> Tensor:
        """L_cl of voxels with labels or pseudo-labels.

        Args:
            feature: ``[B, C, *patch]``, the last decoder feature, any float type.
            labels: ``[B, 1, *patch]`` integer. Values outside ``1 .. K - 1`` take no part.

        Returns:
            0-dim float32.
        """
        with torch.autocast(feature.device.type, enabled=False):
            index, present = draw_of_each_class(labels, self.num_classes, VOXELS)
            h = self.predict(self.project(voxels(feature, index)))
            a = with_mean_one(scores(self.weigh_voxels, h.detach()).sigmoid())
            b = with_mean_one(scores(self.weigh_prototypes, self.prototypes).sigmoid())
            return prototype_loss(h, self.prototypes, a, b, present & self.known)


def two_layers(in_channels: int, out_channels: int, nonlinearity: nn.Module) -> nn.Module:
    """Of width ``DIM`` in between."""
    return nn.Sequential(nn.Linear(in_channels, DIM), nn.LayerNorm(DIM), nonlinearity, nn.Linear(DIM, out_channels))


def voxels(feature: Tensor, index: Tensor) -> Tensor:
    """The features ``[..., C]``, float32, at places of the flattened batch and patch of ``[B, C, *patch]``."""
    lines = feature.flatten(2)
    return lines[index // lines.shape[2], :, index % lines.shape[2]].float()


def scores(selectors: nn.ModuleList, x: Tensor) -> Tensor:
    """What the selector of each class says: ``[K - 1, M, D]`` -> ``[K - 1, M]``."""
    return torch.stack([selector(of_class)[:, 0] for selector, of_class in zip(selectors, x, strict=True)])


def with_mean_one(weights: Tensor) -> Tensor:
    """Scaled so that the mean over the last dim is 1."""
    return weights / weights.mean(-1, keepdim=True)
