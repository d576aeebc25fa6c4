"""Seeds: every random draw of a run follows from one number, so that a run can be repeated and resumed."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A seed below 2**32 for a purpose such as ``("batch", 17)``, independent of those for other purposes."""
    words = [zlib.crc32(word.encode()) if isinstance(word, str) else word for word in purpose]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1)[0])


@contextmanager
def seeded(seed: int, *purpose: str | int) -> Iterator[None]:
    """Run the body with torch's, numpy's and Python's CPU generators seeded, and put them back afterwards."""
    value = derived_seed(seed, *purpose)
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.default_generator.manual_seed(value)  # not torch.manual_seed: workers must not touch CUDA
            np.random.seed(value)
            random.seed(value)
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
