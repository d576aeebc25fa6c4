"""What is to be evaluated: classes, names, groups, the ignore label and the files' ending, from ``dataset.json``."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.label_maps import read_label_map
from nnunet_ssl.evaluation.metrics import Label, labels_of, positions
from nnunet_ssl.files import read_json
from nnunet_ssl.names import file_ending, path_component
from nnunet_ssl.volumes import VolumeError

GROUPS_KEY = "class_groups"
LARGEST_LABEL = 65535  # nnU-Net writes predictions as uint16 at most
MAX_NAMED = 10  # labels in a message
NAME_DATASET_JSON = "Name the dataset's dataset.json with -djfile."


@dataclass(frozen=True)
class Dataset:
    """The classes of a dataset and how its files are read."""

    classes: dict[Label, str]  # label or region -> name in tables; without the background
    file_ending: str  # for instance .nii.gz
    reader: type  # nnU-Net's reader class
    ignore_label: int | None = None  # of voxels that do not count, or None
    groups: dict[str, tuple[Label, ...]] = field(default_factory=dict)  # name -> classes that are averaged under it
    declared: frozenset[int] | None = None  # the labels that a label map may hold; None for any
    declared_by: str = "dataset.json"  # who says so, for messages

    def check_labels(self, labels: np.ndarray, file: str) -> None:
        """Refuse labels that nobody declared: they would count as background, as 255 for 1 does.

        Raises:
            VolumeError: names the file and the values.
        """
        if self.declared is None:
            return
        unknown = np.unique(labels[positions(labels, sorted(self.declared)) == 0])
        if len(unknown):
            raise VolumeError(
                f"{file} holds the label(s) {_listed(unknown)}, but {self.declared_by} has only "
                f"{_listed(sorted(self.declared))}"
            )


def read_dataset(
    reference: str,
    predictions: Sequence[str],
    dataset_json: str | None = None,
    groups: str | None = None,
) -> Dataset:
    """Find out what there is to evaluate.

    Without a ``dataset.json`` the classes are all labels but 0 that occur in the truth, and the files are .nii.gz.

    Args:
        reference: folder of the true label maps.
        predictions: folders of predicted label maps.
        dataset_json: file; by default the one next to the folder of the truth, in it, or with the predictions.
        groups: JSON file with groups of classes, name -> list of labels or class names. By default those under
            ``class_groups`` in ``dataset.json``.

    Raises:
        UserError: a file cannot be read or does not say what it must.
    """
    places = [os.path.dirname(os.path.abspath(reference)), reference, *predictions]
    files = [os.path.join(folder, "dataset.json") for folder in places]
    file = dataset_json or next(filter(os.path.isfile, files), None)
    content: dict = {"file_ending": ".nii.gz"}
    if file:
        content = read_json(file, NAME_DATASET_JSON, keys={"labels": dict, "file_ending": str})
    ending = file_ending(content["file_ending"], file or "")
    examples = files_in(reference, ending)
    if not examples:
        raise UserError(f"{reference} holds no {ending} file. Name the folder of the true labels with -ref.")
    reader = _reader(content, os.path.join(reference, examples[0]))

    ignore = None
    if file:
        classes, ignore = classes_of(content, file)
        declared = declared_labels(classes, ignore)
    else:
        print(f"No dataset.json near {reference}: evaluating every label that occurs there.", flush=True)
        declared = _labels_in([os.path.join(reference, name) for name in examples], reader) | {0}
        classes = {label: str(label) for label in sorted(declared) if label > 0}
    if not classes:
        raise UserError(f"{file or reference} has no label except the background: there is nothing to evaluate.")

    group_content = content.get(GROUPS_KEY, {})
    if groups:
        group_content = read_json(groups, "Name a JSON file with groups of classes with --groups.")
        group_content = group_content.get(GROUPS_KEY, group_content)
    resolved = _groups(group_content, classes, groups or file or "")
    return Dataset(classes, ending, reader, ignore, resolved, declared, file or f"{reference} (no dataset.json)")


def files_in(folder: str, ending: str) -> list[str]:
    """Names of the label maps of a folder, sorted; hidden files are none.

    Raises:
        UserError: there is no such folder, or a name in it that cannot be printed.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}). Name a folder of label maps.") from error
    return sorted(
        path_component(name, "file", folder)
        for name in names
        if name.endswith(ending) and not name.startswith(".") and os.path.isfile(os.path.join(folder, name))
    )


def _reader(content: dict, example: str) -> type:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    with contextlib.redirect_stderr(io.StringIO()):  # the stack traces of readers that do not fit
        try:
            reader = determine_reader_writer_from_dataset_json(content, example, verbose=False)
            if issubclass(reader, BaseReaderWriter):
                return reader
        except Exception as error:  # of a reader's name that is no text, too
            raise UserError(
                f"nnU-Net has no reader that can read {example}. It may be damaged, or the file_ending wrong."
            ) from error
    raise UserError(f"overwrite_image_reader_writer {reader.__name__} is no reader of nnU-Net. Correct dataset.json.")


def classes_of(dataset_json: dict, source: str) -> tuple[dict[Label, str], int | None]:
    """The classes as nnU-Net understands them: its foreground labels, or the regions where there are any.

    Returns:
        label or region -> name, and the ignore label.

    Raises:
        UserError: nnU-Net does not accept the labels of ``source``.
    """
    from nnunetv2.utilities.label_handling.label_handling import LabelManager  # imports torch

    try:
        labels = dataset_json["labels"]
        manager = LabelManager(labels, dataset_json.get("regions_class_order"))
        foreground = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        foreground = [as_label(value, manager.has_regions) for value in foreground]
        name_of = {as_label(value, manager.has_regions): name for name, value in labels.items()}
        if not all(0 <= label <= LARGEST_LABEL for label in declared_labels(foreground, manager.ignore_label)):
            raise ValueError(f"a label lies between 0 and {LARGEST_LABEL}")
    except Exception as error:
        raise UserError(f"{source}: nnU-Net does not accept its labels ({error}). Correct them.") from error
    return {label: name_of.get(label, str(label)) for label in foreground}, manager.ignore_label


def declared_labels(classes: Iterable[Label], ignore_label: int | None) -> frozenset[int]:
    """The labels that a label map may hold: background, the labels of all classes, and the ignore label."""
    ignored = () if ignore_label is None else (ignore_label,)
    return frozenset({0, *ignored, *(label for members in map(labels_of, classes) for label in members)})


def as_label(value: int | Sequence[int], has_regions: bool) -> Label:
    """A label, or the labels of a region; in a dataset without regions ``[1]`` is another way to write 1."""
    if np.isscalar(value):
        return int(value)
    labels = tuple(int(v) for v in value)
    return labels[0] if len(labels) == 1 and not has_regions else labels


def _labels_in(files: Sequence[str], reader: type) -> frozenset[int]:
    labels: set[int] = set()
    for file in files:
        try:
            labels.update(np.unique(read_label_map(file, reader())[0]).tolist())
        except VolumeError as error:
            raise UserError(f"{error}. {error.remedy}") from error
    return frozenset(labels)


def _listed(labels: Sequence[int]) -> str:
    return ", ".join([*map(str, labels[:MAX_NAMED]), *(["..."] if len(labels) > MAX_NAMED else [])])


def _groups(content: object, classes: dict[Label, str], file: str) -> dict[str, tuple[Label, ...]]:
    """Resolve labels, regions and names of classes."""
    by_name = {name: label for label, name in classes.items()}
    has_regions = any(isinstance(label, tuple) for label in classes)
    if not isinstance(content, dict) or not all(isinstance(members, list) and members for members in content.values()):
        raise UserError(f'{file}: groups of classes must be written as {{"name": [labels or class names], ...}}.')
    groups: dict[str, tuple[Label, ...]] = {}
    for name, members in content.items():
        resolved = [by_name.get(m) if isinstance(m, str) else _label(m, has_regions) for m in members]
        unknown = [m for m, label in zip(members, resolved, strict=True) if label not in classes]
        if unknown:
            raise UserError(
                f"{file}: group {name} names {unknown[0]!r}, which is not a class of this dataset; the classes are "
                f"{', '.join(f'{label} ({n})' for label, n in classes.items())}."
            )
        groups[name] = tuple(dict.fromkeys(resolved))
    return groups


def _label(member: object, has_regions: bool) -> Label | None:
    numbers = member if isinstance(member, list) else [member]
    return as_label(member, has_regions) if all(type(number) is int for number in numbers) else None
