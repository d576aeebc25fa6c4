"""The vote of labeled cases on an image, in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_ssl.shapes.registration import volume
from nnunet_ssl.shapes.vote import FLOOR, POWER, WINDOW, Atlas, as_probabilities, atlas, similarity, vote, weight

SHAPE = (7, 12, 14)
RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(1, *SHAPE)).astype(np.float32)
LABELS = RNG.integers(0, 3, SHAPE)
SPACING = (3.0, 1.0, 1.0)


def one_hot(labels: np.ndarray) -> np.ndarray:
    return np.stack([labels == label for label in range(3)]).astype(np.float32)


def with_shares(one: Atlas) -> Atlas:
    """Its shares ``[K, z, y, x]``, to look at more than once."""
    return Atlas(one.image, np.stack(list(one.shares)))


def test_atlases_that_say_the_same_are_right():
    same = [Atlas(IMAGE, one_hot(LABELS)), Atlas(-IMAGE, one_hot(LABELS)), Atlas(IMAGE * 3 + 1, one_hot(LABELS))]
    votes = vote(IMAGE, same, 3)
    assert votes.dtype == np.float32
    np.testing.assert_allclose(votes, one_hot(LABELS), atol=1e-6)


def test_an_atlas_that_is_unlike_in_one_place_counts_less_there():
    other = IMAGE.copy()
    other[:, :, :, 7:] *= -1  # unlike in one half
    votes = vote(IMAGE, [Atlas(IMAGE, one_hot(np.full(SHAPE, 1))), Atlas(other, one_hot(np.full(SHAPE, 2)))], 3)
    edge = WINDOW // 2
    np.testing.assert_allclose(votes[1, :, :, : 7 - edge], 0.5, atol=1e-5)
    np.testing.assert_allclose(votes[2, :, :, 7 + edge :], FLOOR**POWER / (1 + FLOOR**POWER), rtol=1e-3)
    np.testing.assert_allclose(votes.sum(0), 1, atol=1e-6)
    assert (votes[0] == 0).all()


def test_votes_are_the_weighted_mean_by_hand():
    images = [(IMAGE + k * RNG.normal(size=IMAGE.shape)).astype(np.float32) for k in (0.3, 0.6, 1.2)]
    shares = [one_hot(RNG.integers(0, 3, SHAPE)) for _ in images]
    votes = vote(IMAGE, map(Atlas, images, shares), 3)
    weights = [weight(similarity(IMAGE, image)) for image in images]
    expected = sum(w * s for w, s in zip(weights, shares, strict=True)) / sum(weights)
    np.testing.assert_allclose(votes, expected, rtol=1e-5)


def test_similarity_is_the_correlation_in_a_window():
    other = RNG.normal(size=(2, *SHAPE)).astype(np.float32)
    both = np.concatenate([IMAGE, IMAGE[:, ::-1]])
    found = similarity(both, other)
    box = (slice(1, 6), slice(4, 9), slice(3, 8))  # around 3, 6, 5
    expected = np.mean([np.corrcoef(a[box].ravel(), b[box].ravel())[0, 1] for a, b in zip(both, other, strict=True)])
    assert found[3, 6, 5] == pytest.approx(expected, abs=1e-5)
    assert (similarity(IMAGE, np.full_like(IMAGE, 7)) == 0).all()
    np.testing.assert_allclose(similarity(IMAGE, 2 * IMAGE - 5), 1, atol=1e-5)
    slices = similarity(IMAGE[:, :1], IMAGE[:, :1])  # one slice
    np.testing.assert_allclose(slices, 1, atol=1e-5)


def test_who_ignores_and_who_is_not_there_does_not_vote():
    ignored = LABELS.copy()
    ignored[:3] = 3
    moving = [volume(IMAGE, SPACING, labels) for labels in (ignored, np.full(SHAPE, 1))]
    grid = moving[0].channels[0]
    identity = sitk.Transform(3, sitk.sitkIdentity)
    atlases = [with_shares(atlas(one, grid, identity, [0, 1, 2])) for one in moving]
    assert (atlases[0].shares[:, :3] == 0).all()
    votes = vote(IMAGE, atlases, 3)
    np.testing.assert_allclose(votes[:, :3], one_hot(np.full(SHAPE, 1))[:, :3], atol=1e-6)
    np.testing.assert_allclose(votes[:, 3:], (one_hot(LABELS) + one_hot(np.full(SHAPE, 1)))[:, 3:] / 2, atol=1e-5)

    away = sitk.TranslationTransform(3, [0.0, 0.0, 4 * SPACING[0]])  # four slices lie beyond the atlas
    votes = vote(IMAGE, [atlas(moving[1], grid, away, [0, 1, 2])], 3)
    assert (votes[1, :3] == 1).all()
    assert (votes[:, 3:] == 0).all()  # nobody says anything, not even background
    assert (vote(IMAGE, [], 3) == 0).all()


def test_what_nnunet_has_cut_off_is_background():
    cut = LABELS.copy()
    cut[:2] = -1
    moving = volume(IMAGE, SPACING, cut)
    shares = with_shares(atlas(moving, moving.channels[0], sitk.Transform(3, sitk.sitkIdentity), [0, 1, 2])).shares
    assert (shares[0, :2] == 1).all()
    np.testing.assert_array_equal(shares[:, 2:], one_hot(LABELS)[:, 2:])


def test_labels_are_interpolated_linearly():
    labels = np.zeros(SHAPE, int)
    labels[..., 7:] = 2
    moving = volume(IMAGE, SPACING, labels)
    half = sitk.TranslationTransform(3, [0.25, 0.0, 0.0])
    shares = with_shares(atlas(moving, moving.channels[0], half, [0, 1, 2])).shares
    np.testing.assert_allclose(shares[:, 2, 2, 6], [0.75, 0, 0.25], atol=1e-6)


def test_regions_get_the_votes_of_their_labels():
    votes = vote(IMAGE, [Atlas(IMAGE, one_hot(LABELS)), Atlas(IMAGE, one_hot(LABELS[::-1]))], 3)
    votes[:, :2], votes[:, 2] = 0, votes[:, 2] * 0.6  # nobody says anything, and an edge between
    regions = LabelManager({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, [1, 2])
    whole = votes.copy()
    whole[:, 2] /= 0.6
    found, said = as_probabilities(votes, regions)
    np.testing.assert_allclose(found, [whole[1] + whole[2], whole[2]], atol=1e-6)
    np.testing.assert_array_equal(said, np.arange(SHAPE[0])[:, None, None] * np.ones(SHAPE) >= 2)
    found, said = as_probabilities(votes, LabelManager({"background": 0, "a": 1, "b": 2}, None))
    np.testing.assert_allclose(found, whole, atol=1e-6)
    assert not as_probabilities(0.4 * votes, regions)[0].any()
