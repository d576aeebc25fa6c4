"""Who predicts in a round: a network, an atlas (the fold's labeled cases, registered onto each image), or both.

The network is the model that the last round trained; the atlas stays the same in all rounds.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.errors import UserError
from nnunet_ssl.export import RESTORE
from nnunet_ssl.files import stamp
from nnunet_ssl.locks import holding
from nnunet_ssl.self_training.dataset import Source
from nnunet_ssl.self_training.predictions import Predictions, stored_confidences
from nnunet_ssl.self_training.settings import ATLAS, NETWORK, Model, Settings
from nnunet_ssl.shapes.votes import Electorate, prepare_votes
from nnunet_ssl.steps import Steps
from nnunet_ssl.unlabeled.find import (
    UNLABELED_FOLDER,
    find_images,
    read_dataset_json,
    read_plans,
    required_folder,
    with_spacing,
)
from nnunet_ssl.unlabeled.prepare import prepare_unlabeled
from nnunet_ssl.unlabeled.raw_dataset import COPY

PREPARE = "An atlas needs the preprocessed labeled cases: run nnUNetv2_plan_and_preprocess, or name the plans with -p."
ATTEMPTS = 2  # to predict a case
TO_PREDICT = "to_predict"  # links to the images that are still to be predicted, where these are not all


@dataclass(frozen=True)
class Teachers:
    """The teachers of a round."""

    settings: Settings
    source: Source  # the dataset that it starts from
    model: Model  # the network; without one, what it would be

    def __str__(self) -> str:
        network = f"the model of {self.model.dataset}, fold {' '.join(self.model.folds)}"
        atlas = f"the labeled cases of {self.source.name}, fold {' '.join(self.settings.folds)}"
        return " and ".join({NETWORK: network, ATLAS: atlas}[one] for one in self.settings.teachers)

    @property
    def network(self) -> bool:
        """Whether one predicts."""
        return NETWORK in self.settings.teachers

    @cached_property
    def electorate(self) -> Electorate | None:
        """Those who vote: the labeled cases, as they are prepared; None without an atlas."""
        if ATLAS not in self.settings.teachers:
            return None
        file = os.path.join(required_folder("nnUNet_preprocessed"), self.source.name, f"{self.settings.plans}.json")
        return Electorate(
            self.source.name,
            read_plans(file, PREPARE, self.settings.configuration).plans,
            self.settings.configuration,
            self.source.dataset_json,
            "_".join(self.settings.folds),
            tuple(self.source.labeled),
        )

    @property
    def plans_folder(self) -> str:
        """Of their plans, ``dataset.json`` and fingerprint."""
        if self.network:
            return self.model.folder
        return os.path.join(required_folder("nnUNet_preprocessed"), self.source.name)

    @property
    def plans(self) -> PlansManager:
        """With which they predict."""
        name = "plans" if self.network else self.settings.plans
        return read_plans(os.path.join(self.plans_folder, f"{name}.json"), RESTORE, self.settings.configuration)

    @property
    def folder(self) -> str:
        """Where their predictions are kept."""
        if self.electorate and not self.network:
            return os.path.join(self.electorate.folder, "predicted")
        name = f"unlabeled_fold_{'_'.join(self.model.folds)}"
        if (checkpoint := Path(self.settings.checkpoint).stem) != "checkpoint_final":
            name += f"_{checkpoint}"
        name += "" if self.settings.mirroring else "_without_mirroring"
        return os.path.join(self.model.folder, name + ("_with_atlas" if self.electorate else ""))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What makes their predictions what they are. Two teachers have equal weights."""
        model, checkpoint = self.model, self.settings.checkpoint
        identity: dict[str, Any] = {
            "dataset": model.dataset,
            "configuration": model.configuration,
            "plans": model.plans,
        }
        if self.network:
            stored = stored_confidences(self.folder)
            identity |= {"trainer": model.trainer, "fold": " ".join(model.folds), "mirroring": self.settings.mirroring}
            for fold in model.folds:
                key = "checkpoint" if len(model.folds) == 1 else f"checkpoint of fold {fold}"
                kept = stored.teacher.get(key) if stored is not None else None
                kept = kept[1:] if isinstance(kept, list) else None  # whose content need not be read again
                identity[key] = [checkpoint, *stamp(model.fold(fold) / checkpoint, kept)]
        if self.electorate:
            identity["atlas"] = self.electorate.identity
        return identity

    def predict(self, steps: Steps, trained: bool = True) -> Predictions:
        """Predict what is not predicted yet, part by part, with nnU-Net's own command.

        In a dry run the network may still have to be ``trained``.

        Raises:
            UserError: the command failed, or left no usable prediction.
        """
        predictions = self._predictions(trained)
        if not predictions.missing():
            steps.skip(f"the predictions in {self.folder} are there")
            if not steps.dry_run:
                with suppress(OSError):  # times of copies spare reading them; what cannot be written can still be read
                    predictions.save()
        elif steps.dry_run:
            if self.electorate:
                steps.skip("registers labeled images onto each unlabeled one, unless that is done")
            for part in range(self.settings.parts if self.network else 0):
                if cases := predictions.missing(part, self.settings.parts):
                    steps.run(self._command(self._input_folder(cases)))
        else:
            busy = f"another process predicts into {self.folder}: waiting for it"
            with holding(f"{self.folder}.lock", busy, wait=True):
                predictions = self._predictions()  # as it is now
                if predictions.missing():
                    self._complete(predictions, steps)
        return predictions

    def _predictions(self, trained: bool = True) -> Predictions:
        ending = self.source.dataset_json["file_ending"]
        return Predictions(self.folder, self.identity if trained else None, self.source.unlabeled, ending)

    def _complete(self, predictions: Predictions, steps: Steps) -> None:
        plans_manager, dataset_json = self.plans, read_dataset_json(self.plans_folder)
        votes = self._votes(self.electorate) if self.electorate else None
        predictions.begin()
        predictions.collect(plans_manager, dataset_json, votes, self.network)  # also what a stopped run has left
        for part in range(self.settings.parts if self.network else 0):
            for _ in range(ATTEMPTS):
                if cases := predictions.missing(part, self.settings.parts):
                    images = self._input_folder(cases)
                    if os.path.basename(images) == TO_PREDICT:
                        self._link_images(images, cases)
                    steps.run(self._command(images))
                    predictions.collect(plans_manager, dataset_json, votes)
        shutil.rmtree(os.path.join(self.folder, TO_PREDICT), ignore_errors=True)
        if missing := predictions.missing():
            raise UserError(
                f"nnUNetv2_predict left no usable prediction of {missing[0]} in {self.folder}, nor of "
                f"{len(missing) - 1} other(s). Check its output above, and the space on that disk."
            )

    def _votes(self, electorate: Electorate) -> dict[str, str]:
        """What the labeled cases say of each unlabeled one: case -> files, less their endings."""
        processes = self.settings.processes or default_num_processes
        plans_manager = PlansManager(electorate.plans)
        of_dataset = (self.source.name, plans_manager, self.settings.configuration, electorate.dataset_json)
        images = prepare_unlabeled(*of_dataset, list(self.source.images), processes, reading=True)
        votes = prepare_votes(electorate, images, processes)
        return {case: os.path.join(votes.place(case), case) for case in images.cases}

    def _command(self, images: str) -> list[str]:
        settings, model = self.settings, self.model
        words = ["nnUNetv2_predict", "-i", images, "-o", self.folder]
        words += ["-d", model.dataset, "-c", model.configuration, "-f", *model.folds, "-tr", model.trainer]
        words += ["-p", model.plans, "-chk", settings.checkpoint, "-device", settings.device, "--save_probabilities"]
        if not settings.mirroring:
            words += ["--disable_tta"]
        if settings.processes is not None:
            words += ["-npp", str(settings.processes), "-nps", str(settings.processes)]
        return words

    def _input_folder(self, cases: list[str]) -> str:
        """Where nnU-Net finds these images and no others; it looks at hidden files too, such as ``._case_0000``."""
        folder = os.path.join(self.source.folder, UNLABELED_FOLDER)
        here = find_images(folder, self.source.dataset_json["file_ending"])[0]
        if len(cases) == len(here) and not any(name.startswith(".") for name in os.listdir(folder)):
            return folder
        return os.path.join(self.folder, TO_PREDICT)

    def _link_images(self, folder: str, cases: list[str]) -> None:
        """Fill a folder with these cases."""
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        put = shutil.copy2 if self.settings.copy else os.symlink
        for case in cases:
            for file in with_spacing(case, self.source.unlabeled[case]):
                new = os.path.join(folder, os.path.basename(file))
                try:
                    put(os.path.abspath(file), new)
                except OSError as error:
                    hint = "" if self.settings.copy else COPY
                    raise UserError(f"{new} cannot be written ({error.strerror}).{hint}") from error
