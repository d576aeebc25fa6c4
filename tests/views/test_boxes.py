"""Boxes: their shares, proportions and places, and the mask against a loop over boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_ssl.views.boxes import ASPECT, CUTMIX_SHARE, random_boxes, random_sides


@pytest.mark.parametrize("patch", [(200, 100), (60, 90, 120)])
def test_sides_take_the_share_and_fit(patch):
    sides = random_sides(np.random.default_rng(0), 2000, patch, CUTMIX_SHARE)
    relative = sides / np.array(patch)
    assert (sides >= 1).all()
    assert (relative <= 1).all()
    shares = relative.prod(1)
    assert shares.min() < 0.03
    assert 0.37 < shares.max() < 0.42
    assert shares.mean() == pytest.approx(0.21, abs=0.01)
    ratios = relative.max(1) / relative.min(1)
    assert 2 < ratios.max() < ASPECT * 1.2  # rounded to voxels
    assert abs(np.log(relative[:, 0] / relative[:, -1]).mean()) < 0.05  # no axis is preferred


@pytest.mark.parametrize("patch", [(5, 7), (3, 4, 5)])
def test_boxes_are_boxes_of_their_sides_everywhere(patch):
    sides = np.random.default_rng(0).integers(1, np.array(patch) + 1, (300, len(patch)))
    masks = random_boxes(np.random.default_rng(1), sides, patch)
    assert masks.shape == (300, 1, *patch)
    assert masks.dtype == torch.bool
    for mask, side in zip(masks[:, 0].numpy(), sides, strict=True):
        inside = np.argwhere(mask)
        assert (inside.max(0) - inside.min(0) + 1 == side).all()
        assert len(inside) == side.prod()
    assert masks.any(0).all()
    assert torch.equal(masks, random_boxes(np.random.default_rng(1), sides, patch))


def test_a_place_is_drawn_uniformly():
    masks = random_boxes(np.random.default_rng(0), np.full((3000, 2), 1), (4, 5))
    np.testing.assert_allclose(masks[:, 0].float().mean(0), 1 / 20, atol=0.015)


def test_no_sides_no_box():
    masks = random_boxes(np.random.default_rng(0), np.array([[0, 0], [2, 3]]), (4, 5))
    assert masks.flatten(1).sum(1).tolist() == [0, 6]
