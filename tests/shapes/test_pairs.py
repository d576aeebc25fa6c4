"""Which pairs: each once, all unlabeled images about as often, those far apart first."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from nnunet_ssl.shapes import targets
from nnunet_ssl.shapes.pairs import SIDE, choose, description, spread_out
from nnunet_ssl.unlabeled.store import PreparedFolder


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "each", "known"), itertools.product((1, 2, 5), (0, 1, 3, 7), (1, 2, 4, 9), (0, 1, 3))
)
def test_each_pair_once_and_all_about_as_often(labeled, unlabeled, each, known):
    moving, fixed = ([f"{stem}{i}" for i in range(n)] for stem, n in (("m", labeled), ("f", unlabeled)))
    rng = np.random.default_rng([labeled, unlabeled, each, known])
    every = list(itertools.product(moving, fixed))
    taken = [every[i] for i in rng.permutation(len(every))[:known]]
    new = choose(moving, fixed, each, {}, taken)
    assert len({*new, *taken}) == len(new) + len(taken)
    assert set(new) <= set(every)
    for case in moving:
        before = sum(one == case for one, _ in taken)
        now = before + sum(one == case for one, _ in new)
        assert now == max(before, min(each, unlabeled)), case
    if unlabeled and not known:
        uses = Counter(one for _, one in new)
        assert max(uses.values()) - min(uses[case] for case in fixed) <= 1
        assert [one for _, one in new[: min(labeled, unlabeled)]] == fixed[: min(labeled, unlabeled)]  # the first first


def test_a_patient_with_several_images_is_used_as_often_as_others():
    groups = {"a1": "A", "a2": "A", "a3": "A", "b1": "B", "b2": "B"}
    chosen = choose(["m", "n"], ["a1", "a2", "a3", "b1", "b2", "c", "d"], 2, groups)
    assert sorted(groups.get(fixed, fixed) for _, fixed in chosen) == ["A", "B", "c", "d"]
    more = choose(["m", "n"], ["a1", "a2", "a3", "b1", "b2", "c", "d"], 4, groups, chosen)
    assert set(Counter(groups.get(fixed, fixed) for _, fixed in [*chosen, *more]).values()) == {2}


@pytest.mark.parametrize("number", [1, 2, 9])
def test_the_order_is_farthest_point_first(number):
    points = np.random.default_rng(number).normal(size=(number, 4))
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    order = spread_out(points)
    assert sorted(order) == list(range(number))
    assert order[0] == np.linalg.norm(points - points.mean(0), axis=1).argmin()
    for k in range(1, number):
        left = [i for i in range(number) if i not in order[:k]]
        assert order[k] == max(left, key=lambda i: distance[i, order[:k]].min())


def test_images_that_are_the_same_all_have_a_place():
    assert sorted(spread_out(np.zeros((4, 3)))) == [0, 1, 2, 3]


@pytest.mark.parametrize("shape", [(20, 24, 30), (1, 24, 30), (3, 5, 60)])
def test_a_description_tells_images_apart_and_nothing_of_brightness_or_size(shape):
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 2, *shape)).cumsum(3).astype(np.float32)
    vector = description(one)
    assert vector.shape == (2 * SIDE**3,)
    assert np.allclose(np.linalg.norm(vector.reshape(2, -1), axis=1), 1, atol=1e-5)
    assert np.allclose(vector.reshape(2, -1).mean(1), 0, atol=1e-5)
    assert np.allclose(description(3 * one + 7), vector, atol=1e-4)
    assert np.linalg.norm(description(other) - vector) > 0.5
    assert not description(np.full((1, *shape), 5.0)).any()


def test_images_that_are_not_looked_at_come_last(monkeypatch):
    """Looking at thousands would take too long; they are warped onto where more are asked for."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(targets, "DESCRIBED", 2)
    monkeypatch.setattr(targets, "load", lambda *_: (rng.random((1, 8, 8, 8)),))
    cases = ["a", "b", "c", "d", "e"]
    order = targets.far_apart_first(PreparedFolder("", dict.fromkeys(cases, ""), {}), cases)
    assert sorted(order) == cases
