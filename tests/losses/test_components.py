"""The largest component, by pointers and by scipy, against scipy's labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from nnunet_ssl.losses.components import by_pointers, by_scipy, largest_components, largest_of_each_class


def assert_largest(masks, largest):
    """Of each mask one component, and none is larger."""
    for mask, part in zip(masks.numpy(), largest.numpy(), strict=True):
        labels, count = ndimage.label(mask, np.ones([3] * mask.ndim))
        sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        (label,) = set(labels[part].tolist())
        assert part.sum() == sizes.max() == sizes[label - 1]


@pytest.mark.parametrize("way", [by_pointers, by_scipy])
@pytest.mark.parametrize(
    ("shape", "share"), [((64, 50), 0.3), ((64, 50), 0.41), ((20, 22, 24), 0.05), ((20, 22, 24), 0.1)]
)
def test_random_voxels_near_the_share_at_which_all_connects(way, shape, share):
    torch.manual_seed(0)
    masks = torch.rand(4, *shape) < share
    assert_largest(masks, way(masks))


@pytest.mark.parametrize("way", [by_pointers, by_scipy])
def test_a_snake_is_one_and_a_diagonal_too_and_nothing_stays_nothing(way):
    snake = torch.zeros(33, 33, dtype=torch.bool)
    snake[::2] = True
    snake[1::4, -1] = snake[3::4, 0] = True
    masks = torch.stack([snake, torch.eye(33, dtype=torch.bool), torch.zeros_like(snake), torch.ones_like(snake)])
    assert torch.equal(way(masks), masks)


@pytest.mark.parametrize("way", [by_pointers, by_scipy])
def test_opposite_borders_do_not_touch(way):
    mask = torch.zeros(1, 4, 5, 6, dtype=torch.bool)
    mask[:, :, :, 0] = True
    mask[:, :3, :, -1] = True
    largest = way(mask)
    assert largest[..., 0].all()
    assert not largest[..., 1:].any()


def test_each_class_of_each_image_by_itself():
    masks = torch.zeros(2, 2, 3, 9, dtype=torch.bool)
    masks[0, 0, 0, [0, 1, 4]] = True
    masks[0, 1, 0, [2, 5, 6]] = True
    masks[1, 1, 2, 8] = True
    largest = largest_components(masks)
    assert largest.nonzero().tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 5], [0, 1, 0, 6], [1, 1, 2, 8]]


@pytest.mark.parametrize("regions", [False, True])
def test_of_each_class_the_largest_stays_and_the_rest_is_background(regions):
    labels = torch.tensor([1, 1, 0, 1, 2, 0, 2, 2, 0, 1], dtype=torch.int16).view(1, 1, 1, -1)
    expected = [1, 1, 0, 0, 0, 0, 2, 2, 0, 0]
    if not regions:
        kept = largest_of_each_class(labels, 3)
        assert kept.dtype == labels.dtype
        assert kept.flatten().tolist() == expected
    else:
        of_regions = torch.cat([labels == 1, labels == 2], 1)
        kept = largest_of_each_class(of_regions, 2, regions=True)
        assert (kept[0, 0, 0].int() + 2 * kept[0, 1, 0].int()).tolist() == expected
