"""The strong view of weak-to-strong methods: the loader's patch with intensities changed, voxels where they were."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnunet_ssl.views import intensity

BLUR = 0.1, 2.0  # sigma in voxels; kernels end at twice the largest, as nnU-Net's at twice their own
NOISE = 0.0, 0.2  # standard deviation; images are normalized
SCALE = 0.5, 1.0  # of low resolution
INVERTED = 0.25  # share of gammas that are of the inverted image, as in nnU-Net


@dataclass(frozen=True)
class StrongView:
    """Noise, blur, brightness, contrast, low resolution and gamma, in nnU-Net's order.

    Whether an image is changed is drawn for each of them, and how much, for each channel. Contrast and gamma are drawn
    so that a factor and its inverse are alike.
    """

    jitter: float  # probability each of brightness, contrast and gamma
    # brightness moves by up to so many standard deviations of the patch, contrast and gamma lie between
    # 1 / (1 + strength) and 1 + strength
    strength: float
    blur: float  # probability of blur
    noise: float  # probability each of noise and of low resolution
    axes: tuple[int, ...] | None = None  # spatial axes of blur and low resolution; None for all
    # for each channel whether what is 0 stays so, as what nnU-Net's masks leave out
    zero_outside: tuple[bool, ...] = ()

    @torch.no_grad()
    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """The strong view, or the images themselves if nothing is drawn; noise is of the device's own generator.

        Args:
            images: ``[B, C, *patch]`` float32, left as they are.
            rng: the same draws from it give the same view.
        """
        size = images.shape[:2]

        def drawn(probability: float, low: float, high: float, unchanged: float) -> np.ndarray:
            chosen = rng.random((size[0], 1)) < probability
            return np.where(chosen, rng.uniform(low, high, size), unchanged).astype(np.float32)

        def on_device(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(images.device, non_blocking=True)

        noise, blur = drawn(self.noise, *NOISE, 0), drawn(self.blur, *BLUR, 0)
        shift = drawn(self.jitter, -self.strength, self.strength, 0)
        factor = (1 + self.strength) ** drawn(self.jitter, -1, 1, 0)
        scale = drawn(self.noise, *SCALE, 1)
        exponent = (1 + self.strength) ** drawn(self.jitter, -1, 1, 0)
        sign = np.where(rng.random(size) < INVERTED, -1, 1).astype(np.float32)

        view = images
        if noise.any():
            view = intensity.noise(view, on_device(noise))
        if blur.any():
            view = intensity.blur(view, on_device(blur), round(2 * BLUR[1]), self.axes)
        if shift.any():
            view = intensity.brightness(view, on_device(shift))
        if (factor != 1).any():
            view = intensity.contrast(view, on_device(factor))
        if (scale < 1).any():
            view = intensity.low_resolution(view, scale, self.axes)
        if (exponent != 1).any():
            view = intensity.gamma(view, on_device(exponent), on_device(sign))
        return self.outside_stays_zero(view, images)

    def outside_stays_zero(self, view: Tensor, images: Tensor) -> Tensor:
        """A view of images, 0 again where the normalization's mask has set them to 0; ``[B, C, *patch]`` each."""
        if not any(self.zero_outside):
            return view
        outside = [(images[:, c] == 0) & zero for c, zero in enumerate(self.zero_outside)]
        return view.masked_fill(torch.stack(outside, 1), 0)
