"""Errors of labels, against scipy's morphology, and that classes stay classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from nnunet_ssl.views import label_errors
from nnunet_ssl.views.label_errors import closed, dilated, eroded, opened, with_errors


@pytest.mark.parametrize("radius", [(1, 2), (1, 0, 2)])
@pytest.mark.parametrize(
    ("ours", "scipys"),
    [(dilated, ndimage.grey_dilation), (eroded, ndimage.grey_erosion), (opened, ndimage.grey_opening),
     (closed, ndimage.grey_closing)],
)  # fmt: skip
def test_shapes_change_as_scipys_do(ours, scipys, radius):
    mask = np.random.default_rng(0).random((9, 8, 7)[: len(radius)]) < 0.4
    expected = scipys(mask.astype(float), size=[2 * r + 1 for r in radius])  # edges reflected: the same
    found = ours(torch.tensor(mask)[None, None].float(), radius)[0, 0]
    np.testing.assert_array_equal(found.numpy(), expected)


def some_masks(size, exclusive):
    """Blobs of three classes, or regions."""
    smooth = np.stack([ndimage.gaussian_filter(np.random.default_rng(k).normal(size=(4, *size)), (0, *[2] * len(size)))
                       for k in range(3)], 1)  # fmt: skip
    smooth = torch.tensor(smooth)
    return smooth == smooth.max(1, keepdim=True).values if exclusive else smooth > 0


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("size", [(20, 24), (1, 12, 16), (12, 16, 20)])
def test_there_are_errors_and_classes_stay_classes(size, exclusive):
    masks = some_masks(size, exclusive)
    before, rng = masks.clone(), np.random.default_rng(0)
    torch.manual_seed(0)
    found = [with_errors(masks, rng, [1.0] * len(size), exclusive) for _ in range(6)]
    assert torch.equal(masks, before)
    wrong = torch.stack([(of != masks).any(1).flatten(1).float().mean(1) for of in found])  # [draws, images]
    assert 0.1 < (wrong == 0).float().mean() < 0.6  # a quarter of them have none
    assert wrong.max() < 0.9
    if exclusive:
        assert all((of.sum(1) == 1).all() for of in found)


def test_a_thick_axis_is_changed_by_less(monkeypatch):
    """Growth by four voxels where voxels are fine is by one where they are four times as thick."""
    monkeypatch.setattr(label_errors, "RADII", (4, 4))
    monkeypatch.setattr(label_errors, "ERRORS", (dilated,))
    monkeypatch.setattr(label_errors, "PROBABILITY", 1.0)
    monkeypatch.setattr(label_errors, "SWAPPED", 0.0)
    mask = torch.zeros(1, 1, 9, 21, 21, dtype=torch.bool)
    mask[..., 4, 10, 10] = True
    grown = with_errors(mask, np.random.default_rng(0), [4.0, 1.0, 1.0], exclusive=False)
    assert grown[0, 0].any(2).any(1).sum() == 3
    assert grown[0, 0].any(0).any(0).sum() == 9


def test_swapped_voxels_are_near_to_boundaries(monkeypatch):
    monkeypatch.setattr(label_errors, "PROBABILITY", 1.0)
    monkeypatch.setattr(label_errors, "ERRORS", (lambda mask, radius: mask,))
    torch.manual_seed(0)
    left = torch.zeros(1, 1, 40, 60, dtype=torch.bool)
    left[..., 20:] = True
    masks = torch.cat([~left, left], 1)
    wrong = (with_errors(masks, np.random.default_rng(0), [1.0, 1.0]) != masks)[0, 0]
    columns = wrong.any(0).nonzero()[:, 0]
    assert wrong.any()
    assert all(11 <= c <= 28 for c in columns.tolist())


def test_nothing_changes_places_across_the_borders_of_the_patch(monkeypatch):
    monkeypatch.setattr(label_errors, "PROBABILITY", 1.0)
    monkeypatch.setattr(label_errors, "ERRORS", (lambda mask, radius: mask,))
    monkeypatch.setattr(label_errors, "SWAPPED", 4.0)  # all of a boundary
    torch.manual_seed(0)
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    mask[..., :2] = True
    found = with_errors(mask, np.random.default_rng(0), [1.0, 1.0], exclusive=False)
    assert found.sum() == mask.sum()
    assert not torch.equal(found, mask)
    assert not found[..., 20:].any()


def test_the_class_that_changes_is_one_that_is_there(monkeypatch):
    """Of fourteen classes one is in the patch: half of the patches get an error, not a thirteenth of that."""
    monkeypatch.setattr(label_errors, "ERRORS", (dilated,))
    monkeypatch.setattr(label_errors, "SWAPPED", 0.0)
    masks = torch.zeros(1, 14, 16, 16, dtype=torch.bool)
    masks[:, 9, 5:9, 5:9] = True
    masks[:, 0] = ~masks[:, 9]
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    changed = [bool((with_errors(masks, rng, [1.0, 1.0]) != masks).any()) for _ in range(100)]
    assert 35 < sum(changed) < 65
    empty = torch.zeros(1, 3, 8, 8, dtype=torch.bool)
    empty[:, 0] = True
    for _ in range(5):
        assert torch.equal(with_errors(empty, rng, [1.0, 1.0]), empty)


def test_both_classes_of_two_get_errors():
    masks = torch.zeros(2, 5, 8, 8)
    masks[:, [1, 4]] = 1.0
    torch.manual_seed(0)
    chosen = {int(label_errors._one_that_is_there(masks[0], 1)) for _ in range(40)}
    assert chosen == {1, 4}


def test_across_thick_slices_nothing_is_swapped(monkeypatch):
    monkeypatch.setattr(label_errors, "PROBABILITY", 1.0)
    monkeypatch.setattr(label_errors, "ERRORS", (lambda mask, radius: mask,))
    torch.manual_seed(0)
    mask = torch.zeros(1, 1, 16, 40, 40, dtype=torch.bool)
    mask[..., 4:12, 10:30, 10:30] = True
    found = with_errors(mask, np.random.default_rng(0), [20.0, 1.0, 1.0], exclusive=False)
    assert not torch.equal(found, mask)
    assert not found[..., :4, :, :].any()
    assert not found[..., 12:, :, :].any()
