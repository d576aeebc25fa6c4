"""What is to be evaluated: classes, names, groups, the ignore label and the files' ending, from ``dataset.json``."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.metrics import Label

GROUPS_KEY = "class_groups"


@dataclass(frozen=True)
class Dataset:
    """The classes of a dataset and how its files are read.

    Attributes:
        classes: label or region -> name in tables; without the background.
        file_ending: for instance ``.nii.gz``.
        reader: nnU-Net's reader class.
        ignore_label: of voxels that do not count, or None.
        groups: name -> classes that are averaged under it.
    """

    classes: dict[Label, str]
    file_ending: str
    reader: type
    ignore_label: int | None = None
    groups: dict[str, tuple[Label, ...]] = field(default_factory=dict)


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
        dataset_json: file; by default the one beside the folder of the truth, in it, or with the predictions.
        groups: JSON file with groups of classes, name -> list of labels or class names. By default those under
            ``class_groups`` in ``dataset.json``.

    Raises:
        UserError: a file cannot be read or does not say what it must.
    """
    file = dataset_json or find_dataset_json([os.path.dirname(os.path.abspath(reference)), reference, *predictions])
    content = _load(file) if file else {"file_ending": ".nii.gz"}
    if not isinstance(content, dict) or (file and not {"labels", "file_ending"} <= content.keys()):
        raise UserError(f"{file} names no labels or no file_ending. Name the dataset's dataset.json with -djfile.")
    ending = content["file_ending"]
    examples = files_in(reference, ending)
    if not examples:
        raise UserError(f"{reference} holds no {ending} file. Name the folder of the true labels with -ref.")
    reader = _reader(content, os.path.join(reference, examples[0]))

    ignore = None
    if file:
        classes, ignore = _classes_and_ignore(content, file)
    else:
        print(f"No dataset.json near {reference}: evaluating every label that occurs there.", flush=True)
        classes = _labels_in([os.path.join(reference, name) for name in examples], reader)
    if not classes:
        raise UserError(f"{file or reference} has no label but the background: there is nothing to evaluate.")

    group_content = _load(groups) if groups else content
    if isinstance(group_content, dict):
        group_content = group_content.get(GROUPS_KEY, group_content if groups else {})
    return Dataset(classes, ending, reader, ignore, _groups(group_content, classes, groups or file or ""))


def find_dataset_json(folders: Sequence[str]) -> str | None:
    """The first ``dataset.json`` in these folders."""
    files = [os.path.join(folder, "dataset.json") for folder in folders]
    return next((file for file in files if os.path.isfile(file)), None)


def files_in(folder: str, ending: str) -> list[str]:
    """Names of the label maps of a folder, sorted; hidden files are none.

    Raises:
        UserError: there is no such folder.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}). Name a folder of label maps.") from error
    return sorted(
        name
        for name in names
        if name.endswith(ending) and not name.startswith(".") and os.path.isfile(os.path.join(folder, name))
    )


def _load(file: str) -> object:
    try:
        with open(file, encoding="utf-8") as stream:
            return json.load(stream)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}). Name a JSON file.") from error


def _reader(content: dict, example: str) -> type:
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    with contextlib.redirect_stderr(io.StringIO()):  # the stack traces of readers that do not fit
        try:
            return determine_reader_writer_from_dataset_json(content, example, verbose=False)
        except RuntimeError as error:
            raise UserError(
                f"nnU-Net has no reader that can read {example}. It may be damaged, or the file_ending wrong."
            ) from error


def _classes_and_ignore(content: dict, file: str) -> tuple[dict[Label, str], int | None]:
    """nnU-Net's foreground labels, or regions where there are any."""
    from nnunetv2.utilities.label_handling.label_handling import LabelManager  # imports torch

    try:
        manager = LabelManager(content["labels"], content.get("regions_class_order"))
        foreground = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    except Exception as error:
        raise UserError(f"{file}: nnU-Net does not accept its labels ({error}). Correct them.") from error
    name_of = {as_label(value, manager.has_regions): str(name) for name, value in content["labels"].items()}
    foreground = [as_label(value, manager.has_regions) for value in foreground]
    return {label: name_of.get(label, str(label)) for label in foreground}, manager.ignore_label


def as_label(value: int | Sequence[int], has_regions: bool) -> Label:
    """A label, or the labels of a region; in a dataset without regions ``[1]`` is another way to write 1."""
    if np.isscalar(value):
        return int(value)
    labels = tuple(int(v) for v in value)
    return labels[0] if len(labels) == 1 and not has_regions else labels


def _labels_in(files: Sequence[str], reader: type) -> dict[Label, str]:
    labels: set[int] = set()
    for file in files:
        try:
            labels.update(np.unique(reader().read_seg(file)[0]).astype(int).tolist())
        except Exception as error:
            raise UserError(f"{file} cannot be read ({error}). It may be damaged: replace it.") from error
    return {label: str(label) for label in sorted(labels) if label > 0}


def _groups(content: object, classes: dict[Label, str], file: str) -> dict[str, tuple[Label, ...]]:
    """Resolve labels, regions and names of classes."""
    by_name = {name: label for label, name in classes.items()}
    has_regions = any(isinstance(label, tuple) for label in classes)
    if not isinstance(content, dict) or not all(isinstance(members, list) and members for members in content.values()):
        raise UserError(f'{file}: groups of classes must be written as {{"name": [labels or class names], ...}}.')
    groups: dict[str, tuple[Label, ...]] = {}
    for name, members in content.items():
        resolved = [by_name.get(m) if isinstance(m, str) else as_label(m, has_regions) for m in members]
        unknown = [m for m, label in zip(members, resolved, strict=True) if label not in classes]
        if unknown:
            raise UserError(
                f"{file}: group {name} names {unknown[0]!r}, which is no class of this dataset; the classes are "
                f"{', '.join(f'{label} ({n})' for label, n in classes.items())}."
            )
        groups[name] = tuple(dict.fromkeys(resolved))
    return groups
