"""Changes of intensity as nnU-Net's augmentation makes them, for a whole batch on its device, without a wait.

batchgeneratorsv2 changes an image at a time and, for all that stands here but low resolution, reads numbers back from
the device or has its kernels on the CPU. Here images are ``[B, C, *spatial]`` float32, and each image and channel has a
number of its own in a tensor ``[B, C]``; one of them stands for no change.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from torch import Tensor

EPS = 1e-7


def brightness(images: Tensor, shift: Tensor) -> Tensor:
    """Add so many standard deviations of the patch; 0 changes nothing."""
    return images + _per_channel(shift * _std(images), images)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scale about the patch's mean, within the range of the patch; 1 changes nothing."""
    mean = _per_channel(images.flatten(2).mean(2), images)
    low, high = (_per_channel(x, images) for x in _range(images))
    return torch.lerp(mean, images, _per_channel(factor, images)).clamp(low, high)


def gamma(images: Tensor, exponent: Tensor, sign: Tensor) -> Tensor:
    """Raise to a power, of which 1 changes nothing, within the patch's range; restore its mean and standard deviation.

    Where the sign is -1 the inverted image is raised, and inverted back.
    """
    sign = _per_channel(sign, images)
    images = images * sign
    low, high = (_per_channel(x, images) for x in _range(images))
    raised = ((images - low) / (high - low).clamp(min=EPS)) ** _per_channel(exponent, images)
    scale = _per_channel(_std(images) / _std(raised).clamp(min=EPS), images)
    mean, mean_raised = (_per_channel(x.flatten(2).mean(2), images) for x in (images, raised))
    return ((raised - mean_raised) * scale + mean) * sign


def blur(images: Tensor, sigma: Tensor, radius: int, axes: tuple[int, ...] | None = None) -> Tensor:
    """Gaussian blur, the image reflected at its borders.

    A sum of shifted images: with an own kernel for each channel, cuDNN's convolutions are slower.

    Args:
        sigma: voxels; 0 changes nothing.
        radius: voxels at which all kernels end; on a shorter axis, where that ends.
        axes: spatial axes from 0; None for all.
    """
    for axis in range(images.ndim - 2) if axes is None else axes:
        length = images.shape[2 + axis]
        reach = min(radius, length - 1)
        taps = torch.arange(-reach, reach + 1, device=images.device)
        kernel = (-0.5 * (taps / sigma[..., None].clamp(min=1e-3)) ** 2).exp()
        kernel = kernel / kernel.sum(2, keepdim=True)
        pad = [0, 0] * (images.ndim - 3 - axis) + [reach, reach] + [0, 0] * axis  # torch's order: last axis first
        padded, images = F.pad(images, pad, mode="reflect"), torch.zeros_like(images)
        for tap in range(2 * reach + 1):
            shifted = padded.narrow(2 + axis, tap, length)
            images.addcmul_(shifted, _per_channel(kernel[..., tap], shifted))
    return images


def noise(images: Tensor, sigma: Tensor) -> Tensor:
    """Add Gaussian noise of this standard deviation from the device's own generator; 0 changes nothing."""
    return torch.addcmul(images, torch.randn_like(images), _per_channel(sigma, images))


def low_resolution(images: Tensor, scale: np.ndarray, axes: tuple[int, ...] | None = None) -> Tensor:
    """Scale down to the nearest voxels and linearly up again, by batchgeneratorsv2.

    Args:
        scale: on the host, at most 1, which changes nothing.
        axes: spatial axes from 0; None for all.
    """
    spatial = images.ndim - 2
    scales = np.ones((*scale.shape, spatial))
    scales[..., list(range(spatial) if axes is None else axes)] = scale[..., None]
    lower = SimulateLowResolutionTransform(1.0, False, True, ())
    images = images.clone()
    for image, of_image, changed in zip(images, scales, scale < 1, strict=True):
        channels = changed.nonzero()[0].tolist()
        lower._apply_to_image(image, apply_to_channel=channels, scales=of_image[channels])
    return images


def _per_channel(values: Tensor, images: Tensor) -> Tensor:
    return values.view(*values.shape, *[1] * (images.ndim - 2))


def _std(images: Tensor) -> Tensor:
    return images.flatten(2).std(2)


def _range(images: Tensor) -> tuple[Tensor, Tensor]:
    low, high = images.flatten(2).aminmax(dim=2)
    return low, high
