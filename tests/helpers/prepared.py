"""Unlabeled images as they are prepared, and what is then on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from helpers.datasets import TinyDataset, write_images
from nnunet_ssl.unlabeled.prepare import prepare_unlabeled
from nnunet_ssl.unlabeled.store import PreparedFolder


def prepare(
    dataset: TinyDataset, num_processes: int = 1, plans: dict | None = None, reading: bool = False
) -> PreparedFolder:
    return prepare_unlabeled(
        dataset.name,
        PlansManager(plans or dataset.plans),
        dataset.configuration,
        dataset.dataset_json,
        dataset.cases("imagesTr"),
        num_processes,
        reading,
    )


def load(folder: Path | str, case: str) -> tuple[np.ndarray, np.ndarray, dict]:
    data, seg, _, properties = infer_dataset_class(str(folder))(str(folder), [case]).load_case(case)
    return data[:], seg[:], properties


def prepared_in(dataset: TinyDataset) -> Path:
    return dataset.preprocessed / f"{dataset.plans_name}_{dataset.configuration}_unlabeled"


def fingerprint(folder: Path | str) -> dict[str, tuple]:
    """Place, inode, mtime and size of each prepared file that is listed: one that was made again has others."""
    files = [Path(folder) / e["part"] / case / name for case, e in recorded(folder).items() for name in e["files"]]
    return {f.name: (str(f), f.stat().st_ino, f.stat().st_mtime_ns, f.stat().st_size) for f in files}


def recorded(folder: Path | str) -> dict[str, dict]:
    """The manifest's cases."""
    manifest = Path(folder) / "manifest.json"
    return json.loads(manifest.read_text())["cases"] if manifest.exists() else {}


def made(*cases: str) -> set[str]:
    return {f"{case}{end}" for case in cases for end in (".b2nd", "_seg.b2nd", ".pkl")}


def on_disk(folder: Path | str) -> set[str]:
    """What there is of cases, listed or not."""
    return {file.name for file in Path(folder).glob("part_*/*/*")}


def image(dataset: TinyDataset, case: str, folder: str = "imagesUn") -> Path:
    return dataset.raw / folder / f"{case}_0000{dataset.recipe.file_ending}"


def add_images(dataset: TinyDataset, number: int, shape: tuple[int, ...] | None = None, prefix: str = "extra") -> None:
    rng = np.random.default_rng(7)
    for i in range(number):
        image = rng.normal(100, 20, (1, *(shape or dataset.recipe.shape))).astype(np.float32)
        write_images(dataset.recipe, dataset.raw / "imagesUn", f"{prefix}{i:03d}", image)
