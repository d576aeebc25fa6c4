"""How often labeled cases and warps are drawn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nnunet_ssl.shapes.loader import WarpedShare

MOVING = {"a__x": "a", "a__y": "a", "a__z": "a", "c__x": "c"}  # b has no good warp


@pytest.mark.parametrize(("first", "last"), itertools.product((0.0, 0.3, 1.0), repeat=2))
def test_shares_are_exact_at_every_step(first, last):
    share = WarpedShare(["a", "b", "c"], MOVING, first, last, steps=11)
    for step in range(13):
        wanted = first + (last - first) * min(step, 10) / 10
        p = share(step)
        assert p.shape == (7,)
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert (p >= 0).all()
        assert p[:3] == pytest.approx([(1 - wanted) / 3] * 3)
        assert p[3:] == pytest.approx([wanted / 6] * 3 + [wanted / 2])  # a case's warps together as much as another's


def test_a_training_of_one_step_has_the_first_share():
    assert WarpedShare(["a"], {"a__x": "a"}, 0.2, 0.8, steps=1)(0) == pytest.approx([0.8, 0.2])


def test_numpy_draws_with_them():
    p = WarpedShare(["a", "b", "c"], MOVING, 0.5, 0.5, 10)(0)
    drawn = np.random.default_rng(0).choice(7, 20000, p=p)
    assert np.bincount(drawn, minlength=7) / 20000 == pytest.approx(p, abs=0.02)
