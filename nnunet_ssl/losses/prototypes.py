"""Class separation of SS-Net: voxels' embeddings are pulled to prototypes of their class.

Source: Wu et al., "Exploring Smoothness and Class-Separation for Semi-supervised Medical Image Segmentation" (MICCAI
2022), and the authors' code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_ssl.losses.masked import masked_mean


@torch.no_grad()
def draw_of_each_class(labels: Tensor, num_classes: int, number: int) -> tuple[Tensor, Tensor]:
    """Voxels of each foreground class at random, one of each M-th part of them; nothing waits for the device.

    So hardly any voxel of a large class comes twice, and of a class of fewer than M all come, some in a row.

    Args:
        labels: any shape, integer. Values outside ``1 .. num_classes - 1`` are of no foreground class.
        num_classes: K, with background.
        number: M, voxels of each class.

    Returns:
        Places in ``labels.flatten()``, ``[K - 1, M]`` int64, and which classes there are, ``[K - 1]`` bool. The places
        of a class that there is not are any.
    """
    in_order, places = labels.flatten().to(torch.int16).sort(stable=True)
    classes = torch.arange(1, num_classes + 1, dtype=torch.int16, device=labels.device)
    first = torch.searchsorted(in_order, classes)
    count = first.diff()[:, None]
    drawn = torch.rand((num_classes - 1, number), device=labels.device, dtype=torch.float64)
    drawn = ((torch.arange(number, device=labels.device) + drawn) / number * count).long()
    drawn = torch.minimum(drawn, count - 1)  # the product may round up to count
    return places[(first[:-1, None] + drawn).clamp(0, len(places) - 1)], count[:, 0] > 0


def prototype_loss(
    embeddings: Tensor, prototypes: Tensor, weights: Tensor, prototype_weights: Tensor, present: Tensor
) -> Tensor:
    """L_cl: ``mean_{m,n} a_m b_n (1 - cos(h_m, z_n))`` within each class, the mean over classes.

    Args:
        embeddings: h, ``[K - 1, M, D]`` float32.
        prototypes: z, ``[K - 1, N, D]`` float32.
        weights: a, ``[K - 1, M]``.
        prototype_weights: b, ``[K - 1, N]``.
        present: ``[K - 1]`` bool, the classes that count.

    Returns:
        0-dim float32; 0, with zero gradients, where no class counts.
    """
    cosine = F.normalize(embeddings, dim=2) @ F.normalize(prototypes, dim=2).transpose(1, 2)
    weighted = weights[:, :, None] * prototype_weights[:, None] * (1 - cosine)
    return masked_mean(weighted.mean((1, 2)), present)
