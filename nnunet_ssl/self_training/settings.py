"""What a self-training is told, and the models in it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from nnunetv2.utilities.file_path_utilities import get_output_folder

NETWORK, ATLAS = "network", "atlas"  # the teachers


class Settings(NamedTuple):
    """Settings of a self-training, under the names of the command's arguments."""

    dataset: str  # id or name of the raw dataset with imagesUn that the first teacher was trained on
    # configuration, folds, trainer: of the first teacher; the configuration also of the students
    configuration: str
    folds: tuple[str, ...]
    trainer: str
    # plans, checkpoint: of teacher and students
    plans: str
    checkpoint: str
    target_id: int  # id of the first round's dataset; each further round has the next
    teachers: tuple[str, ...]  # network, atlas or both
    by: str  # "confidence", or "agreement" of two teachers
    at_least: float | None  # keep the cases whose confidence or agreement reaches it; None keeps a fraction
    keep: float | None  # the fraction of the cases to keep, the best ones; None keeps by at_least
    student: str | None  # trainer of the students; None for the teacher's
    rounds: int  # how many students to train; with 0 the first round's dataset is made, and nothing trained
    warm: bool  # whether a student starts with the weights of its teacher
    finish: int | None  # epochs that the last student trains on the labels alone, as fold 1 of its dataset
    device: str  # cpu, cuda or mps, as nnU-Net's -device
    mirroring: bool  # whether the teacher predicts with nnU-Net's test-time mirroring
    parts: int  # predict in this many parts; only one part's probabilities are on the disk at a time
    processes: int | None  # of predicting and preprocessing; None leaves it to nnU-Net
    copy: bool  # copy images instead of linking to them
    dry_run: bool  # print the commands that are still to be run, and do nothing


class Model(NamedTuple):
    """A model, trained or to be trained; of several folds the mean predicts."""

    dataset: str
    trainer: str
    plans: str
    configuration: str
    folds: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Of all its folds."""
        return get_output_folder(self.dataset, self.trainer, self.plans, self.configuration)

    def fold(self, fold: str) -> Path:
        """The folder of one."""
        return Path(self.folder, f"fold_{fold}")
