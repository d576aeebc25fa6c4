"""Claims over draws: several labeled sets, all judged by the same cases.

Draws and cases are crossed: a draw has a value for each case. Both are resampled, independently of each other, and a
value counts as often as its draw times as often as its case (Owen, The pigeonhole bootstrap, Ann. Appl. Stat.
1:386-411, 2007). Of D draws D - 1 are resampled, which makes the variance between few draws unbiased (Rao and Wu,
Resampling inference with complex survey data, JASA 83:231-241, 1988). The cases of one patient count as one, by their
mean: see ``mean_of_units``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from nnunet_ssl.evaluation.compare import RESAMPLES
from nnunet_ssl.evaluation.summary import nanmean

MIN_DRAWS = 3


class Interval(NamedTuple):
    """A value and its 95 % interval, NaN where there is none."""

    value: float
    low: float
    high: float


def mean_over_draws(values: np.ndarray, seed: int = 0) -> Interval:
    """Mean of ``[draws, cases]``, with the interval of the bootstrap over both.

    Args:
        values: NaN where undefined; a draw has at least one that is not.
        seed: of the resampling.
    """
    means = _resampled_means([values], seed)[0]
    return Interval(_mean(values), *_percentiles(means))


def share_of_gap(gain: np.ndarray, gap: np.ndarray, seed: int = 0) -> Interval:
    """What share of ``gap`` the ``gain`` is: (row - lower) / (upper - lower), 1 where the row reaches the upper one.

    Both, ``[draws, cases]`` of row - lower and of upper - lower, NaN where undefined, are resampled alike. There is no
    share where the gap's own interval holds 0.
    """
    gains, gaps = _resampled_means([gain, gap], seed)
    low, high = _percentiles(gaps)
    if not low * high > 0:
        return Interval(math.nan, math.nan, math.nan)
    return Interval(_mean(gain) / _mean(gap), *_percentiles(gains / gaps))


def t_over_draws(values: np.ndarray) -> tuple[float, float, float]:
    """Student's 95 % interval of the mean over draws and its p, with n - 1 degrees of freedom: low, high, p.

    A draw is its mean over cases, of ``[draws, cases]``.
    """
    draws = np.nanmean(values, axis=1)
    if np.ptp(draws) == 0:
        return float(draws[0]), float(draws[0]), 0.0 if draws[0] else 1.0
    test = stats.ttest_1samp(draws, 0)
    low, high = test.confidence_interval(0.95)
    return float(low), float(high), float(test.pvalue)


def mean_of_units(values: np.ndarray, units: Sequence[str]) -> np.ndarray:
    """``[units]``: of each patient, or another unit, the mean of its ``[cases]`` without NaN; NaN if it has none else.

    ``units`` says of each case which one it is of. They come as they come first.
    """
    values, names = np.asarray(values, float), np.asarray(units)
    return np.array([nanmean(values[names == name]) for name in dict.fromkeys(units)])


def _mean(values: np.ndarray) -> float:
    return float(np.mean(np.nanmean(values, axis=1)))


def _resampled_means(several: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """``[RESAMPLES]`` means of each array ``[draws, cases]``, all of the same resampled draws and cases."""
    rng = np.random.default_rng(seed)
    draws, cases = several[0].shape
    of_draw = rng.multinomial(draws - 1, np.full(draws, 1 / draws), RESAMPLES)  # [RESAMPLES, draws]
    of_case = rng.multinomial(cases, np.full(cases, 1 / cases), RESAMPLES)  # [RESAMPLES, cases]
    means = []
    for values in several:
        defined = ~np.isnan(values)
        total = of_case @ np.where(defined, values, 0).T  # [RESAMPLES, draws]
        with np.errstate(invalid="ignore"):  # no defined case among a draw's resampled ones, or in no draw: NaN, not 0
            by_draw = total / (of_case @ defined.T)
            weight = of_draw * ~np.isnan(by_draw)
            means.append((weight * np.nan_to_num(by_draw)).sum(1) / weight.sum(1))
    return means


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    """Of those resamples in which something is defined; NaN where none is."""
    defined = values[~np.isnan(values)]
    low, high = np.quantile(defined, [0.025, 0.975]) if len(defined) else (math.nan, math.nan)
    return float(low), float(high)
