"""Tiny folders of label maps, for the tests of evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

SHAPE = (6, 8, 10)
SPACING = (2.0, 1.0, 0.5)  # z, y, x


def write(file: Path, array: np.ndarray, spacing: Sequence[float] = SPACING, **geometry: Sequence[float]) -> None:
    """Write labels; ``geometry``: ``origin`` or ``direction`` in SimpleITK's axis order."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in reversed(spacing[-array.ndim :])])
    if "origin" in geometry:
        image.SetOrigin(geometry["origin"])
    if "direction" in geometry:
        image.SetDirection(geometry["direction"])
    sitk.WriteImage(image, str(file))


def labels(seed: int, num_labels: int = 3, shape: Sequence[int] = SHAPE) -> np.ndarray:
    """Boxes of each label on a background, a little different for each seed."""
    rng = np.random.default_rng(seed)
    array = np.zeros(shape, np.uint8)
    for label in range(1, num_labels + 1):
        low = rng.integers(0, np.array(shape) // 2)
        array[tuple(slice(a, a + rng.integers(2, n // 2 + 1)) for a, n in zip(low, shape, strict=True))] = label
    return array


def write_dataset(
    home: Path, methods: Sequence[str] = ("a",), num_cases: int = 4, ending: str = ".nii.gz", **dataset_json: object
) -> Path:
    """``labels`` with its dataset.json beside it, and a folder of predictions a method; returns the truth's folder."""
    content = {"labels": {"background": 0, "one": 1, "two": 2, "three": 3}, "file_ending": ending, **dataset_json}
    home.mkdir(parents=True, exist_ok=True)
    (home / "dataset.json").write_text(json.dumps(content))
    for case in range(num_cases):
        for i, folder in enumerate(("labels", *methods)):
            array = labels(10 * case + i)
            write(home / folder / f"case_{case}{ending}", array[0] if ending == ".png" else array)
    return home / "labels"
