"""What the figures are made from: trained runs, cases with their truth, and the predictions of one for the other."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.classes import classes_of
from nnunet_ssl.evaluation.metrics import Label
from nnunet_ssl.figures.page import class_colors
from nnunet_ssl.files import Stamp, read_json, same_content, stamp, write_json
from nnunet_ssl.unlabeled.find import (
    find_images,
    find_labeled,
    read_dataset_json,
    read_plans,
    required_folder,
    resolve_dataset,
)
from nnunet_ssl.unlabeled.folds import SPLITS, read_splits
from nnunet_ssl.unlabeled.prepare import image_stamps, kept_stamps, same_images

FINAL = "checkpoint_final.pth"
RECORD = "made_from.json"
WORKERS_PAY_FROM = 2**26  # bytes of images; starting nnU-Net's workers takes half a minute
MAX_WORKERS = 3  # of preprocessing, and of export: nnUNetv2_predict's own; each holds a whole case in memory


class NotApplicable(UserError):  # noqa: N818 - says what it is
    """These runs cannot give this figure: skipped, unless it was asked for."""


@dataclass(frozen=True)
class TrainedRun:
    """One fold of a trained model.

    Attributes:
        name: in figures.
        trainer: the class's name.
        folder: ``<nnUNet_results>/<dataset>/<trainer>__<plans>__<configuration>``.
        fold: a number, or ``all``.
        checkpoint: file name of the weights.
        key: in file names, where the trainer's name would not tell two runs apart.
        predicted: folder with the label maps of all cases, once it is known.
        how: they were made, in words for captions.
    """

    name: str
    trainer: str
    folder: Path
    fold: str
    checkpoint: str
    key: str = ""
    predicted: Path | None = None
    how: str = ""

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


@dataclass(frozen=True)
class Case:
    """An image with its truth.

    Attributes:
        name: as nnU-Net calls it.
        images: a file a channel.
        label: the true label map.
        kind: ``test``, or ``validation`` or ``training`` case of the fold.
    """

    name: str
    images: tuple[Path, ...]
    label: Path
    kind: str = "test"


@dataclass(frozen=True)
class FigureOptions:
    """What all figures are told.

    Attributes:
        dataset_json: its content, from the raw dataset.
        labels: name -> label, or labels of a region; without background and ignore label.
        classes: those of ``labels`` that are drawn.
        device: ``cuda``, ``cpu`` or ``mps``.
        tta: predict with nnU-Net's mirroring.
        num_processes: at most.
        seed: of everything random.
        embedding: ``pca``, ``tsne``.
        dataset: name of the raw dataset's folder.
    """

    dataset_json: dict[str, Any]
    labels: dict[str, Label]
    classes: list[Label]
    device: str = "cpu"
    tta: bool = True
    num_processes: int = 1
    seed: int = 0
    embedding: tuple[str, ...] = ("pca", "tsne")
    dataset: str = ""

    @property
    def names(self) -> dict[Label, str]:
        """The chosen classes with their names, in the dataset's order."""
        return {label: name for name, label in self.labels.items() if label in self.classes}

    @property
    def colors(self) -> dict[Label, str]:
        """A colour for each chosen class, the same in all figures."""
        return dict(zip(self.names, class_colors(len(self.names)), strict=True))

    @property
    def ignore_label(self) -> int | None:
        """Of voxels that nobody labelled."""
        return self.dataset_json["labels"].get("ignore")

    @property
    def file_ending(self) -> str:
        """For instance ``.nii.gz``."""
        return self.dataset_json["file_ending"]


def find_classes(
    dataset_json: dict[str, Any], chosen: Sequence[str] | None = None
) -> tuple[dict[str, Label], list[Label]]:
    """The classes of a dataset, and those that are asked for.

    Args:
        dataset_json: its content.
        chosen: labels or names; None for all.

    Returns:
        name -> label or labels of a region, without background and ignore label; the chosen ones in this order.

    Raises:
        UserError: a name or label that the dataset does not have, or labels that nnU-Net does not accept.
    """
    labels = {name: label for label, name in classes_of(dataset_json, "dataset.json")[0].items()}
    if chosen is None:
        return labels, list(labels.values())
    by_text = {str(label): label for label in labels.values()} | labels
    for text in chosen:
        if text not in by_text:
            known = ", ".join(f"{label} ({name})" for name, label in labels.items())
            raise UserError(f"--classes {text} is no class of this dataset; the classes are {known}.")
    wanted = {by_text[text] for text in chosen}
    return labels, [label for label in labels.values() if label in wanted]


# ----------------------------------------------------------------------------------------------------------- runs


def find_runs(
    dataset_id: str | int,
    trainers: Sequence[str],
    plans: str,
    configuration: str,
    fold: str,
    checkpoint: str = FINAL,
    names: Sequence[str] | None = None,
) -> list[TrainedRun]:
    """Find the trained models.

    Args:
        dataset_id: id or name.
        trainers: class names, each once.
        plans, configuration, fold, checkpoint: the same of all.
        names: one a trainer; by default the trainers' own, without what they share.

    Raises:
        UserError: a trainer or name twice, too few names, or a model that is not there.
    """
    required_folder("nnUNet_results")
    dataset = resolve_dataset(dataset_id)
    names = _names("-tr", trainers, trainers, names)
    runs = []
    for name, trainer in zip(names, trainers, strict=True):
        folder = Path(get_output_folder(dataset, trainer, plans, configuration))
        remedy = (
            "Check -d, -c, -f, -tr, -p and -chk, or train it: "
            f"nnUNetv2_train {dataset_id} {configuration} {fold} -tr {trainer} -p {plans}"
        )
        runs.append(_existing(TrainedRun(name, trainer, folder, str(fold), checkpoint), remedy))
    return runs


def find_models(
    folders: Sequence[Path], fold: str, checkpoint: str = FINAL, names: Sequence[str] | None = None
) -> list[TrainedRun]:
    """The trained models in these folders, which may lie below several ``nnUNet_results``.

    Args:
        folders: ``<trainer>__<plans>__<configuration>``, each once.
        fold, checkpoint: the same of all.
        names: as for :func:`find_runs`.

    Raises:
        UserError: as for :func:`find_runs`, a folder that is no model's, or models of one trainer without names.
    """
    folders = [Path(os.path.abspath(folder)) for folder in folders]  # a link keeps its name
    trainers = [folder.name.split("__")[0] for folder in folders]
    names = _names("-m", [str(folder) for folder in folders], trainers, names)
    return [
        _existing(
            TrainedRun(name, trainer, folder, str(fold), checkpoint, f"{trainer}_{_digest(folder)}"),
            "Name folders <trainer>__<plans>__<configuration> with -m, and check -f and -chk.",
        )
        for name, trainer, folder in zip(names, trainers, folders, strict=True)
    ]


def _digest(folder: Path) -> str:
    """A few digits that tell models of one trainer apart, also on disks that know no capitals."""
    return hashlib.sha256(str(folder).encode()).hexdigest()[:8]


def _names(option: str, values: Sequence[str], trainers: Sequence[str], names: Sequence[str] | None) -> Sequence[str]:
    """The names in figures: the given ones, or the trainers' own."""
    if names is None:
        names = short_names(trainers)
        if len(set(names)) < len(set(values)):
            raise UserError(f"{option} gives several models of the same trainer. Tell them apart with --names.")
    if len(names) != len(values):
        raise UserError(f"--names gives {len(names)} name(s) for {len(values)} model(s). Give one for each {option}.")
    for given, texts in ((option, values), ("--names", names)):
        if len(set(texts)) < len(texts):
            twice = next(text for text in texts if list(texts).count(text) > 1)
            raise UserError(f"{given} gives {twice} twice. Give models and names once each.")
    return names


def refuse_other_labels(runs: Iterable[TrainedRun], dataset_json: dict[str, Any]) -> None:
    """Refuse a model that was trained for other classes than those of the cases.

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


def _existing(run: TrainedRun, remedy: str) -> TrainedRun:
    for file in (run.folder / "plans.json", run.folder / "dataset.json", run.checkpoint_file):
        if not file.is_file():
            raise UserError(f"{file} does not exist: there is no such trained model. {remedy}")
    return run


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


def load_predictor(run: TrainedRun, device: str, tta: bool = True) -> Any:
    """nnU-Net's predictor with a run's weights.

    Args:
        run: the model.
        device: ``cuda``, ``cpu`` or ``mps``.
        tta: with nnU-Net's mirroring.

    Raises:
        UserError: the weights cannot be loaded, or the model cannot predict by itself.
    """
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_ssl.checkpoints import read_checkpoint

    # nnU-Net's predictor runs what a checkpoint calls when it is read
    read_checkpoint(run.checkpoint_file, "Restore it, or name another with -chk.", {"network_weights": dict})
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            predictor = nnUNetPredictor(use_mirroring=tta, device=torch.device(device), allow_tqdm=False)
            predictor.initialize_from_trained_model_folder(str(run.folder), (run.fold,), run.checkpoint)
    except Exception as error:
        raise UserError(
            f"{run.checkpoint_file} cannot be loaded ({reason(error)}). Restore it, or name another with -chk."
        ) from error
    if predictor.configuration_manager.previous_stage_name is not None:
        raise UserError(
            f"{run.folder} is the second stage of a cascade, whose predictions need those of the first. Name a "
            "configuration that stands alone with -c."
        )
    return predictor


def reason(error: Exception) -> str:
    """The last line that an error of somebody else's code says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[-1]}"


# ---------------------------------------------------------------------------------------------------------- cases


def test_cases(dataset_id: str | int, fold: str) -> list[Case]:
    """The test cases that have a truth; where there are none the validation cases of the fold.

    Fold ``all`` has no validation cases: nnU-Net validates it on its training cases, which are given then.

    Args:
        dataset_id: id or name of the raw dataset.
        fold: a number, or ``all``.

    Raises:
        UserError: there is neither.
    """
    dataset = resolve_dataset(dataset_id)
    raw = Path(required_folder("nnUNet_raw")) / dataset
    dataset_json = read_dataset_json(str(raw))
    ending = dataset_json["file_ending"]
    if (raw / "imagesTs").is_dir() and (raw / "labelsTs").is_dir():
        images = find_images(str(raw / "imagesTs"), ending)[0]
        cases = [_case(name, files, raw / "labelsTs" / f"{name}{ending}") for name, files in images.items()]
        with_truth = [case for case in cases if case.label.is_file()]
        if len(with_truth) < len(cases):
            without = ", ".join(case.name for case in cases if case not in with_truth)
            print(f"Left out, for {raw / 'labelsTs'} does not have their truth: {without}", flush=True)
        if with_truth:
            return with_truth
    return _cases_of_fold(dataset, raw, dataset_json, fold)


test_cases.__test__ = False  # pytest takes the name for a test's


def _cases_of_fold(dataset: str, raw: Path, dataset_json: dict[str, Any], fold: str) -> list[Case]:
    kind = "training" if fold == "all" else "validation"
    images = find_labeled(str(raw), dataset_json)
    names = list(images)
    if fold != "all":
        file = Path(required_folder("nnUNet_preprocessed")) / dataset / SPLITS
        remedy = (
            f"It must name the validation cases, since {raw} has no test cases with a truth (imagesTs and labelsTs): "
            "add one or the other."
        )
        splits = read_splits(str(file), remedy)
        if int(fold) >= len(splits):
            raise UserError(f"{file} has {len(splits)} fold(s), but not -f {fold}. {remedy}")
        names = sorted(splits[int(fold)].val)
    explicit = dataset_json.get("dataset", {})
    cases = []
    for name in names:
        if name not in images:
            raise UserError(f"{raw} does not hold the image of validation case {name} of fold {fold}. Restore it.")
        label = explicit.get(name, {}).get("label", os.path.join("labelsTr", name + dataset_json["file_ending"]))
        if not isinstance(label, str):
            raise UserError(f"{raw / 'dataset.json'} names no label of case {name}. Add it.")
        cases.append(_case(name, images[name], raw / os.path.expandvars(label), kind))
    if not cases:
        raise UserError(f"{raw} has neither test cases with a truth nor {kind} cases: there is nothing to draw.")
    return cases


def _case(name: str, images: Iterable[str], label: Path, kind: str = "test") -> Case:
    return Case(name, tuple(map(Path, images)), label, kind)


def cases_in_words(cases: Sequence[Case]) -> str:
    """For captions: how many of which kind, from where."""
    return f"{len(cases)} {cases[0].kind} case{'s' if len(cases) > 1 else ''}, truth from `{cases[0].label.parent}`"


def class_mask(label_map: np.ndarray, label: Label) -> np.ndarray:
    """Where a label map has a class, or any label of a region."""
    return np.isin(label_map, label) if isinstance(label, tuple) else label_map == label


# ---------------------------------------------------------------------------------------------------- predictions


def with_predictions(
    runs: Sequence[TrainedRun], cases: Sequence[Case], out: Path, options: FigureOptions
) -> list[TrainedRun]:
    """The runs, each with its ``predicted`` label map of every case; what is not there is predicted now.

    Of validation cases nnU-Net's own ``validation`` folder is taken, if this model and these settings made it.

    Raises:
        UserError: a case cannot be predicted.
    """
    return [_with_predictions(run, cases, out, options) for run in runs]


def _with_predictions(run: TrainedRun, cases: Sequence[Case], out: Path, options: FigureOptions) -> TrainedRun:
    if run.predicted is not None:
        return run
    if _has_validated(run, cases, options):
        return replace(run, predicted=run.fold_folder / "validation", how="nnU-Net's validation, with mirroring")
    folder = prediction_folder(run, out)
    predict(run, cases, folder, False, options.device, options.tta, options.num_processes)
    how = f"predicted for the figures, {'with' if options.tta else 'without'} mirroring"
    return replace(run, predicted=folder, how=how)


def _has_validated(run: TrainedRun, cases: Sequence[Case], options: FigureOptions) -> bool:
    """Whether nnU-Net's validation of these cases is what the final checkpoint predicts with mirroring."""
    if run.checkpoint != FINAL or not options.tta or run.folder.parent.name != options.dataset:
        return False
    trained = run.checkpoint_file.stat().st_mtime_ns
    files = [run.fold_folder / "validation" / f"{case.name}{options.file_ending}" for case in cases]
    return all(case.kind != "test" for case in cases) and all(
        file.is_file() and file.stat().st_mtime_ns >= trained for file in files
    )


def with_given_predictions(
    runs: Sequence[TrainedRun], folders: Sequence[Path], cases: Sequence[Case], options: FigureOptions
) -> list[TrainedRun]:
    """The runs with the folders of ``-pred``.

    Raises:
        UserError: too few or too many folders, or one without one of the cases.
    """
    if len(folders) != len(runs):
        raise UserError(f"-pred gives {len(folders)} folder(s) for {len(runs)} model(s). Give one for each.")
    for folder in folders:
        for case in cases:
            if not (file := folder / f"{case.name}{options.file_ending}").is_file():
                raise UserError(f"{file} does not exist: predict the case, or leave out -pred.")
    return [replace(run, predicted=folder, how="given with -pred") for run, folder in zip(runs, folders, strict=True)]


def models_in_words(runs: Iterable[TrainedRun]) -> list[str]:
    """For captions: where each run's predictions and weights lie, and how the predictions were made."""
    return [f"- {run.name}: `{run.predicted}` ({run.how}), `{run.checkpoint_file}`" for run in runs]


def prediction_folder(run: TrainedRun, out: Path) -> Path:
    """Where predictions made for the figures are kept."""
    return out / "predictions" / (run.key or run.trainer)


def predict(
    run: TrainedRun,
    cases: Sequence[Case],
    folder: Path,
    probabilities: bool,
    device: str,
    tta: bool,
    num_processes: int = 1,
) -> None:
    """Predict with nnU-Net's own predictor what is not there yet.

    What another checkpoint, other images or other settings gave is removed first. A case is there whole or not at all.

    Args:
        run: the model.
        cases: to predict.
        folder: gets ``<case><ending>``, with ``probabilities`` also ``<case>.npz`` and ``.pkl``.
        probabilities: nnU-Net's ``--save_probabilities``: float ``probabilities`` ``[C, *image]``.
        device: ``cuda``, ``cpu`` or ``mps``.
        tta: with nnU-Net's mirroring.
        num_processes: nnU-Net's workers at most, for large images; small ones are done in this process.

    Raises:
        UserError: a case cannot be predicted; those before it are kept.
    """
    ending = read_dataset_json(str(run.folder))["file_ending"]
    _keep_only_what_is_current(run, cases, folder, tta, ending)
    wanted = [ending, ".npz"] if probabilities else [ending]
    missing = [case for case in cases if not all((folder / f"{case.name}{e}").is_file() for e in wanted)]
    if not missing:
        return
    predictor = load_predictor(run, device, tta)
    size = sum(file.stat().st_size for case in missing for file in case.images)
    workers = min(num_processes, MAX_WORKERS) if size > WORKERS_PAY_FROM else 1
    at_a_time = 1 if workers == 1 else 2 * workers  # a process that is killed loses no more
    building = folder / "unfinished"
    shutil.rmtree(building, ignore_errors=True)  # left by a killed run
    building.mkdir()
    try:
        with tqdm(total=len(missing), desc=f"Predicting, {run.name}") as bar:
            for start in range(0, len(missing), at_a_time):
                batch = missing[start : start + at_a_time]
                files = [list(map(str, case.images)) for case in batch], [str(building / case.name) for case in batch]
                try:
                    with contextlib.redirect_stdout(io.StringIO()):  # several lines a case
                        if workers == 1:
                            predictor.predict_from_files_sequential(*files, save_probabilities=probabilities)
                        else:
                            predictor.predict_from_files(
                                *files, probabilities, num_processes_preprocessing=workers,
                                num_processes_segmentation_export=workers,
                            )  # fmt: skip
                except Exception as error:
                    raise UserError(
                        f"{run.name} cannot predict {', '.join(case.name for case in batch)} ({reason(error)}). "
                        f"Check {batch[0].images[0].parent}, and whether memory suffices."
                    ) from error
                for case in batch:
                    for kind in (".npz", ".pkl", ending):  # the label map last: with it the case counts as there
                        if (building / f"{case.name}{kind}").is_file():
                            os.replace(building / f"{case.name}{kind}", folder / f"{case.name}{kind}")
                bar.update(len(batch))
    finally:
        shutil.rmtree(building, ignore_errors=True)


class _Record(NamedTuple):
    """What predictions were made from: stamps of the checkpoint and of the images, and whether with mirroring."""

    checkpoint: Stamp
    mirroring: bool
    images: dict[str, list]


def _keep_only_what_is_current(run: TrainedRun, cases: Sequence[Case], folder: Path, tta: bool, ending: str) -> None:
    """Remove predictions that this model would not make now, and write down what makes the others."""
    stored = _read_record(folder / RECORD)
    checkpoint = stamp(run.checkpoint_file, stored.checkpoint if stored else None)
    kept = stored.images if stored else {}
    if stored and not (stored.mirroring == tta and same_content(stored.checkpoint, checkpoint)):
        for case in kept:
            _remove(folder, case, ending)
        kept = {}
    images = image_stamps({case.name: list(map(str, case.images)) for case in cases}, kept)
    for case, files in images.items():
        if case not in kept or not same_images(kept[case], files):
            _remove(folder, case, ending)
    folder.mkdir(parents=True, exist_ok=True)
    record = _Record(checkpoint, tta, {**kept, **images})
    if record != stored:  # what is complete may lie where nothing can be written
        write_json(folder / RECORD, {"model": str(run.checkpoint_file), **record._asdict()})


def _read_record(file: Path) -> _Record | None:
    """None where there is none, or none that this module can have written."""
    try:
        content = read_json(file, "", keys={"checkpoint": list, "mirroring": bool, "images": dict})
        size, time, digest = content["checkpoint"]
        checkpoint = [int(size), int(time), str(digest)]
        return _Record(checkpoint, content["mirroring"], kept_stamps(content["images"], str(file)))
    except (UserError, LookupError, TypeError, ValueError, AttributeError):
        return None


def _remove(folder: Path, case: str, ending: str) -> None:
    for kind in (ending, ".npz", ".pkl"):
        (folder / f"{case}{kind}").unlink(missing_ok=True)
