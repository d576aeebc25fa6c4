"""Claims over draws, on numbers whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from nnunet_ssl.evaluation.draws import mean_of_units, mean_over_draws, share_of_gap, t_over_draws


def made_up(draws=5, cases=20, of_draw=0.0, of_case=0.0, rest=0.0, seed=0):
    rng = np.random.default_rng(seed)
    values = of_draw * rng.normal(size=(draws, 1)) + of_case * rng.normal(size=(1, cases))
    return values + rest * rng.normal(size=(draws, cases))


def test_nothing_varies():
    assert mean_over_draws(np.full((3, 20), 0.25)) == pytest.approx((0.25, 0.25, 0.25))
    assert t_over_draws(np.full((3, 20), 0.25)) == (0.25, 0.25, 0)
    assert t_over_draws(np.zeros((3, 20))) == (0, 0, 1)


def test_equal_draws_leave_the_bootstrap_over_cases():
    """As scipy's over the cases alone, and the same where they are five times as many."""
    values = made_up(of_case=1.0)
    interval = mean_over_draws(values)
    of_cases = stats.bootstrap((values[0],), np.mean, method="percentile", rng=np.random.default_rng(1))
    low, high = of_cases.confidence_interval
    assert interval.value == pytest.approx(values[0].mean())
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.05)


def test_equal_cases_leave_the_draws():
    """The variance of resampled means is s^2 / n, with n - 1 in s: too small by (n - 1) / n if n were drawn of n."""
    values = made_up(draws=8, of_draw=1.0)
    _, low, high = mean_over_draws(values)
    normal = 2 * 1.96 * values[:, 0].std(ddof=1) / np.sqrt(8)
    assert high - low == pytest.approx(normal, rel=0.05)


def test_students_interval_by_hand():
    values = np.array([1.0, 2.0, 3.0])[:, None] + np.zeros((1, 4))
    low, high, p = t_over_draws(values)
    half = 4.302653 / np.sqrt(3)  # t of 2 degrees of freedom; s is 1
    assert (low, high) == pytest.approx((2 - half, 2 + half), abs=1e-5)
    assert p == pytest.approx(0.074180, abs=1e-5)


@pytest.mark.parametrize(("of_draw", "of_case", "rest"), [(0.01, 0.02, 0.03), (0.003, 0.03, 0.03)])
def test_ninety_five_per_cent_of_the_intervals_hold_the_truth(of_draw, of_case, rest, monkeypatch):
    monkeypatch.setattr("nnunet_ssl.evaluation.draws.RESAMPLES", 500)
    held = 0
    for seed in range(200):
        _, low, high = mean_over_draws(made_up(5, 20, of_draw, of_case, rest, seed), seed)
        held += low <= 0 <= high
    assert 0.90 <= held / 200 <= 1.0


def test_share_of_the_gap():
    gap = 0.1 + made_up(of_draw=0.01, of_case=0.02, rest=0.02)
    assert share_of_gap(gap, gap) == pytest.approx((1, 1, 1))  # the upper row
    assert share_of_gap(0 * gap, gap) == pytest.approx((0, 0, 0))  # the lower row
    assert share_of_gap(-gap / 4, -gap) == pytest.approx((0.25, 0.25, 0.25))  # a distance falls
    value, low, high = share_of_gap(gap / 2 + made_up(rest=0.02, seed=1), gap)
    assert low < value < high
    assert value == pytest.approx(0.5, abs=0.1)


def test_no_share_of_no_gap():
    gain, gap = made_up(rest=1.0), made_up(rest=1.0, seed=1)
    assert np.isnan(share_of_gap(gain, gap)).all()


def test_where_nothing_is_defined_there_is_no_mean_rather_than_0():
    """HD95 of a network that predicts nothing but in one case."""
    values = np.full((3, 10), 5.0)
    values[1, 1:] = np.nan
    assert mean_over_draws(values) == pytest.approx((5.0, 5.0, 5.0))


def test_undefined_cases_do_not_count():
    values = np.full((3, 4), 0.5)
    values[0, 1] = values[1, 3] = np.nan
    assert mean_over_draws(values) == pytest.approx((0.5, 0.5, 0.5))


def test_mean_of_units():
    nan = float("nan")
    found = mean_of_units(np.array([1.0, 3.0, nan, 5.0, nan]), ["b", "b", "a", "a", "c"])
    np.testing.assert_array_equal(found, [2, 5, nan])  # aligned between rows and seeds, whatever is undefined
