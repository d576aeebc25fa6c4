"""The style of another image: the amplitudes of its lowest frequencies.

Source: Yang and Soatto, "FDA: Fourier Domain Adaptation for Semantic Segmentation" (CVPR 2020); with a share that grows
it is TP-RAM of Ma et al., "Constructing and Exploring Intermediate Domains in Mixed Domain Semi-supervised Medical
Image Segmentation" (CVPR 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

BAND = 0.01  # of each axis' length, the frequencies on both sides of 0 that are mixed


@torch.no_grad()
def amplitude_mixed(images: Tensor, styles: Tensor, share: Tensor) -> Tensor:
    """Images with ``(1 - share) A_image + share A_style`` as the amplitudes of the lowest frequencies; phases stay.

    Amplitudes are of what a channel exceeds the smallest value of the two images by: of means that differ in sign,
    which normalized images have, sizes say nothing.

    Args:
        images: ``[B, C, *spatial]``, any float type; transformed in fp32, each channel by itself.
        styles: of the same shape.
        share: ``[B]``, from 0 to 1.

    Returns:
        ``[B, C, *spatial]`` float32, within the range that each channel has in the two images.
    """
    images, styles = images.float(), styles.float()
    spatial, axes = images.shape[2:], tuple(range(2, images.ndim))
    both = torch.stack([images, styles]).flatten(3)
    least, most = (x.view(*images.shape[:2], *[1] * len(axes)) for x in (both.amin((0, 3)), both.amax((0, 3))))
    images, styles = images - least, styles - least
    spectrum = torch.fft.rfftn(images, dim=axes)
    low = torch.ones((), dtype=torch.bool, device=images.device)
    for length, bins in zip(spatial, spectrum.shape[2:], strict=True):
        frequency = torch.arange(bins, device=images.device)
        frequency = torch.minimum(frequency, length - frequency)  # counted from 0 in both directions
        low = low[..., None] & (frequency <= int(BAND * length))
    share = share.view(-1, *[1] * (images.ndim - 1))
    amplitude = torch.lerp(spectrum.abs(), torch.fft.rfftn(styles, dim=axes).abs(), share)
    mixed = torch.where(low, torch.polar(amplitude, spectrum.angle()), spectrum)
    return (torch.fft.irfftn(mixed, s=spatial, dim=axes) + least).clamp(least, most)
