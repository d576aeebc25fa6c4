"""What the teachers have predicted, kept from run to run: the label maps, and how confident they were of each."""

from __future__ import annotations

import os
import pickle
import shutil
import time
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from pydantic import TypeAdapter
from tqdm import tqdm

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json, write_json
from nnunet_ssl.self_training.confidence import Measured, dice_between, measure
from nnunet_ssl.shapes.vote import as_probabilities
from nnunet_ssl.steps import differences
from nnunet_ssl.unlabeled.stamps import image_stamps, kept_stamps, same_images

FORMAT = 2
CONFIDENCES = "confidences.json"
SAVE_EVERY = 2.0  # seconds between two writes of what has been measured


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
        if content["format"] == FORMAT:
            cases = TypeAdapter(dict[str, Measured]).validate_python(content["cases"])
            return Stored(content["teacher"], kept_stamps(content["images"], file), cases)
    except (UserError, LookupError, TypeError, ValueError, AttributeError):
        pass
    return None


class Predictions:
    """A teacher's label maps of the unlabeled images, and its confidence in each; or the same for two teachers.

    They lie in one folder as nnU-Net wrote them, with ``confidences.json``. Probabilities are removed as soon as they
    are measured. What was made by another teacher or from another image is made again.

    Args:
        folder: of the predictions; need not exist.
        teacher: what identifies the teacher, as JSON keeps it and :func:`differences` compares it: another one makes
            all predictions worthless. None while it is not trained yet.
        images: case -> channel files, of every unlabeled case.
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
        self._new = set(self.measured)  # whose probabilities may still be there

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
            votes: case -> what labeled cases say of it: files as ``--save_probabilities`` writes them, less ``.npz``
                and ``.pkl``. With a network, the label map becomes the one of the two teachers' mean, and the network's
                where no labeled case says anything. Without one, the ignore label is there, if the dataset has one.
            network: whether one has predicted.
        """
        label_manager = plans_manager.get_label_manager(dataset_json)
        reader = plans_manager.image_reader_writer_class()
        found = [case for case in self.missing() if not network or os.path.isfile(self._file(case, ".npz"))]
        title = "Measuring confidence" if votes is None else "Measuring the teachers"
        saved = time.monotonic()
        for case in tqdm(found, desc=title, disable=not found):
            predicted = None
            if network and (predicted := self._whole_prediction(case, reader, label_manager)) is None:
                self._remove(case)
                continue
            if votes is None:
                assert predicted is not None  # of a network and an atlas one teaches at least
                measured = measure(predicted, label_manager)
            else:
                mean, voted, said = _with_votes(predicted, votes[case], label_manager)
                labels = label_manager.convert_probabilities_to_segmentation(mean)
                if predicted is None and label_manager.has_ignore_label:
                    labels[~said] = label_manager.ignore_label
                kind = np.uint8 if len(label_manager.foreground_labels) < 255 else np.uint16  # as nnU-Net's
                reader.write_seg(labels.astype(kind), self.label_file(case), load_pickle(f"{votes[case]}.pkl"))
                measured = measure(mean, label_manager)
                if predicted is not None:  # of what both teachers speak of
                    agreed = dice_between(np.where(said, predicted, 0), voted, label_manager)
                    measured = measured._replace(dice=agreed)
            self.measured[case] = measured
            self._new.add(case)
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
        for case in self._new:
            self._remove(case, ".npz", ".pkl")
        self._new.clear()

    def _is_current(self, case: str) -> bool:
        return case in self._stamps and same_images(self._stored_stamps[case], self._stamps[case])

    def _file(self, case: str, ending: str) -> str:
        return os.path.join(self.folder, case + ending)

    def _remove(self, case: str, *endings: str) -> None:
        for ending in endings or (self.ending, ".npz", ".pkl"):
            Path(self._file(case, ending)).unlink(missing_ok=True)

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


def _with_votes(
    predicted: np.ndarray | None, file: str, label_manager: LabelManager
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both teachers' mean, ``[C, *image]``, the atlases' part in it, and bool ``[*image]``, where they say anything."""
    with np.load(f"{file}.npz") as archive:
        voted, said = as_probabilities(archive["probabilities"].astype(np.float32), label_manager)
    mean = voted if predicted is None else np.where(said, (predicted + voted) / 2, predicted)
    return mean, voted, said
