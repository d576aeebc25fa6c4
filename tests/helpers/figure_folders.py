"""Made-up nnU-Net folders with finished runs, for the tests of the figures: nothing in them was trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.figures.options import FigureOptions, find_classes
from nnunet_ssl.figures.runs import TrainedRun, find_runs
from nnunet_ssl.figures.test_set import Case, find_cases

SPACING = (4.0, 1.0, 2.0)  # z y x
SHAPE = (7, 12, 10)
TRAINERS = ("nnUNetTrainerLabeledOnly_2epochs", "nnUNetTrainerSHTA_CPS_2epochs")
LABELS = {"background": 0, "shell": 1, "core": 2}


@dataclass(frozen=True)
class MadeUp:
    """Where it all lies."""

    raw: Path
    results: Path
    out: Path

    def truth(self, case: str) -> np.ndarray:
        return read(self.raw / "labelsTr" / f"{case}.nii.gz")

    def prediction(self, trainer: str, case: str) -> np.ndarray:
        return read(self.fold(trainer) / "validation" / f"{case}.nii.gz")

    def fold(self, trainer: str) -> Path:
        return self.results / f"{trainer}__nnUNetPlans__3d_fullres" / "fold_0"


def write(array: np.ndarray, file: Path, spacing: Sequence[float] = SPACING) -> None:
    """Write an array as NIfTI."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in reversed(spacing)])
    sitk.WriteImage(image, str(file))


def read(file: Path) -> np.ndarray:
    """Read it back, past the code that is tested."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file))).astype(int)


def make_folders(folder: Path, num_cases: int = 3, labels: dict | None = None, ignore: bool = False) -> MadeUp:
    """Dataset990_MadeUp: validation cases ``a``, ``b``, ..., and two runs with their predictions of them."""
    rng = np.random.default_rng(0)
    made = MadeUp(folder / "raw/Dataset990_MadeUp", folder / "results/Dataset990_MadeUp", folder / "out")
    names = [chr(ord("a") + i) for i in range(num_cases)]
    labels = dict(labels or LABELS) | ({"ignore": 3} if ignore else {})
    dataset_json = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": num_cases, "file_ending": ".nii.gz"}
    if any(isinstance(value, list) for value in labels.values()):
        dataset_json["regions_class_order"] = [1, 2]
    for trainer in TRAINERS:  # validation comes after training
        model = made.fold(trainer).parent
        made.fold(trainer).mkdir(parents=True)
        (model / "dataset.json").write_text(json.dumps(dataset_json))
        (model / "plans.json").write_text(json.dumps({"image_reader_writer": "SimpleITKIO", "configurations": {}}))
        (made.fold(trainer) / "checkpoint_final.pth").touch()
    for name in names:
        truth = np.zeros(SHAPE, np.uint8)
        truth[1:6, 2:10, 2:8] = rng.integers(1, 3, (5, 8, 6))
        truth[5, 3:] = 0  # a thin end
        if ignore:
            truth[:, :3] = 3
        write((truth * 50 + rng.normal(0, 5, SHAPE)).astype(np.float32), made.raw / f"imagesTr/{name}_0000.nii.gz")
        write(truth, made.raw / f"labelsTr/{name}.nii.gz")
        for trainer in TRAINERS:
            guess = np.where(rng.random(SHAPE) < 0.3, rng.integers(0, 3, SHAPE), np.minimum(truth, 2)).astype(np.uint8)
            write(guess, made.fold(trainer) / f"validation/{name}.nii.gz")
    (made.raw / "dataset.json").write_text(json.dumps(dataset_json))
    preprocessed = folder / "preprocessed/Dataset990_MadeUp"
    preprocessed.mkdir(parents=True)
    (preprocessed / "splits_final.json").write_text(json.dumps([{"train": [], "val": names}]))
    return made


def set_environment(monkeypatch: object, folder: Path) -> None:
    """nnU-Net's variables for ``make_folders(folder)``."""
    for variable in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{variable}", str(folder / variable))


def everything(made: MadeUp, chosen: Sequence[str] | None = None) -> tuple[list[TrainedRun], list[Case], FigureOptions]:
    """Runs, cases and options as the command makes them; nnU-Net's variables must be set."""
    content = json.loads((made.raw / "dataset.json").read_text())
    runs = find_runs([made.fold(trainer).parent for trainer in TRAINERS], "0")
    return runs, find_cases(990, "0"), FigureOptions(content, *find_classes(content, chosen), dataset=made.raw.name)
