import math
from itertools import pairwise

import pytest

from nnunet_ssl.losses.ramps import sigmoid_rampup


def test_closed_form():
    assert sigmoid_rampup(0, 100) == pytest.approx(math.exp(-5))
    assert sigmoid_rampup(50, 100) == pytest.approx(math.exp(-1.25))
    assert sigmoid_rampup(100, 100) == 1.0


def test_it_grows_and_then_stays():
    values = [sigmoid_rampup(step, 40) for step in range(80)]
    assert all(a < b for a, b in pairwise(values[:41]))
    assert set(values[40:]) == {1.0}


@pytest.mark.parametrize("length", [0, -1, 0.0])
def test_no_length_means_no_rampup(length):
    assert sigmoid_rampup(0, length) == 1.0
