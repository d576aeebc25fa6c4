"""What stands against a warp, on either side of each threshold."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_ssl.shapes import vote, votes
from nnunet_ssl.shapes.quality import LEAST_COVERED, LEAST_LEFT, LEAST_SIMILARITY, MOST_FOLDING, volumes, why_not
from nnunet_ssl.shapes.registration import Registration

GOOD = Registration(None, before=0.1, after=0.9, folding=0.0, covered=1.0)
LITTLE = 1e-6


@pytest.mark.parametrize(
    ("good", "bad", "why"),
    [
        ({"covered": LEAST_COVERED}, {"covered": LEAST_COVERED - LITTLE}, "show another field of view"),
        ({"folding": MOST_FOLDING}, {"folding": MOST_FOLDING + LITTLE}, "fold"),
        ({"after": LEAST_SIMILARITY}, {"after": LEAST_SIMILARITY - LITTLE}, "are not alike after registration"),
        ({"before": 0.9}, {"before": 0.9 + LITTLE}, "are not alike after registration"),
        ({}, {"after": -1.0}, "are not alike after registration"),
    ],
)
def test_a_registration_is_good_up_to_a_threshold(good, bad, why):
    assert why_not(GOOD._replace(**good), {1: 5.0}, {1: 5.0}) is None
    assert why_not(GOOD._replace(**bad), {1: 5.0}, {1: 5.0}) == why


def test_a_class_may_shrink_and_not_vanish():
    before = {1: 100.0, 2: 10.0}
    assert why_not(GOOD, before, {1: 300.0, 2: 10 * LEAST_LEFT}) is None
    assert why_not(GOOD, before, {1: 300.0, 2: 10 * LEAST_LEFT - LITTLE}) == "lose a class"
    assert why_not(GOOD, before, {1: 100.0}) == "lose a class"
    assert why_not(GOOD, {}, {}) is None  # an image without foreground has none to lose


def test_volumes_are_those_of_classes_in_mm():
    labels = np.array([[[-1, 0, 1, 1], [3, 3, 3, 0]]])
    assert volumes(labels, 2.5, (1, 2, 3)) == {1: 5.0, 3: 7.5}
    assert volumes(labels, 2.5, (1, 2)) == {1: 5.0}  # where 3 is the ignore label
    assert volumes(np.zeros((1, 2, 2)), 1.0, (1,)) == {}


def test_the_limits_are_those_of_the_docs():
    """docs/shapes.md and docs/self-training.md name them."""
    assert (LEAST_SIMILARITY, LEAST_COVERED, LEAST_LEFT, MOST_FOLDING) == (0.4, 0.5, 0.2, 0.01)
    assert (vote.POWER, vote.WINDOW, votes.ATLASES) == (4, 5, 10)
