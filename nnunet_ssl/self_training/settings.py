"""What a self-training is told, and the models in it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from nnunetv2.utilities.file_path_utilities import get_output_folder

NETWORK, ATLAS = "network", "atlas"  # the teachers


class Settings(NamedTuple):
    """Settings of a self-training, under the names of the command's arguments.

    Attributes:
        dataset: id or name of the raw dataset with ``imagesUn`` that the first teacher was trained on.
        configuration, folds, trainer: of the first teacher; the configuration also of the students.
        target_id: id of the first round's dataset; each further round has the next.
        by: ``confidence``, or ``agreement`` of two teachers.
        at_least: keep the cases whose confidence or agreement reaches it; None keeps a fraction.
        keep: the fraction of the cases to keep, the best ones; None keeps by ``at_least``.
        teachers: ``network``, ``atlas`` or both.
        plans, checkpoint: of teacher and students.
        student: trainer of the students; None for the teacher's.
        rounds: how many students to train; with 0 the first round's dataset is made, and nothing trained.
        warm: whether a student starts with the weights of its teacher.
        finish: epochs that the last student trains on the labels alone, as fold 1 of its dataset.
        device: ``cpu``, ``cuda`` or ``mps``, as nnU-Net's ``-device``.
        mirroring: whether the teacher predicts with nnU-Net's test-time mirroring.
        parts: predict in this many parts; only one part's probabilities are on the disk at a time.
        processes: of predicting and preprocessing; None leaves it to nnU-Net.
        copy: copy images instead of linking to them.
        dry_run: print the commands that are still to be run, and do nothing.
    """

    dataset: str
    configuration: str
    folds: tuple[str, ...]
    trainer: str
    plans: str
    checkpoint: str
    target_id: int
    teachers: tuple[str, ...]
    by: str
    at_least: float | None
    keep: float | None
    student: str | None
    rounds: int
    warm: bool
    finish: int | None
    device: str
    mirroring: bool
    parts: int
    processes: int | None
    copy: bool
    dry_run: bool


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
