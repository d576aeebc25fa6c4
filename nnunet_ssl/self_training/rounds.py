"""The rounds: predict, keep the best, make a dataset of them, train on it, again.

Each round begins with the unlabeled images of the first dataset, all of them, and with the model that the last round
trained: what was kept in one round may be labeled otherwise, or dropped, in the next. Predicting, moving the plans,
preprocessing and training are nnU-Net's own commands.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, find_candidate_datasets
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_ssl.errors import UserError
from nnunet_ssl.export import find_model_folder
from nnunet_ssl.files import writing
from nnunet_ssl.locks import holding
from nnunet_ssl.self_training.dataset import REPORT, read_source, write_pseudolabeled
from nnunet_ssl.self_training.settings import NETWORK, Model, Settings
from nnunet_ssl.self_training.teachers import Teachers
from nnunet_ssl.steps import Step, Steps, training
from nnunet_ssl.unlabeled.case import labeled_folder
from nnunet_ssl.unlabeled.find import PSEUDOLABELED, read_plans, required_folder, resolve_dataset
from nnunet_ssl.unlabeled.folds import SPLITS
from nnunet_ssl.unlabeled.raw_dataset import lock_of, refuse_existing

FINGERPRINT = "dataset_fingerprint.json"


def self_train(settings: Settings) -> list[str]:
    """Do all of it; returns the names of the datasets.

    Raises:
        UserError: no trained model, no unlabeled image, an id that is taken, a command that failed, or a file that
            cannot be read or written.
    """
    with writing("Start this command again with the same options to resume from here."):
        return _Rounds(settings).run()


class _Rounds:
    def __init__(self, settings: Settings) -> None:
        self.settings = s = settings
        self.student = s.student or s.trainer
        self.steps = Steps(s.device, "choose another -o", s.dry_run)
        first = Model(resolve_dataset(s.dataset), s.trainer, s.plans, s.configuration, s.folds)
        if NETWORK in s.teachers:
            _refuse_untrained(first, s.checkpoint)
        self.source = read_source(first.dataset, *s.folds)
        self.first = Teachers(s, self.source, first)
        self.plans = self.first.plans.get_configuration(s.configuration)
        self._refuse_what_cannot_work()

    def run(self) -> list[str]:
        name = self.source.name.partition("_")[2]
        rounds = range(1, max(1, self.settings.rounds) + 1)
        targets = [f"Dataset{self.settings.target_id + n - 1:03d}_{name}_pseudo{n}" for n in rounds]
        for target in targets:
            self._refuse_taken(target)
        if self.settings.dry_run:
            return self._make(targets)
        lock = lock_of(required_folder("nnUNet_preprocessed"), targets[0])
        with holding(lock, f"another nnUNetv2_ssl_pseudolabel is making {targets[0]}: wait until it has ended."):
            return self._make(targets)

    def _make(self, targets: list[str]) -> list[str]:
        rounds = range(1, len(targets) + 1)
        teachers = self.first
        for number, target in zip(rounds, targets, strict=True):
            print(f"\nRound {number}: {target}, by {teachers}", flush=True)
            self._make_dataset(teachers, target)
            student = self.first.model._replace(dataset=target, trainer=self.student, folds=("0",))
            start = teachers.model if self.settings.warm else None
            steps = [self._move_plans(target), self._preprocess(target), self._train(student, start)]
            if self.settings.rounds:
                for step in steps:
                    self.steps.do(step)
                teachers = Teachers(self.settings, self.source, student)
            elif not self.settings.dry_run:
                print("Train on it, for instance:")
                for step in steps:
                    print(f"  {shlex.join(step.commands[0])}")
        if self.settings.finish:
            epochs, target = self.settings.finish, targets[-1]
            print(f"\nFinish: {epochs} epochs on labels alone, as fold 1 of {target}", flush=True)
            finished = student._replace(trainer=self._finishing_trainer, folds=("1",))
            self.steps.do(self._train(finished, student))
        return targets

    # ------------------------------------------------------------------ checks

    def _refuse_what_cannot_work(self) -> None:
        s = self.settings
        _ = self.first.electorate  # its plans can be read
        if self.plans.previous_stage_name is not None:
            raise UserError(
                f"-c {s.configuration} needs the predictions of a previous stage, which unlabeled images do not have; "
                "use 3d_fullres or 3d_lowres."
            )
        plans_file = _preprocessed(self.source.name) / f"{s.plans}.json"
        if s.rounds and not plans_file.is_file():
            raise UserError(f"{plans_file} does not exist, but the students are to be trained with these plans.")
        if s.rounds and NETWORK in s.teachers:
            self._refuse_other_plans(plans_file)
        if s.student:
            _refuse_unknown_trainer(s.student, f"--student {s.student}", "name")
        kept = ("checkpoint_final.pth", "checkpoint_best.pth")
        if (s.rounds > 1 or s.finish) and s.checkpoint not in kept:
            raise UserError(
                f"-chk {s.checkpoint}: a student ends with {' and '.join(kept)} alone, so later rounds would not find "
                "it. Name one of these, or rename the teacher's checkpoint to one of them."
            )
        if s.finish:
            _refuse_unknown_trainer(self._finishing_trainer, f"--finish {s.finish}", "number of epochs")

    def _refuse_other_plans(self, file: Path) -> None:
        """The students are trained with the plans of today, and compared with a teacher that may have had others."""
        name, then = self.settings.configuration, self.first.plans
        now = read_plans(str(file), "Plan the dataset again.", name)
        same_normalization = (
            now.foreground_intensity_properties_per_channel == then.foreground_intensity_properties_per_channel
        )
        if not same_normalization or now.get_configuration(name).configuration != self.plans.configuration:
            raise UserError(
                f"{file} is not what the teacher was trained with ({self.first.plans_folder}/plans.json). Restore it, "
                "or train the teacher again."
            )

    def _refuse_taken(self, target: str) -> None:
        """Refuse an id that another dataset has; one that an earlier run of this command made is taken up."""
        target_id = convert_dataset_name_to_id(target)
        if set(find_candidate_datasets(target_id)) != {target} or not self._record(target).is_file():
            refuse_existing(target_id)

    # ------------------------------------------------------------------ the dataset of a round

    def _make_dataset(self, teachers: Teachers, target: str) -> None:
        """Predict the unlabeled images and write the dataset, unless it is there."""
        s = self.settings
        # in a dry run the teacher may be a student that is not trained yet
        trained = teachers is self.first or self.steps.is_done(self._train(teachers.model))
        record = self._record(target)
        if trained and self.steps.is_done(Step(record, made_with=self._made_with(teachers))):
            self.steps.skip(f"{target} is there")
        elif s.dry_run:
            teachers.predict(self.steps, trained)
            which = f"of {s.by} {s.at_least:g} or more" if s.keep is None else f"of the best {s.keep:g} of all cases"
            self.steps.skip(f"writes {target}, with the predictions {which}")
        else:
            options = (s.at_least, s.keep, self._made_with(teachers), s.copy, s.by)
            predictions = teachers.predict(self.steps)
            split = write_pseudolabeled(target, self.source, predictions, *options, finish=s.finish is not None)
            num_labeled = len(self.source.labeled)
            print(
                f"{target}: {num_labeled} labeled, {len(split.labeled) - num_labeled} pseudo-labeled, "
                f"{len(split.unlabeled)} unlabeled and {len(split.validation)} validation cases\n  the {s.by} of "
                f"each: {record.parent / REPORT}",
                flush=True,
            )
            if not split.unlabeled:
                print("  No unlabeled image is left: a trainer that needs unlabeled images cannot continue here.")
        if not s.dry_run:
            self._complete_preprocessed(record.parent, _preprocessed(target))

    def _made_with(self, teachers: Teachers) -> dict[str, Any]:
        """What makes a round's dataset, and the student that is trained on it, what they are."""
        s = self.settings
        rule = {f"min_{s.by}": s.at_least} if s.keep is None else {"keep": s.keep}
        options = {"warm": s.warm, "student": s.student, "finish": s.finish}
        given = {key: value for key, value in options.items() if value}
        return {"source": self.source.name, **self.source.identity, "teacher": teachers.identity, **rule, **given}

    def _record(self, target: str) -> Path:
        return Path(required_folder("nnUNet_raw"), target, PSEUDOLABELED)

    def _complete_preprocessed(self, raw: Path, preprocessed: Path) -> None:
        """What training reads from nnUNet_preprocessed and nnUNetv2_preprocess does not write.

        The fingerprint is the one that the plans were made from; nnU-Net only files it with the model.
        """
        preprocessed.mkdir(parents=True, exist_ok=True)
        for file in (raw / "dataset.json", raw / SPLITS, Path(self.first.plans_folder, FINGERPRINT)):
            shutil.copyfile(file, preprocessed / file.name)

    # ------------------------------------------------------------------ steps

    def _move_plans(self, target: str) -> Step:
        """The first dataset's plans, so that network, spacing and normalization stay what they were."""
        plans, makes = self.settings.plans, (_preprocessed(target) / f"{self.settings.plans}.json",)
        words = ["nnUNetv2_move_plans_between_datasets", "-s", self.source.name, "-t", target]
        words += ["-sp", plans, "-tp", plans]
        return Step(_done(target, "plans"), makes, (words,), there=f"{plans} of {target} are there")

    def _preprocess(self, target: str) -> Step:
        s = self.settings
        words = ["nnUNetv2_preprocess", "-d", str(convert_dataset_name_to_id(target)), "-c", s.configuration]
        words += ["-plans_name", s.plans]
        words += ["-np", str(s.processes)] if s.processes is not None else []
        makes, there = (Path(labeled_folder(target, self.plans)),), f"{s.configuration} of {target} is preprocessed"
        return Step(_done(target, "preprocessed"), makes, (words,), there=there)

    def _train(self, student: Model, start: Model | None = None) -> Step:
        """A training, from the weights of another model's first fold if one is given."""
        s, [fold] = self.settings, student.folds
        words = ["nnUNetv2_train", student.dataset, s.configuration, fold, "-tr", student.trainer, "-p", s.plans]
        weights = ["-pretrained_weights", str(start.fold(start.folds[0]) / s.checkpoint)] if start else []
        folder = student.fold(fold)
        return Step(
            _done(student.dataset, f"trained_fold_{fold}"),
            (folder / "checkpoint_final.pth", folder / "validation" / "summary.json"),
            (training([*words, "-device", s.device], folder, *weights),),
            there=f"the model of {student.dataset}, fold {fold} is trained",
        )

    @property
    def _finishing_trainer(self) -> str:
        return f"{re.sub('_[0-9]+epochs$', '', self.student)}_{self.settings.finish}epochs"


def _refuse_untrained(model: Model, checkpoint: str) -> None:
    find_model_folder(model.dataset, model.trainer, model.plans, model.configuration)
    for fold in model.folds:
        if not (file := model.fold(fold) / checkpoint).is_file():
            raise UserError(f"no checkpoint {file}. Train this fold to its end, or name another with -f or -chk.")


def _refuse_unknown_trainer(name: str, option: str, what: str) -> None:
    try:
        recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        raise UserError(f"{option}: nnU-Net has no trainer {name}. Choose another {what}.") from error


def _preprocessed(dataset: str) -> Path:
    return Path(required_folder("nnUNet_preprocessed"), dataset)


def _done(target: str, step: str) -> Path:
    """The record of a step."""
    return _preprocessed(target) / "ssl_steps" / f"{step}.json"
