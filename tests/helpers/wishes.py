"""What tests of warps ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.datasets import TinyDataset
from helpers.prepared import prepare
from nnunet_ssl.shapes.warped import prepare_warps
from nnunet_ssl.shapes.wish import WarpedFolder, Wish


def wish(
    dataset: TinyDataset,
    labeled: tuple[str, ...] = ("tr_00", "tr_01"),
    validation: tuple[str, ...] = (),
    plans: dict | None = None,
    **more: Any,
) -> Wish:
    """Two labeled cases unless told otherwise."""
    plans = plans or dataset.plans
    prepared = prepare(dataset, plans=plans)
    return Wish(dataset.name, plans, dataset.configuration, dataset.dataset_json, labeled, validation, prepared, **more)


def warps(dataset: TinyDataset, *args: Any, processes: int = 1, reading: bool = False, **more: Any) -> WarpedFolder:
    """Make what is wished for."""
    return prepare_warps(wish(dataset, *args, **more), processes, reading)


def warped_in(dataset: TinyDataset) -> Path:
    return dataset.preprocessed / f"{dataset.plans_name}_{dataset.configuration}_warped"


def manifest(dataset: TinyDataset) -> dict:
    return json.loads((warped_in(dataset) / "manifest.json").read_text())


def files(dataset: TinyDataset) -> dict[str, tuple]:
    """Inode and time of each file of a listed warp: one that was made again has others."""
    folder = warped_in(dataset)
    listed = [folder / e["part"] / case / name for case, e in manifest(dataset)["cases"].items() for name in e["files"]]
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in listed}
