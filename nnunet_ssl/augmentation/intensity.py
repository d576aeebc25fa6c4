"""nnU-Net's intensity transforms on a GPU, with draws that were made before; nothing waits for the GPU.

With draws on the CPU most of batchgeneratorsv2's transforms compute on a GPU as they are. Noise and blur do not.
"""

from __future__ import annotations

from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform, _compute_kernel_size
from torch import Tensor

from nnunet_ssl.views import intensity

TRUNCATE = 6  # of blur_dimension: the width of a kernel in sigmas


def apply(transform: BasicTransform, image: Tensor, drawn: dict[str, Any], generator: torch.Generator) -> Tensor:
    """What an intensity transform makes of an image.

    Args:
        transform: one of ``deferred.INTENSITY``.
        image: ``[C, *spatial]`` float32; changed.
        drawn: by ``deferred.draw``.
        generator: of the image's device; noise seeds it.

    Returns:
        The image, as ``transform`` would have changed it on the CPU up to rounding; noise is another.
    """
    if isinstance(transform, GaussianNoiseTransform):
        return add_noise(image, drawn["apply_idx"].tolist(), drawn["sigmas"], generator.manual_seed(drawn["seed"]))
    if isinstance(transform, GaussianBlurTransform):
        channels = drawn["apply_to_channel"].nonzero().flatten().tolist()
        sigmas = [drawn["sigmas"]] * len(channels) if transform.synchronize_channels else drawn["sigmas"]
        return blur(image, channels, sigmas)
    return transform._apply_to_image(image, **drawn)


def add_noise(image: Tensor, channels: list[int], sigmas: float | list[float], generator: torch.Generator) -> Tensor:
    """Add Gaussian noise to these channels of an image ``[C, *spatial]``, float32, which is changed, to each its own.

    ``sigmas``: one standard deviation for all of them, or one for each.
    """
    noise = image.new_empty((len(channels), *image.shape[1:])).normal_(generator=generator)
    for i, channel in enumerate(channels):
        image[channel].add_(noise[i], alpha=sigmas[i] if isinstance(sigmas, list) else sigmas)
    return image


def blur(image: Tensor, channels: list[int], sigmas: list[list[float]]) -> Tensor:
    """Smooth these channels of an image ``[C, *spatial]``, float32, which is changed, with Gaussians.

    ``sigmas``: of each of them the standard deviation along each axis, in voxels.
    """
    for channel, along in zip(channels, sigmas, strict=True):
        smooth = image[channel][None, None]
        for axis, sigma in enumerate(along):
            radius = _compute_kernel_size(sigma, truncate=TRUNCATE) // 2
            smooth = intensity.blur(smooth, smooth.new_full((1, 1), sigma), radius, (axis,))
        image[channel] = smooth[0, 0]
    return image
