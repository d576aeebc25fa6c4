"""Weights of terms and how they grow, by hand: a fifth of the training is a half of the first of two ramps."""

from __future__ import annotations

from math import exp

import pytest

SHORT, LONG = exp(-5 * 0.5**2), exp(-5 * 0.8**2)  # ramps of 0.4, and of the whole training
AT_A_FIFTH = {
    "CPS": {"cps": SHORT},
    "GACPS": {"cps": SHORT},
    "DTC": {"distance": 0.3, "dtc": LONG},
    "EntMin": {"entropy": 0.1 * LONG},
    "MCNetPlus": {"sup": 0.5, "sup_linear": 0.5, "sup_nearest": 0.5, "mutual": SHORT},
    "SASSNet": {"distance": 0.3, "adversarial": 0.01 * LONG},
    "SKCDF": {"sup_balanced": 1.0, "pseudo": LONG, "pseudo_balanced": LONG},
    "SASNet": {"seg_high": 0.5, "seg_low": 0.5, "plc": SHORT, "src": SHORT},
    "CauSSL": {"cps": SHORT, "dependence": 3.0},
    "DHC": {"cps": 0.1 * LONG},
    "ABD": {"cps": 0.2 * LONG, "displaced": 2.0},
    "MiDSS": {"consistency": LONG, "guided": LONG**2},
    "SSNet": {"smoothness": SHORT, "separation": 0.1 * SHORT},
}


@pytest.mark.parametrize("method", AT_A_FIFTH)
def test_weights_at_a_fifth_of_the_training(tiny, make_trainer, method):
    trainer = make_trainer(f"nnUNetTrainer{method}", tiny())
    trainer.global_step = trainer.total_steps // 5
    assert trainer.term_weights() == pytest.approx(AT_A_FIFTH[method], rel=1e-3)
