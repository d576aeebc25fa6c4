"""Trained runs: one fold of a model each."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.checkpoints import read_checkpoint
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json
from nnunet_ssl.unlabeled.find import read_dataset_json, read_plans

FINAL = "checkpoint_final.pth"


@dataclass(frozen=True)
class TrainedRun:
    """One fold of a trained model."""

    name: str  # in figures
    trainer: str  # the class's name
    folder: Path  # <trainer>__<plans>__<configuration>
    fold: str  # a number, or all
    checkpoint: str  # file name of the weights
    key: str = ""  # in file names, where the trainer's name would not tell two runs apart
    predicted: Path | None = None  # folder with the label maps of all cases, once it is known
    how: str = ""  # they were made, in words for captions

    @property
    def fold_folder(self) -> Path:
        """Where the training wrote."""
        return self.folder / f"fold_{self.fold}"

    @property
    def checkpoint_file(self) -> Path:
        """The weights."""
        return self.fold_folder / self.checkpoint

    @property
    def reader(self) -> BaseReaderWriter:
        """nnU-Net's reader of this model's images and label maps."""
        return self.plans.image_reader_writer_class()

    @property
    def plans(self) -> PlansManager:
        """Of the model."""
        return read_plans(str(self.folder / "plans.json"), "Restore it: a model cannot be used without its plans.")


def find_runs(
    folders: Sequence[Path], fold: str, checkpoint: str = FINAL, names: Sequence[str] | None = None, option: str = "-tr"
) -> list[TrainedRun]:
    """Find the trained models.

    Args:
        folders: ``<trainer>__<plans>__<configuration>``, each once.
        fold, checkpoint: the same of all.
        names: one a model; by default the trainers' own, without what they share.
        option: that gave the folders: ``-tr``, or ``-m``, whose folders may be of one trainer.

    Raises:
        UserError: a model or name twice, too few names, or a model that is not there.
    """
    folders = [Path(os.path.abspath(folder)) for folder in folders]  # a link keeps its name
    trainers = [folder.name.split("__")[0] for folder in folders]
    if names is None:
        names = short_names(trainers)
        if len(set(names)) < len(set(folders)):
            raise UserError(f"{option} gives several models of the same trainer. Tell them apart with --names.")
    if len(names) != len(folders):
        raise UserError(f"--names gives {len(names)} name(s) for {len(folders)} model(s). Give one for each {option}.")
    for given, values in ((option, folders), ("--names", list(names))):
        for value in values:
            if values.count(value) > 1:
                raise UserError(f"{given} gives {value} twice. Give models and names once each.")
    runs = []
    for name, trainer, folder in zip(names, trainers, folders, strict=True):
        # digits tell models of one trainer apart, also on disks that know no capitals
        key = f"{trainer}_{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}" if option == "-m" else ""
        run = TrainedRun(name, trainer, folder, str(fold), checkpoint, key)
        for file in (folder / "plans.json", folder / "dataset.json", run.checkpoint_file):
            if not file.is_file():
                raise UserError(
                    f"{file} does not exist: there is no such trained model. Name folders "
                    "<trainer>__<plans>__<configuration> with -m, or check -d, -c, -f, -tr, -p and -chk, and train it "
                    "with nnUNetv2_train."
                )
        runs.append(run)
    return runs


def refuse_other_labels(runs: Iterable[TrainedRun], dataset_json: dict[str, Any]) -> None:
    """Refuse a model that was trained for other classes than the cases have.

    Raises:
        UserError: names its file.
    """
    for run in runs:
        labels = read_dataset_json(str(run.folder)).get("labels")
        if labels != dataset_json["labels"]:
            raise UserError(
                f"{run.folder / 'dataset.json'} has the labels {labels}, the dataset has {dataset_json['labels']}. "
                "Name the dataset of the models with -d."
            )


def short_names(trainers: Sequence[str]) -> list[str]:
    """The trainers' names without ``nnUNetTrainer`` and the number of epochs, where these do not tell them apart."""
    short = [without_epochs(trainer).removeprefix("nnUNetTrainer").strip("_") or "nnU-Net" for trainer in trainers]
    return short if len(set(short)) == len(short) else list(trainers)


def without_epochs(trainer: str) -> str:
    """``nnUNetTrainerCPS`` of ``nnUNetTrainerCPS_250epochs``."""
    return re.sub(r"_\d+epochs?$", "", trainer)


def settings_of(run: TrainedRun) -> dict[str, Any]:
    """The settings that a run wrote down; none of a trainer that is not of this package.

    Raises:
        UserError: the file cannot be read.
    """
    file = run.fold_folder / "ssl_settings.json"
    return read_json(file, "Restore it.", keys={"settings": dict})["settings"] if os.path.lexists(file) else {}


def load_predictor(run: TrainedRun, device: str, tta: bool = True) -> nnUNetPredictor:
    """nnU-Net's predictor with a run's weights, and with nnU-Net's mirroring if asked for.

    Raises:
        UserError: the weights cannot be loaded.
    """
    remedy = "Restore it, or name another with -chk."
    # nnU-Net's predictor runs what a checkpoint calls when it is read
    read_checkpoint(run.checkpoint_file, remedy, {"network_weights": dict})
    try:
        predictor = nnUNetPredictor(
            use_mirroring=tta, perform_everything_on_device=device == "cuda", device=torch.device(device),
            allow_tqdm=False,
        )  # fmt: skip
        predictor.initialize_from_trained_model_folder(str(run.folder), (run.fold,), run.checkpoint)
    except Exception as error:
        raise UserError(f"{run.checkpoint_file} cannot be loaded ({reason(error)}). {remedy}") from error
    return predictor


def reason(error: Exception) -> str:
    """The last line that an error of somebody else's code says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[-1]}"
