"""Jobs in other processes."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from nnunet_ssl import pools
from nnunet_ssl.errors import UserError


def square(number: int) -> int:
    return number * number


def die_elsewhere(number: int) -> int:
    if multiprocessing.parent_process() is not None:
        os._exit(9)
    return number


def test_all_outcomes_come_from_here_and_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "PAYS_AFTER", -1.0)
    assert sorted(pools.all_outcomes(square, [(n,) for n in range(8)], 2, "Squaring")) == [n * n for n in range(8)]


def test_a_process_that_is_killed_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "PAYS_AFTER", -1.0)
    with pytest.raises(UserError, match=r"squaring: a process was killed, most likely for lack of memory"):
        pools.all_outcomes(die_elsewhere, [(n,) for n in range(8)], 2, "Squaring")
