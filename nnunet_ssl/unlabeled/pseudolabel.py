"""Offline self-training, the part without a training: which predictions of unlabelled images become labels.

A teacher has predicted every unlabelled image: a trained model, or labelled cases that voted, or both; then the mean of
their probabilities is the prediction. The cases that they are confident of, or agree on, join the labelled ones in a
new raw dataset, with the predictions as their labels; the validation cases stay as they are.

How confident a teacher is of a case: for each foreground class, the mean of its probability over the voxels that are
predicted as that class (with softmax this is the largest probability of each of them); of these the mean over the
classes that are predicted at all, so that a small organ weighs as much as a large one. A case without any predicted
foreground has confidence 0 and is never kept: an empty label map is what a teacher that has failed predicts, with
certainty.

How much two teachers agree on a case: the Dice of their label maps, the mean over the foreground classes that one of
them sees. A class that the other does not see counts 0.
"""

from __future__ import annotations

import csv
import os
import pickle
import shutil
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json, same_content, write_json
from nnunet_ssl.unlabeled.find import (
    PSEUDOLABELED,
    find_labeled,
    find_unlabeled,
    read_dataset_json,
    refuse_labeled_names,
    required_folder,
)
from nnunet_ssl.unlabeled.folds import SPLITS, read_splits
from nnunet_ssl.unlabeled.raw_dataset import Split, new_dataset, write_dataset
from nnunet_ssl.unlabeled.stamps import image_stamps, kept_stamps, same_images

FORMAT = 2
CONFIDENCES = "confidences.json"
SAVE_EVERY = 2.0  # seconds between two writes of what has been measured
WHO_IS_BEST = {"confidence": "the most confident is", "agreement": "the teachers agree most on"}
REPORT, PICTURE = "pseudolabels.csv", "pseudolabels.png"


# ---------------------------------------------------------------------- how confident, and who is kept


class Measured(NamedTuple):
    """What the prediction of one case says of itself, by the names of the foreground classes or regions.

    Attributes:
        voxels: how many are predicted as the class.
        probability: the mean of the class's probability over these voxels; None where there are none.
        dice: of the class, between two teachers; None where neither sees it. Empty with one teacher.
    """

    voxels: dict[str, int]
    probability: dict[str, float | None]
    dice: dict[str, float | None] = {}

    @property
    def confidence(self) -> float:
        """The mean over the classes that are predicted; 0 if none is."""
        return _mean_of_present(self.probability)

    @property
    def agreement(self) -> float:
        """The mean over the classes that a teacher sees; 0 if none does, and where there is nobody to agree with."""
        return _mean_of_present(self.dice)


def _mean_of_present(values: Mapping[str, float | None]) -> float:
    present = [value for value in values.values() if value is not None]
    return float(np.mean(present)) if present else 0.0


def foreground_channels(label_manager: LabelManager) -> dict[str, int]:
    """Name of each foreground class or region -> its channel in nnU-Net's probabilities."""
    named = {
        name: np.unique(value)
        for name, value in label_manager.label_dict.items()
        if name != "ignore" and np.any(np.unique(value) != 0)
    }
    if label_manager.has_regions:  # a sigmoid each, in the order of dataset.json
        return {name: channel for channel, name in enumerate(named)}
    return {name: int(labels[0]) for name, labels in named.items()}


def measure(probabilities: np.ndarray, label_manager: LabelManager) -> Measured:
    """Measure how confident a prediction is, by the definition at the top of this file.

    Args:
        probabilities: float ``[C, *image]``, as nnU-Net saves them: softmax over classes, or a sigmoid for each region.
        label_manager: nnU-Net's, of the model that predicted.
    """
    voxels: dict[str, int] = {}
    probability: dict[str, float | None] = {}
    for name, channel, inside in _foreground(probabilities, label_manager):
        voxels[name] = int(np.count_nonzero(inside))
        mean = probabilities[channel].mean(where=inside, dtype=np.float64) if voxels[name] else None
        probability[name] = None if mean is None else float(mean)
    return Measured(voxels, probability)


def dice_between(one: np.ndarray, other: np.ndarray, label_manager: LabelManager) -> dict[str, float | None]:
    """Dice of each foreground class or region in what two teachers predict; None where neither sees it.

    Args:
        one, other: float ``[C, *image]``, as for ``measure``.
        label_manager: nnU-Net's.
    """
    found: dict[str, float | None] = {}
    pairs = zip(_foreground(one, label_manager), _foreground(other, label_manager), strict=True)
    for (name, _, here), (_, _, there) in pairs:
        total = np.count_nonzero(here) + np.count_nonzero(there)
        found[name] = float(2 * np.count_nonzero(here & there) / total) if total else None
    return found


def _foreground(probabilities: np.ndarray, label_manager: LabelManager) -> Iterator[tuple[str, int, np.ndarray]]:
    """Name, channel and predicted voxels of each foreground class or region."""
    if not label_manager.has_regions:
        predicted = label_manager.convert_probabilities_to_segmentation(probabilities)
    for name, channel in foreground_channels(label_manager).items():
        yield name, channel, probabilities[channel] > 0.5 if label_manager.has_regions else predicted == channel


def choose(scores: dict[str, float], at_least: float | None, keep: float | None) -> list[str]:
    """Choose the cases whose predictions become labels.

    Args:
        scores: confidence or agreement of every case; those with 0 are never chosen.
        at_least: keep the cases that reach it, or
        keep: keep this fraction of all cases, the best ones, at least one.

    Returns:
        The cases, sorted.
    """
    order = sorted((case for case in scores if scores[case] > 0), key=lambda case: (-scores[case], case))
    if keep is not None:
        return sorted(order[: max(1, round(keep * len(scores)))])
    return sorted(case for case in order if at_least is None or scores[case] >= at_least)


# ---------------------------------------------------------------------- the teacher's predictions


class Stored(NamedTuple):
    """What ``confidences.json`` says: the teacher, the stamps of the images, and the measured cases."""

    teacher: dict[str, Any]
    images: dict[str, list]
    cases: dict[str, Measured]


def stored_confidences(folder: str) -> Stored | None:
    """Read ``confidences.json``; None where there is none, or none that this module can have written."""
    file = os.path.join(folder, CONFIDENCES)
    try:
        content = read_json(file, "", keys={"teacher": dict, "images": dict, "cases": dict})
        if content["format"] != FORMAT:
            return None
        images = kept_stamps(content["images"], file)
        cases = {
            case: Measured(
                {name: int(number) for name, number in entry["voxels"].items()},
                *(
                    {name: None if value is None else float(value) for name, value in entry.get(which, {}).items()}
                    for which in ("probability", "dice")
                ),
            )
            for case, entry in content["cases"].items()
        }
    except (UserError, LookupError, TypeError, ValueError, AttributeError):
        return None
    return Stored(content["teacher"], images, cases)


def differences(then: Any, now: dict[str, Any], of: str = "") -> list[str]:
    """How a dataset or a teacher differs from the one that a record names, in words.

    Args:
        then: what the record says, of whatever shape.
        now: the same of now. ``checkpoint`` (with a fold, where there are several) is a file's name and its stamp,
            whose time tells nothing.
        of: what comes before the names of its fields, for instance ``"teacher's "``.
    """
    if not isinstance(then, dict):
        return [f"{of}record was {then!r}"]
    found = []
    for key in [*now, *(key for key in then if key not in now)]:
        before, after = then.get(key), now.get(key)
        if isinstance(after, dict):
            found += differences(before, after, f"{key}'s ")
        elif key.startswith("checkpoint") and isinstance(after, list):
            if not (isinstance(before, list) and len(before) == len(after) and before[0] == after[0]):
                found.append(f"{of}{key} was {before[0] if isinstance(before, list) and before else before}, "
                             f"now {after[0]}")  # fmt: skip
            elif not same_content(before[1:], after[1:]):
                found.append(f"{of}{after[0]}{key.removeprefix('checkpoint')} was another file")
        elif before != after:
            was, is_now = ("not given" if value is None else value for value in (before, after))
            found.append(f"{of}{key} was {was}, now {is_now}")
    return found


class Predictions:
    """A teacher's label maps of the unlabelled images, and how confident it was of each; or those of two teachers.

    They lie in one folder as nnU-Net wrote them, with ``confidences.json``. Probabilities are removed as soon as they
    are measured. What was made by another teacher or from another image is made again.

    Args:
        folder: of the predictions; need not exist.
        teacher: what identifies the teacher, as JSON keeps it and :func:`differences` compares it: another one makes
            all predictions worthless. None while it is not trained yet.
        images: case -> channel files, of every unlabelled case.
        ending: the dataset's file ending.
    """

    def __init__(self, folder: str, teacher: dict[str, Any] | None, images: dict[str, list[str]], ending: str) -> None:
        self.folder, self.teacher, self.ending, self.images = folder, teacher, ending, images
        self.cases = list(images)
        self.measured: dict[str, Measured] = {}
        self._stored_stamps: dict[str, list] = {}
        self._stamps: dict[str, list] = {}
        stored = stored_confidences(folder)
        if stored is not None and teacher is not None and not differences(stored.teacher, teacher):
            self._stored_stamps = stored.images
            self._stamps = image_stamps({case: images[case] for case in self.cases if case in stored.images},
                                        stored.images)  # fmt: skip
            self.measured = {
                case: measured
                for case, measured in stored.cases.items()
                if self._is_current(case) and os.path.isfile(self.label_file(case))
            }

    def label_file(self, case: str) -> str:
        """The predicted label map of a case."""
        return os.path.join(self.folder, case + self.ending)

    def missing(self, part: int = 0, parts: int = 1) -> list[str]:
        """The cases that are still to be predicted or measured; of ``parts`` parts of all cases, those in ``part``."""
        return [case for case in self.cases[part::parts] if case not in self.measured]

    def begin(self) -> None:
        """Make the folder ready for nnU-Net to predict into: what is there is current, or half-done at most."""
        if not self._stored_stamps:
            shutil.rmtree(self.folder, ignore_errors=True)  # of another teacher
        os.makedirs(self.folder, exist_ok=True)
        for case in self._stored_stamps:
            if not self._is_current(case):
                self._remove(case)
        self._stamps = image_stamps(self.images, self._stamps)
        self.save()

    def collect(
        self,
        plans_manager: PlansManager,
        dataset_json: dict,
        votes: Mapping[str, str] | None = None,
        network: bool = True,
    ) -> None:
        """Measure what the teachers have predicted, and remove the network's probabilities.

        Args:
            plans_manager, dataset_json: the teacher's.
            votes: case -> what labelled cases say of it: files as ``--save_probabilities`` writes them, less ``.npz``
                and ``.pkl``. With a network the label map becomes that of the mean of the two.
            network: whether one has predicted.
        """
        label_manager = plans_manager.get_label_manager(dataset_json)
        reader = plans_manager.image_reader_writer_class()
        found = [case for case in self.missing() if not network or os.path.isfile(self._file(case, ".npz"))]
        title = "Measuring confidence" if votes is None else "Measuring the teachers"
        saved = time.monotonic()
        for case in tqdm(found, desc=title, disable=not found):
            teachers = []
            if network:
                if (predicted := self._whole_prediction(case, reader, label_manager)) is None:
                    self._remove(case)
                    continue
                teachers.append(predicted)
            if votes is not None:
                with np.load(f"{votes[case]}.npz") as archive:
                    teachers.append(archive["probabilities"].astype(np.float32))
            mean = sum(teachers[1:], teachers[0]) / len(teachers)
            if votes is not None:
                labels = label_manager.convert_probabilities_to_segmentation(mean)
                kind = np.uint8 if len(label_manager.foreground_labels) < 255 else np.uint16  # as nnU-Net's
                reader.write_seg(labels.astype(kind), self.label_file(case), load_pickle(f"{votes[case]}.pkl"))
            measured = measure(mean, label_manager)
            if len(teachers) > 1:
                measured = measured._replace(dice=dice_between(teachers[0], teachers[1], label_manager))
            self.measured[case] = measured
            if time.monotonic() - saved > SAVE_EVERY:
                self._keep()
                saved = time.monotonic()
        self._keep()

    def _whole_prediction(self, case: str, reader: BaseReaderWriter, label_manager: LabelManager) -> np.ndarray | None:
        """The probabilities that nnU-Net has written of a case; None of what a kill has cut off.

        nnU-Net writes a label map after its probabilities: then it is not there, or not what the probabilities say.
        """
        try:
            with np.load(self._file(case, ".npz")) as archive:
                probabilities = archive["probabilities"]
            written = reader.read_seg(self.label_file(case))[0][0]
        except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error,
                pickle.UnpicklingError):  # fmt: skip
            return None
        said = label_manager.convert_probabilities_to_segmentation(probabilities)
        return probabilities if np.array_equal(written, said) else None

    def _keep(self) -> None:
        """Save what is measured; its probabilities are not needed any more."""
        self.save()
        for case in self.measured:
            for ending in (".npz", ".pkl"):
                if os.path.isfile(file := self._file(case, ending)):
                    os.remove(file)

    def _is_current(self, case: str) -> bool:
        return case in self._stamps and same_images(self._stored_stamps[case], self._stamps[case])

    def _file(self, case: str, ending: str) -> str:
        return os.path.join(self.folder, case + ending)

    def _remove(self, case: str) -> None:
        for ending in (self.ending, ".npz", ".pkl"):
            if os.path.isfile(file := self._file(case, ending)):
                os.remove(file)

    def save(self) -> None:
        """Write ``confidences.json``; also to keep the times of copied images, which are read once for that."""
        self._stored_stamps = self._stamps
        content = {
            "format": FORMAT,
            "teacher": self.teacher,
            "images": self._stamps,
            "cases": {case: self.measured[case]._asdict() for case in self.cases if case in self.measured},
        }
        write_json(os.path.join(self.folder, CONFIDENCES), content)


# ---------------------------------------------------------------------- the new dataset


class Source(NamedTuple):
    """The dataset to start from, seen by some of its folds. No label of an unlabelled case has a place in it.

    Attributes:
        name: for instance ``Dataset504_Hippocampus_5labeled``.
        folder: the raw dataset.
        dataset_json: its ``dataset.json``.
        images: case -> channel files, of the labelled cases.
        unlabeled: the same of ``imagesUn``.
        labeled: the cases that one of the folds trains on.
        validation: those that none of them does; where there are none, as in fold ``all``, the labelled ones.
    """

    name: str
    folder: str
    dataset_json: dict
    images: dict[str, list[str]]
    unlabeled: dict[str, list[str]]
    labeled: list[str]
    validation: list[str]


def read_source(name: str, *folds: str) -> Source:
    """Find out who is what in a raw dataset, by names alone.

    Args:
        name: of the dataset.
        folds: numbers, or ``all``: then all labelled cases train and validate, as nnU-Net has it.

    Raises:
        UserError: no such dataset or fold, no unlabelled image, or one that bears a labelled one's name.
    """
    folder = os.path.join(required_folder("nnUNet_raw"), name)
    dataset_json = read_dataset_json(folder)
    images = find_labeled(folder, dataset_json)
    unlabeled = find_unlabeled(folder, dataset_json)
    refuse_labeled_names(unlabeled, images)
    if "all" in folds:
        return Source(name, folder, dataset_json, images, unlabeled, list(images), list(images))
    file = os.path.join(required_folder("nnUNet_preprocessed"), name, SPLITS)
    splits = read_splits(file, f"It says which cases fold {folds[0]} was trained on: restore it.")
    if missing := [fold for fold in folds if int(fold) >= len(splits)]:
        raise UserError(f"{file} has {len(splits)} fold(s), but not -f {missing[0]}. Name one that it has, or all.")
    labeled = sorted({case for fold in folds for case in splits[int(fold)].train})
    validation = sorted({case for fold in folds for case in splits[int(fold)].val} - set(labeled)) or labeled
    if unknown := sorted({*labeled, *validation} - set(images)):
        raise UserError(f"{file} names {unknown[0]}, which {os.path.join(folder, 'imagesTr')} does not hold.")
    return Source(name, folder, dataset_json, images, unlabeled, labeled, validation)


def write_pseudolabeled(
    target: str,
    source: Source,
    predictions: Predictions,
    at_least: float | None,
    keep: float | None,
    made_with: dict[str, Any],
    copy: bool = False,
    by: str = "confidence",
    finish: bool = False,
) -> Split:
    """Make the raw dataset in which the teacher's best predictions are labels.

    Images and true labels are links, as ``nnUNetv2_ssl_split`` makes them; the pseudo-labels are files of its own.

    Args:
        target: the new dataset's name.
        source: where images and true labels come from.
        predictions: the teacher's, all of them measured.
        at_least, keep: as for ``choose``.
        made_with: what the record says of how it was made.
        copy: copy the files instead of linking to them.
        by: which are the best: those of most ``confidence``, or of most ``agreement`` between two teachers.
        finish: whether there is a fold 1, which trains on the labelled cases alone.

    Returns:
        Who is what; ``labeled`` holds the pseudo-labelled cases too.

    Raises:
        UserError: no case is kept, or the dataset cannot be written. Nothing is written then.
    """
    scores = {case: getattr(measured, by) for case, measured in predictions.measured.items()}
    kept = choose(scores, at_least, keep)
    if not kept:
        best = max(scores, key=lambda case: scores[case])
        nothing = "The teacher sees no foreground." if by == "confidence" else "The teachers agree on no foreground."
        raise UserError(
            f"no prediction in {predictions.folder} is kept: {WHO_IS_BEST[by]} that of {best}, with "
            f"{scores[best]:.3f}. " + (f"Lower --min-{by}, or use --keep." if scores[best] else nothing)
        )
    rest = [case for case in source.unlabeled if case not in kept]
    split = Split(sorted([*source.labeled, *kept]), source.validation, rest, [])

    raw = os.path.dirname(source.folder)
    with new_dataset(raw, target, copy) as building:
        images = {**source.images, **source.unlabeled}
        write_dataset(building, target, source.folder, source.dataset_json, images, split, copy, kept)
        if finish:
            fold_1 = {"train": source.labeled, "val": source.validation}
            splits = os.path.join(building, SPLITS)
            write_json(splits, [*read_json(splits, "", list), fold_1])
        for case in kept:
            label = predictions.label_file(case)
            shutil.copyfile(label, os.path.join(building, "labelsTr", os.path.basename(label)))
            spacing = os.path.join(predictions.folder, f"{case}.json")  # of nnU-Net's TIFF reader
            if os.path.isfile(spacing):
                shutil.copyfile(spacing, os.path.join(building, "labelsTr", f"{case}.json"))
        write_report(os.path.join(building, REPORT), predictions.measured, kept, by)
        draw_scores(os.path.join(building, PICTURE), scores, kept, at_least, by)
        record = {
            "name": target,
            "source": source.name,
            "made_with": made_with,
            "labeled": source.labeled,
            "validation": source.validation,
            "pseudo_labeled": kept,
            "unlabeled": rest,
        }
        write_json(os.path.join(building, PSEUDOLABELED), record)
    return split


# ---------------------------------------------------------------------- the report


def write_report(file: str, measured: dict[str, Measured], kept: Iterable[str], by: str = "confidence") -> None:
    """Write a row for each unlabelled case, the most confident first, or the one that the teachers agree on most."""
    kept = set(kept)
    some = next(iter(measured.values()))
    whats = ["confidence", *(["agreement"] if some.dice else [])]
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        columns = [f"{what}_{name}" for name in some.voxels for what in ("voxels", *whats)]
        writer.writerow(["case", *whats, "kept", *columns])
        for case in sorted(measured, key=lambda case: (-getattr(measured[case], by), case)):
            one = measured[case]
            values: list[int | str] = []
            for name in one.voxels:
                shares = [one.probability[name], *([one.dice[name]] if some.dice else [])]
                values += [one.voxels[name], *("" if share is None else f"{share:.4f}" for share in shares)]
            scores = [f"{getattr(one, what):.4f}" for what in whats]
            writer.writerow([case, *scores, "yes" if case in kept else "no", *values])


def draw_scores(
    file: str, scores: dict[str, float], kept: Iterable[str], at_least: float | None, by: str = "confidence"
) -> None:
    """Draw the histogram of confidence or agreement, kept and not kept, with the threshold that parts them.

    Args:
        file: the picture to write.
        scores: of every case.
        kept: the cases that are kept.
        at_least: the threshold; None where a fraction was kept, which the last of them bounds.
        by: what the scores are.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kept = set(kept)
    threshold = min(scores[case] for case in kept) if at_least is None else at_least
    groups = {
        f"kept ({len(kept)})": [scores[case] for case in kept],
        f"not kept ({len(scores) - len(kept)})": [scores[case] for case in scores if case not in kept],
    }
    figure = Figure(figsize=(6, 3.5))
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    bins = np.linspace(min([*scores.values(), threshold, 0.99]), 1, 31).tolist()
    axis.hist(list(groups.values()), bins, stacked=True, label=list(groups), color=["#30638e", "#d1495b"])
    axis.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3g}")
    axis.set_xlabel(f"{by} of a case")
    axis.set_ylabel("cases")
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
