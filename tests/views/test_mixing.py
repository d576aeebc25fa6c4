"""Mixes by masks: voxels and labels move together, what is ignored never counts, and all of it is there again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_ssl.views.boxes import random_boxes
from nnunet_ssl.views.mixing import Patches, exchanged, labeled_patches, pasted, rolled

SHAPES = [(6, 7), (4, 5, 6)]


def a_target(shape, regions, ignore_label):
    torch.manual_seed(0)
    if regions:
        return torch.rand(3, 2 + (ignore_label is not None), *shape) > 0.6
    return torch.randint(0, 3 + (ignore_label is not None), (3, 1, *shape), dtype=torch.int16)


def nnunets_target(patches, regions, ignore_label):
    """The target of patches as nnU-Net has it: the inverse of ``labeled_patches``."""
    if ignore_label is None:
        return patches.labels
    if regions:
        return torch.cat([patches.labels, ~patches.counts], 1)
    return torch.where(patches.counts, patches.labels, ignore_label)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("ignore_label", [None, 3])
def test_targets_to_patches_and_back(shape, regions, ignore_label):
    target = a_target(shape, regions, ignore_label)
    patches = labeled_patches(torch.randn(3, 1, *shape), target, regions, ignore_label)
    assert torch.equal(nnunets_target(patches, regions, ignore_label), target)
    if regions:
        assert patches.labels.shape[1] == 2
        assert patches.labels.dtype == torch.bool
        ignored = target[:, 2:] if ignore_label else torch.zeros_like(target[:, :1])
    else:
        assert patches.labels.max() < 3
        ignored = target == 3
    assert torch.equal(patches.counts, ~ignored)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("regions", [False, True])
def test_both_directions_voxel_by_voxel(shape, regions):
    """Of regions the pseudo-labels count channel by channel, the labels for all channels alike."""
    rng = np.random.default_rng(0)
    mask = random_boxes(rng, np.full((3, len(shape)), 3), shape)
    one = labeled_patches(torch.randn(3, 2, *shape), a_target(shape, regions, 3), regions, 3)
    channels = 2 if regions else 1
    other = Patches(
        torch.randn(3, 2, *shape),
        (torch.rand(3, channels, *shape) > 0.5).to(one.labels.dtype),
        torch.rand(3, channels, *shape) > 0.5,
    )
    in_one, in_other = exchanged(mask, one, other)
    for b, *voxel in np.ndindex(3, *shape):
        inside = mask[(b, 0, *voxel)]
        for mixed, source in ((in_one, other if inside else one), (in_other, one if inside else other)):
            for of_mix, of_source in zip(mixed, source, strict=True):
                where = (b, slice(None), *voxel)
                assert (of_mix[where] == of_source[where]).all()
    back, again = exchanged(mask, in_one, in_other)
    assert torch.equal(back.images, one.images)
    assert torch.equal(again.labels, other.labels)


def test_partners_are_other_images_of_the_batch():
    x = torch.arange(3.0).view(3, 1, 1, 1)
    patches = Patches(x, x, x)
    assert all(part.flatten().tolist() == [2, 0, 1] for part in rolled(patches))  # labels and masks go along
    nowhere = torch.zeros(3, 1, 1, 1, dtype=torch.bool)
    assert torch.equal(pasted(nowhere, rolled(patches), patches).images, x)
