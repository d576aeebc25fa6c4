"""Which predictions become labels."""

from __future__ import annotations

import numpy as np
import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_ssl.self_training.confidence import Measured, choose, dice_between, foreground_channels, measure


def test_confidence_is_the_mean_over_predicted_classes_of_the_mean_probability_inside_them():
    labels = LabelManager({"background": 0, "a": 1, "b": 2, "c": 3, "ignore": 4}, None)
    voxels = [(0.8, 0.1, 0.1, 0.0), (0.2, 0.7, 0.1, 0.0), (0.05, 0.9, 0.05, 0.0), (0.2, 0.2, 0.6, 0.0)]
    probabilities = np.array(voxels, np.float32).T.reshape(4, 2, 2)
    measured = measure(probabilities, labels)
    assert measured.voxels == {"a": 2, "b": 1, "c": 0}
    assert measured.probability["a"] == pytest.approx(0.8)
    assert measured.probability["b"] == pytest.approx(0.6)
    assert measured.probability["c"] is None
    assert measured.confidence == pytest.approx(0.7)  # not 0.733, the mean over voxels


def test_confidence_of_regions_that_overlap():
    labels = LabelManager({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
    probabilities = np.array([[[0.9, 0.7, 0.2]], [[0.6, 0.1, 0.5]]], np.float32)
    measured = measure(probabilities, labels)
    assert measured.voxels == {"whole": 2, "core": 1}
    assert measured.confidence == pytest.approx((0.8 + 0.6) / 2)


def test_a_prediction_without_foreground_has_confidence_0():
    labels = LabelManager({"background": 0, "a": 1}, None)
    measured = measure(np.stack([np.ones((3, 4, 5)), np.zeros((3, 4, 5))]), labels)
    assert measured == Measured({"a": 0}, {"a": None})
    assert measured.confidence == 0


def test_channels_are_those_that_nnunet_predicts_into():
    order = {"background": 0, "second": 2, "first": 1, "ignore": 3}
    assert foreground_channels(LabelManager(order, None)) == {"second": 2, "first": 1}
    regions = {"background": 0, "core": [2], "whole": [1, 2]}
    assert foreground_channels(LabelManager(regions, [2, 1])) == {"core": 0, "whole": 1}


def test_agreement_is_the_mean_over_classes_that_a_teacher_sees_of_their_dice():
    labels = LabelManager({"background": 0, "a": 1, "b": 2, "c": 3, "ignore": 4}, None)
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 3, (2, 6, 7))  # c is seen by neither
    maps[0][maps[0] == 2] = 0  # b by one alone
    one, other = (np.stack([m == k for k in range(4)]).astype(np.float32) for m in maps)
    dice = dice_between(one, other, labels)
    both = sum(a == b == 1 for a, b in zip(maps[0].ravel(), maps[1].ravel(), strict=True))
    by_hand = 2 * both / ((maps[0] == 1).sum() + (maps[1] == 1).sum())
    assert dice == {"a": pytest.approx(by_hand), "b": 0.0, "c": None}
    assert Measured({}, {}, dice).agreement == pytest.approx(by_hand / 2)
    nothing = np.stack([np.ones((6, 7)), *np.zeros((3, 6, 7))])
    assert Measured({}, {}, dice_between(nothing, nothing, labels)).agreement == 0
    assert Measured({}, {}).agreement == 0  # nobody to agree with

    regions = LabelManager({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
    one, other = np.array([[[0.9, 0.7, 0.2]], [[0.6, 0.1, 0.5]]]), np.array([[[0.9, 0.2, 0.2]], [[0.1, 0.1, 0.9]]])
    assert dice_between(one, other, regions) == {"whole": pytest.approx(2 / 3), "core": 0.0}


def test_the_confident_are_chosen():
    confidences = {"d": 0.9, "a": 0.8, "c": 0.0, "b": 0.95, "e": 0.8}
    assert choose(confidences, 0.9, None) == ["b", "d"]  # what reaches the threshold
    assert choose(confidences, 0.901, None) == ["b"]
    assert choose(confidences, 0.99, None) == []
    assert choose(confidences, None, 0.6) == ["a", "b", "d"]  # of equal ones the first by name
    assert choose(confidences, None, 0.01) == ["b"]
    assert choose(confidences, None, 1.0) == ["a", "b", "d", "e"]  # never one without foreground
    assert choose({"a": 0.0}, None, 1.0) == []
