"""How often the 95 % intervals over labeled sets hold the truth, on made-up benchmarks (docs/evaluation.md).

python scripts/coverage_of_intervals.py
"""

from __future__ import annotations

import numpy as np

from nnunet_ssl.evaluation import draws

CASES, BENCHMARKS = 40, 600
draws.RESAMPLES = 1500  # of each, for the sake of time


def coverage(sets: int, of_set: float, of_case: float, rest: float) -> tuple[float, float]:
    """Share of made-up benchmarks whose interval holds the true difference, 0: bootstrap, Student."""
    rng, units, held = np.random.default_rng(0), [f"{i:03d}" for i in range(CASES)], np.zeros(2)
    for seed in range(BENCHMARKS):
        values = of_set * rng.normal(size=(sets, 1)) + of_case * rng.normal(size=(1, CASES))
        values = values + rest * rng.normal(size=(sets, CASES))
        _, low, high = draws.mean_over_draws(values, units, seed)
        t_low, t_high, _ = draws.t_over_draws(values)
        held += [low <= 0 <= high, t_low <= 0 <= t_high]
    return tuple(held / BENCHMARKS)


if __name__ == "__main__":
    for deviations in ((1.0, 2.0, 3.0), (2.0, 1.0, 1.0), (0.3, 3.0, 3.0)):
        for sets in (3, 5):
            bootstrap, student = coverage(sets, *deviations)
            print(f"{sets} sets, {' / '.join(map(str, deviations))}: bootstrap {bootstrap:.2f}, t {student:.2f}")
