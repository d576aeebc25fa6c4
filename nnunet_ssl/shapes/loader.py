"""Labeled cases and their warps in one dataset, and how often nnU-Net's loader draws each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from nnunet_ssl.unlabeled.loader import PreparedDataset


class JoinedDataset:
    """nnU-Net's dataset of a fold's training cases, and warps of them.

    Args:
        labeled: the training cases.
        places: warp -> the folder of its files.
    """

    def __init__(self, labeled: nnUNetBaseDataset, places: Mapping[str, str]) -> None:
        self._labeled, self._warps = labeled, PreparedDataset(places)
        self._is_warp = set(self._warps.identifiers)
        self.identifiers = [*labeled.identifiers, *self._warps.identifiers]

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict]:
        """As nnU-Net's."""
        return (self._warps if identifier in self._is_warp else self._labeled).load_case(identifier)


class WarpedShare:
    """The probabilities with which ``JoinedDataset``'s cases are drawn: real ones alike, and warps.

    A warp's share goes to each labeled case alike, and within it to each of its warps, so that a case with few good
    warps counts as much as the others.

    Args:
        labeled: the real cases.
        moving: warp -> the labeled case that it was made from, in the dataset's order.
        first, last: probability of a warp at the first and the last step; it changes linearly.
        steps: of the whole training.
    """

    def __init__(self, labeled: list[str], moving: Mapping[str, str], first: float, last: float, steps: int) -> None:
        number = Counter(moving.values())
        warps = [1 / number[case] / len(number) for case in moving.values()]
        self._real = np.array([1 / len(labeled)] * len(labeled) + [0.0] * len(warps))
        self._warps = np.array([0.0] * len(labeled) + warps)
        self.first, self.last, self.steps = first, last, steps

    def __call__(self, step: int) -> np.ndarray:
        """``[cases]`` float64, of sum 1."""
        share = self.first + (self.last - self.first) * min(1.0, step / max(1, self.steps - 1))
        return (1 - share) * self._real + share * self._warps
