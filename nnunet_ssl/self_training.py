"""Offline self-training in rounds: predict, keep the best, make a dataset of them, train on it, again.

Each round begins with the unlabelled images of the first dataset, all of them, and with the model that the last round
trained: what was kept in one round may be labelled otherwise, or dropped, in the next. Predicting, moving the plans,
preprocessing and training are nnU-Net's own commands; a step whose result is there is skipped, so a stopped run goes on
where it was.

Who teaches: a network, an atlas (the fold's labelled cases, registered onto each image), or both. The atlas stays the
same in all rounds.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2.configuration import default_num_processes
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.errors import UserError
from nnunet_ssl.export import RESTORE, find_model_folder
from nnunet_ssl.files import read_json, stamp, writing
from nnunet_ssl.shapes.votes import Electorate, prepare_votes
from nnunet_ssl.stock_commands import of_this_python, running
from nnunet_ssl.unlabeled.find import (
    PSEUDOLABELED,
    UNLABELED_FOLDER,
    read_dataset_json,
    read_plans,
    required_folder,
    resolve_dataset,
)
from nnunet_ssl.unlabeled.folds import SPLITS
from nnunet_ssl.unlabeled.prepare import prepare_unlabeled
from nnunet_ssl.unlabeled.pseudolabel import (
    REPORT,
    Predictions,
    Source,
    differences,
    read_source,
    stored_confidences,
    write_pseudolabeled,
)
from nnunet_ssl.unlabeled.raw_dataset import refuse_existing

PREPARE = "An atlas needs the preprocessed labelled cases: run nnUNetv2_plan_and_preprocess, or name the plans with -p."
ATTEMPTS = 2  # to predict a case
NETWORK, ATLAS = "network", "atlas"  # the teachers
TO_PREDICT = "to_predict"  # links to the images that are still to be predicted, where these are not all


class Teacher(NamedTuple):
    """A model that predicts: a dataset's, of one fold or the mean of several."""

    dataset: str
    folds: tuple[str, ...]

    @property
    def fold(self) -> str:
        """In names."""
        return "_".join(self.folds)


class Training(NamedTuple):
    """A training that the command starts."""

    dataset: str
    trainer: str
    fold: str
    warm: bool


@dataclass(frozen=True)
class SelfTraining:
    """Self-training of one model.

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
        parts: predict in so many parts, of which only one has its probabilities on the disk at a time.
        processes: of predicting and preprocessing; None leaves it to nnU-Net.
        copy: copy images instead of linking to them.
        dry_run: print the commands that are still to be run, and do nothing.
    """

    dataset: str
    configuration: str
    folds: tuple[str, ...]
    trainer: str
    target_id: int
    by: str
    at_least: float | None
    keep: float | None = None
    teachers: tuple[str, ...] = (NETWORK,)
    plans: str = "nnUNetPlans"
    checkpoint: str = "checkpoint_final.pth"
    student: str | None = None
    rounds: int = 0
    warm: bool = False
    finish: int | None = None
    device: str = "cuda"
    mirroring: bool = True
    parts: int = 1
    processes: int | None = None
    copy: bool = False
    dry_run: bool = False

    def run(self) -> list[str]:
        """Do all of it; returns the names of the datasets.

        Raises:
            UserError: no trained model, no unlabelled image, an id that is taken, a command that failed, or a file that
                cannot be read or written.
        """
        with writing("Started again with the same options, this command goes on from here."):
            return self._run()

    def _run(self) -> list[str]:
        dataset = resolve_dataset(self.dataset)
        self._refuse_what_cannot_work(dataset)
        source = read_source(dataset, *self.folds)
        targets = [self._target(source, number) for number in range(1, max(1, self.rounds) + 1)]
        for target in targets:
            self._refuse_taken(target)

        teacher = Teacher(dataset, self.folds)
        for number, target in enumerate(targets, 1):
            print(f"\nRound {number}: {target}, by {self._who(teacher)}", flush=True)
            self._make_dataset(source, teacher, target)
            if not self.dry_run:
                self._complete_preprocessed(dataset, target)
            if self.rounds:
                self._move_plans(dataset, target)
                self._preprocess(target)
                self._train(self._student(target), teacher)
            teacher = Teacher(target, ("0",))
        if self.finish:
            print(f"\nFinish: {self.finish} epochs on the labels alone, as fold 1 of {targets[-1]}", flush=True)
            self._train(self._finished(targets[-1]), teacher)
        if not self.rounds and not self.dry_run:
            print("Train on it, for instance:")
            for words in (self._move_command(dataset, targets[0]), self._preprocess_command(targets[0]),
                          self._train_command(self._student(targets[0]), teacher)):  # fmt: skip
                print(f"  {shlex.join(words)}")
        return targets

    # ------------------------------------------------------------------ checks

    def _refuse_what_cannot_work(self, dataset: str) -> None:
        if NETWORK in self.teachers:
            find_model_folder(dataset, self.trainer, self.plans, self.configuration)
        for fold in self.folds if NETWORK in self.teachers else ():
            checkpoint = self._checkpoint(Teacher(dataset, (fold,)))
            if not os.path.isfile(checkpoint):
                raise UserError(
                    f"no checkpoint {checkpoint}. Train this fold to its end, or name another with -f or -chk."
                )
        if ATLAS in self.teachers:
            self._electorate(read_source(dataset, *self.folds))
        plans_manager, _ = self._plans_of(dataset)
        if plans_manager.get_configuration(self.configuration).previous_stage_name is not None:
            raise UserError(
                f"-c {self.configuration} needs the predictions of a previous stage, which unlabelled images do not "
                "have; use 3d_fullres or 3d_lowres."
            )
        plans_file = os.path.join(required_folder("nnUNet_preprocessed"), dataset, f"{self.plans}.json")
        if self.rounds and not os.path.isfile(plans_file):
            raise UserError(f"{plans_file} does not exist, but the students are to be trained with these plans.")
        if self.student:
            self._refuse_unknown_trainer(self.student, f"--student {self.student}", "name")
        if self.finish:
            self._refuse_unknown_trainer(self._finishing_trainer, f"--finish {self.finish}", "number of epochs")

    def _refuse_unknown_trainer(self, name: str, option: str, what: str) -> None:
        try:
            recursive_find_trainer_class_by_name(name)
        except RuntimeError as error:
            raise UserError(f"{option}: nnU-Net has no trainer {name}. Choose another {what}.") from error

    def _target(self, source: Source, number: int) -> str:
        return f"Dataset{self.target_id + number - 1:03d}_{source.name.partition('_')[2]}_pseudo{number}"

    def _refuse_taken(self, target: str) -> None:
        """Refuse an id that another dataset has; one that an earlier run of this command made is taken up."""
        target_id = int(target[len("Dataset") :].partition("_")[0])
        if set(find_candidate_datasets(target_id)) != {target} or not self._record_file(target).is_file():
            refuse_existing(target_id)

    # ------------------------------------------------------------------ steps

    def _make_dataset(self, source: Source, teacher: Teacher, target: str) -> None:
        """Predict the unlabelled images and write the dataset, unless it is there."""
        folder = self._predicted(teacher)
        record = self._record_file(target)
        if record.is_file() and not self._waits(teacher):
            remedy = "It says how this dataset was made: restore it, or choose another -o."
            made_with = read_json(record, remedy, keys={"made_with": dict})["made_with"]
            if changed := differences(made_with, self._made_with(source, teacher)):
                raise UserError(
                    f"{record.parent} was made with other options or by another model: {'; '.join(changed)}. Go back "
                    "to these, or choose another -o."
                )
            self._skip(f"{target} is there")
        elif self.dry_run:
            self._show_prediction(source, teacher, folder)
            which = (
                f"of {self.by} {self.at_least:g} or more"
                if self.keep is None
                else f"of the best {self.keep:g} of all cases"
            )
            self._skip(f"here {target} is written, with the predictions {which}")
        else:
            predictions = self._predict(source, teacher, folder)
            options = (self.at_least, self.keep, self._made_with(source, teacher), self.copy, self.by)
            split = write_pseudolabeled(target, source, predictions, *options, finish=self.finish is not None)
            num_kept = len(split.labeled) - len(source.labeled)
            print(
                f"{target}: {len(source.labeled)} labelled, {num_kept} pseudo-labelled, {len(split.unlabeled)} "
                f"unlabelled and {len(split.validation)} validation cases\n  the {self.by} of each: "
                f"{record.parent / REPORT}",
                flush=True,
            )
            if not split.unlabeled:
                print("  No image is left without a label: a trainer that learns from such images cannot go on here.")

    def _predict(self, source: Source, teacher: Teacher, folder: str) -> Predictions:
        """Predict with nnU-Net's own command what is not predicted yet, part by part."""
        plans_manager, dataset_json = self._plans_of(teacher.dataset)
        ending = dataset_json["file_ending"]
        predictions = Predictions(folder, self._identity(source, teacher), source.unlabeled, ending)
        if not predictions.missing():
            self._skip(f"the predictions in {folder} are there")
            with suppress(OSError):  # times of copies spare reading them; what cannot be written can still be read
                predictions.save()
            return predictions
        votes = self._votes(source) if ATLAS in self.teachers else None
        with_network = NETWORK in self.teachers
        predictions.begin()
        predictions.collect(plans_manager, dataset_json, votes, with_network)  # also what a stopped run has left
        for part in range(self.parts if with_network else 0):
            for _ in range(ATTEMPTS):
                if cases := predictions.missing(part, self.parts):
                    images = self._input_folder(source, folder, cases)
                    self._link_images(source, images, cases)
                    self._command(self._predict_command(teacher, images, folder))
                    predictions.collect(plans_manager, dataset_json, votes)
        shutil.rmtree(os.path.join(folder, TO_PREDICT), ignore_errors=True)
        if missing := predictions.missing():
            raise UserError(
                f"nnUNetv2_predict left no usable prediction of {missing[0]} in {folder}, nor of "
                f"{len(missing) - 1} other(s). Look for what it printed above, and at the space on that disk."
            )
        return predictions

    def _votes(self, source: Source) -> dict[str, str]:
        """What the labelled cases say of each unlabelled one: case -> files, less their endings."""
        electorate = self._electorate(source)
        processes = self.processes or default_num_processes
        of_dataset = (source.name, PlansManager(electorate.plans), self.configuration, electorate.dataset_json)
        images = prepare_unlabeled(*of_dataset, list(source.images), processes, reading=True)
        votes = prepare_votes(electorate, images, processes)
        return {case: os.path.join(votes.place(case), case) for case in images.cases}

    def _electorate(self, source: Source) -> Electorate:
        """Those who vote: the labelled cases, as they are prepared."""
        folder = os.path.join(required_folder("nnUNet_preprocessed"), source.name)
        plans_manager = read_plans(os.path.join(folder, f"{self.plans}.json"), PREPARE, self.configuration)
        return Electorate(
            source.name,
            plans_manager.plans,
            self.configuration,
            source.dataset_json,
            "_".join(self.folds),
            tuple(source.labeled),
        )

    def _show_prediction(self, source: Source, teacher: Teacher, folder: str) -> None:
        identity = None if self._waits(teacher) else self._identity(source, teacher)
        predictions = Predictions(folder, identity, source.unlabeled, source.dataset_json["file_ending"])
        if not predictions.missing():
            self._skip(f"the predictions in {folder} are there")
        if ATLAS in self.teachers:
            self._skip("here labelled images are registered onto each unlabelled one, unless that is done")
        for part in range(self.parts if NETWORK in self.teachers else 0):
            if cases := predictions.missing(part, self.parts):
                self._command(self._predict_command(teacher, self._input_folder(source, folder, cases), folder))

    def _input_folder(self, source: Source, folder: str, cases: list[str]) -> str:
        """Where nnU-Net finds these images and no others."""
        if len(cases) == len(source.unlabeled):
            return os.path.join(source.folder, UNLABELED_FOLDER)
        return os.path.join(folder, TO_PREDICT)

    def _link_images(self, source: Source, images: str, cases: list[str]) -> None:
        """Fill ``TO_PREDICT`` with these cases, each file with the spacing file that nnU-Net's TIFF reader wants."""
        if os.path.basename(images) != TO_PREDICT:
            return
        shutil.rmtree(images, ignore_errors=True)
        os.makedirs(images)
        put = shutil.copy2 if self.copy else os.symlink
        for case in cases:
            spacing = os.path.join(source.folder, UNLABELED_FOLDER, f"{case}.json")
            for file in [*source.unlabeled[case], *([spacing] if os.path.isfile(spacing) else [])]:
                put(os.path.abspath(file), os.path.join(images, os.path.basename(file)))

    def _complete_preprocessed(self, source: str, target: str) -> None:
        """What training reads from nnUNet_preprocessed and nnUNetv2_preprocess does not write.

        The fingerprint is the one that the plans were made from; nnU-Net only files it with the model.
        """
        raw = self._record_file(target).parent
        folder = os.path.join(required_folder("nnUNet_preprocessed"), target)
        os.makedirs(folder, exist_ok=True)
        for file in ("dataset.json", SPLITS):
            shutil.copyfile(raw / file, os.path.join(folder, file))
        fingerprint = "dataset_fingerprint.json"
        shutil.copyfile(os.path.join(self._plans_folder(source), fingerprint), os.path.join(folder, fingerprint))

    def _move_plans(self, source: str, target: str) -> None:
        """The first dataset's plans, so that network, spacing and normalisation stay what they were."""
        if self._preprocessed_mark(target).exists():
            return self._skip(f"{self.plans} of {target} are there")
        return self._command(self._move_command(source, target))

    def _preprocess(self, target: str) -> None:
        if self._preprocessed_mark(target).exists():
            return self._skip(f"{self.configuration} of {target} is preprocessed")
        self._command(self._preprocess_command(target))
        if not self.dry_run:
            self._preprocessed_mark(target).touch()
        return None

    def _train(self, student: Training, teacher: Teacher) -> None:
        if self._is_trained(student):
            return self._skip(f"the model of {student.dataset}, fold {student.fold} is trained")
        return self._command(self._train_command(student, teacher))

    # ------------------------------------------------------------------ commands

    def _predict_command(self, teacher: Teacher, images: str, folder: str) -> list[str]:
        words = ["nnUNetv2_predict", "-i", images, "-o", folder]
        words += ["-d", teacher.dataset, "-c", self.configuration, "-f", *teacher.folds]
        words += ["-tr", self._trainer_of(teacher.dataset)]
        words += ["-p", self.plans, "-chk", self.checkpoint, "-device", self.device, "--save_probabilities"]
        if not self.mirroring:
            words += ["--disable_tta"]
        if self.processes is not None:
            words += ["-npp", str(self.processes), "-nps", str(self.processes)]
        return words

    def _move_command(self, source: str, target: str) -> list[str]:
        words = ["nnUNetv2_move_plans_between_datasets", "-s", source, "-t", target]
        return [*words, "-sp", self.plans, "-tp", self.plans]

    def _preprocess_command(self, target: str) -> list[str]:
        words = ["nnUNetv2_preprocess", "-d", str(int(target[len("Dataset") :].partition("_")[0]))]
        words += ["-c", self.configuration, "-plans_name", self.plans]
        return words if self.processes is None else [*words, "-np", str(self.processes)]

    def _train_command(self, student: Training, teacher: Teacher) -> list[str]:
        words = ["nnUNetv2_train", student.dataset, self.configuration, student.fold]
        words += ["-tr", student.trainer, "-p", self.plans, "-device", self.device]
        if any(self._fold_of(student).glob("checkpoint_*.pth")):
            return [*words, "--c"]
        return [*words, *(["-pretrained_weights", self._checkpoint(teacher)] if student.warm else [])]

    def _command(self, words: list[str]) -> None:
        """Run one of nnU-Net's commands; what it prints goes where our own output goes.

        Raises:
            UserError: it failed.
        """
        print(f"  $ {shlex.join(words)}", flush=True)
        if self.dry_run:
            return
        with running(of_this_python(words, self.device)) as process:
            code = process.wait()
        if code != 0:
            raise UserError(
                f"{words[0]} ended with exit code {code}; what it printed above says why. Started again "
                "with the same options, this command goes on from here."
            )

    def _skip(self, what: str) -> None:
        print(f"  # {what}", flush=True)

    # ------------------------------------------------------------------ where things are

    def _trainer_of(self, dataset: str) -> str:
        return self.trainer if dataset == resolve_dataset(self.dataset) else self.student or self.trainer

    def _model(self, dataset: str) -> str:
        return get_output_folder(dataset, self._trainer_of(dataset), self.plans, self.configuration)

    def _plans_folder(self, dataset: str) -> str:
        """Where a teacher's plans and fingerprint are."""
        if NETWORK in self.teachers:
            return self._model(dataset)
        return os.path.join(required_folder("nnUNet_preprocessed"), resolve_dataset(self.dataset))

    def _plans_of(self, dataset: str) -> tuple[PlansManager, dict]:
        """A teacher's plans and its dataset.json."""
        folder = self._plans_folder(dataset)
        name = "plans" if NETWORK in self.teachers else self.plans
        return read_plans(os.path.join(folder, f"{name}.json"), RESTORE, self.configuration), read_dataset_json(folder)

    def _checkpoint(self, teacher: Teacher) -> str:
        """Of its first fold."""
        return os.path.join(self._model(teacher.dataset), f"fold_{teacher.folds[0]}", self.checkpoint)

    def _student(self, target: str) -> Training:
        return Training(target, self._trainer_of(target), "0", self.warm)

    def _finished(self, target: str) -> Training:
        return Training(target, self._finishing_trainer, "1", True)

    @property
    def _finishing_trainer(self) -> str:
        return f"{re.sub('_[0-9]+epochs$', '', self.student or self.trainer)}_{self.finish}epochs"

    def _fold_of(self, student: Training) -> Path:
        model = get_output_folder(student.dataset, student.trainer, self.plans, self.configuration)
        return Path(model, f"fold_{student.fold}")

    def _is_trained(self, student: Training) -> bool:
        fold = self._fold_of(student)
        return (fold / "checkpoint_final.pth").is_file() and (fold / "validation" / "summary.json").is_file()

    def _waits(self, teacher: Teacher) -> bool:
        """Whether this teacher is a student that has not been trained to its end."""
        return teacher.dataset != resolve_dataset(self.dataset) and not self._is_trained(self._student(teacher.dataset))

    def _who(self, teacher: Teacher) -> str:
        """The teachers in words."""
        network = f"the model of {teacher.dataset}, fold {' '.join(teacher.folds)}"
        atlas = f"the labelled cases of {resolve_dataset(self.dataset)}, fold {' '.join(self.folds)}"
        return " and ".join({NETWORK: network, ATLAS: atlas}[one] for one in self.teachers)

    def _record_file(self, target: str) -> Path:
        return Path(required_folder("nnUNet_raw"), target, PSEUDOLABELED)

    def _preprocessed_mark(self, target: str) -> Path:
        """An empty file that says that nnUNetv2_preprocess came to its end."""
        folder = Path(required_folder("nnUNet_preprocessed"), target)
        return folder / f"{self.plans}_{self.configuration}.preprocessed"

    def _predicted(self, teacher: Teacher) -> str:
        """Where the teachers' predictions are kept."""
        if NETWORK not in self.teachers:
            return os.path.join(self._electorate(read_source(teacher.dataset, *self.folds)).folder, "predicted")
        name = f"unlabeled_fold_{teacher.fold}{'_with_atlas' if ATLAS in self.teachers else ''}"
        return os.path.join(self._model(teacher.dataset), name)

    def _identity(self, source: Source, teacher: Teacher) -> dict[str, Any]:
        """What makes the teachers' predictions what they are. Two teachers have equal weights."""
        identity: dict[str, Any] = {
            "dataset": teacher.dataset,
            "configuration": self.configuration,
            "plans": self.plans,
        }
        if NETWORK in self.teachers:
            stored = stored_confidences(self._predicted(teacher))
            before = stored.teacher if stored is not None else {}
            trainer = self._trainer_of(teacher.dataset)
            identity |= {"trainer": trainer, "fold": " ".join(teacher.folds), "mirroring": self.mirroring}
            for fold in teacher.folds:
                key = "checkpoint" if len(teacher.folds) == 1 else f"checkpoint of fold {fold}"
                kept = before.get(key)
                kept = kept[1:] if isinstance(kept, list) else None  # whose content need not be read again
                identity[key] = [self.checkpoint, *stamp(self._checkpoint(Teacher(teacher.dataset, (fold,))), kept)]
        if ATLAS in self.teachers:
            identity["atlas"] = self._electorate(source).identity
        return identity

    def _made_with(self, source: Source, teacher: Teacher) -> dict[str, Any]:
        """What makes a round's dataset, and the student that is trained on it, what they are."""
        rule = {f"min_{self.by}": self.at_least} if self.keep is None else {"keep": self.keep}
        training = {"warm": True} if self.warm else {}
        training |= {"student": self.student} if self.student else {}
        training |= {"finish": self.finish} if self.finish else {}
        return {"source": source.name, "teacher": self._identity(source, teacher), **rule, **training}
