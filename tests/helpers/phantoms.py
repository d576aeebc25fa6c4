"""Made-up images with two classes, of which it is known where each voxel lies."""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def phantom(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    *,
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0),
    bend: float = 0.0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """An ellipsoid (1) with a core (2) off its middle, in the middle of the image and moved by ``shift`` in mm.

    Args:
        shape, spacing: z, y, x; mm.
        bend: mm by which y follows a wave along x.
        seed: of the noise.

    Returns:
        float32 ``[z, y, x]`` of mean 0 and deviation 1, int16 ``[z, y, x]``.
    """
    axes = [(np.arange(n) - (n - 1) / 2) * s - d for n, s, d in zip(shape, spacing, shift, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    y = y + bend * np.sin(x / 5)
    labels = ((z / 7) ** 2 + (y / 8) ** 2 + (x / 10) ** 2 < 1).astype(np.int16)
    labels[(z / 4) ** 2 + ((y - 2) / 4) ** 2 + ((x - 3) / 4) ** 2 < 1] = 2
    image = ndimage.gaussian_filter(labels.astype(np.float32), [0.7 / s for s in spacing])
    image = (image - image.mean()) / image.std() + np.random.default_rng(seed).normal(0, 0.1, shape)
    return image.astype(np.float32), labels


def dice(one: np.ndarray, other: np.ndarray, label: int) -> float:
    """Of one class."""
    return 2 * ((one == label) & (other == label)).sum() / ((one == label).sum() + (other == label).sum())
