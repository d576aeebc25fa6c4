"""What labeled cases say of an image without labels: each is registered onto it, and their labels are averaged.

At each voxel an atlas counts as much as it is like the image around that voxel (local weighted voting: Artaechevarria
et al., IEEE TMI 2009; that errors of atlases are correlated, as joint label fusion has it, Wang et al., IEEE TPAMI
2013, is not considered).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy import ndimage

from nnunet_ssl.shapes.registration import Volume, array, warp

WINDOW = 5  # voxels along each axis, in which images are compared
POWER = 4  # of the similarity, which makes the weight
FLOOR = 0.05  # of the similarity: where no atlas is alike all count the same


class Atlas(NamedTuple):
    """A labeled case on the grid of the image.

    Attributes:
        image: ``[C, z, y, x]`` float32.
        shares: of each of the K labels ``[z, y, x]`` float32; their sum is below 1 where the case is ignored or ends.
    """

    image: np.ndarray
    shares: Iterable[np.ndarray]


def atlas(moving: Volume, grid: sitk.Image, transform: sitk.Transform, labels: Sequence[int]) -> Atlas:
    """Take a registered case.

    Args:
        moving: the labeled case. Where nnU-Net has cut off the empty border (-1), it is background.
        grid: the image that it was registered onto.
        transform: from points of the grid to points of ``moving``.
        labels: the K labels that vote, background first. Others, such as the ignore label, do not.
    """

    def share(label: int) -> np.ndarray:
        here = moving.labels == label if label else (moving.labels == 0) | (moving.labels == -1)
        return array(sitk.Resample(sitk.Cast(here, sitk.sitkFloat32), grid, transform, sitk.sitkLinear, 0.0))

    image = np.stack([array(warp(channel, grid, transform)) for channel in moving.channels])
    return Atlas(image, map(share, labels))  # one after the other: there may be a hundred


def vote(image: np.ndarray, atlases: Iterable[Atlas], num_labels: int) -> np.ndarray:
    """The probability of each label: the weighted mean of what the atlases say.

    Args:
        image: ``[C, z, y, x]`` float32.
        atlases: on its grid.
        num_labels: K.

    Returns:
        ``[K, z, y, x]`` float32, of sum 1; of sum 0 where no atlas says anything.
    """
    said = np.zeros((num_labels, *image.shape[1:]), np.float32)
    for one in atlases:
        counts = weight(similarity(image, one.image))
        for votes, share in zip(said, one.shares, strict=True):
            votes += share * counts
    return _shared(said, said.sum(0))


def similarity(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The correlation of two images in a window around each voxel, the mean of the channels.

    Args:
        one, other: ``[C, z, y, x]`` float32.

    Returns:
        ``[z, y, x]`` float32 from -1 to 1; 0 where one of the two is flat.
    """

    def mean(values: np.ndarray) -> np.ndarray:
        return ndimage.uniform_filter(values, WINDOW)

    found = np.zeros(one.shape[1:])
    for a, b in zip(one.astype(np.float64), other.astype(np.float64), strict=True):
        mean_a, mean_b = mean(a), mean(b)
        spread = (mean(a * a) - mean_a**2) * (mean(b * b) - mean_b**2)
        flat = spread < 1e-12
        found += np.where(flat, 0, (mean(a * b) - mean_a * mean_b) / np.sqrt(np.where(flat, 1, spread)))
    return (found / len(one)).clip(-1, 1).astype(np.float32)


def weight(similarity: np.ndarray) -> np.ndarray:
    """How much an atlas counts, by its local similarity; positive."""
    return similarity.clip(FLOOR) ** POWER


def as_probabilities(votes: np.ndarray, label_manager: LabelManager) -> tuple[np.ndarray, np.ndarray]:
    """The votes for labels as nnU-Net has probabilities, of its labels or of its regions, and where there are any.

    Args:
        votes: ``[K, *image]`` float32, of ``label_manager.all_labels``; their sum is 1, 0 where no atlas says anything,
            and between where votes were interpolated.
        label_manager: nnU-Net's, of the dataset.

    Returns:
        ``[C, *image]`` float32, 0 where no atlas says anything, and bool ``[*image]``, where one does.
    """
    total = votes.sum(0)
    said = total >= 0.5
    votes = _shared(votes, total * said)
    if not label_manager.has_regions:
        return votes, said
    regions = [np.unique(region) for region in label_manager.foreground_regions]
    return np.stack([votes[np.isin(label_manager.all_labels, region)].sum(0) for region in regions]), said


def _shared(votes: np.ndarray, total: np.ndarray) -> np.ndarray:
    """``[K, ...]`` as shares of a total ``[...]``; 0 where that is 0."""
    return np.divide(votes, total, out=np.zeros_like(votes), where=total > 0)
