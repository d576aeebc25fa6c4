"""The cases that are shown: test cases with a truth, or the cases of the fold if there are none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ssl.errors import UserError
from nnunet_ssl.unlabeled.find import find_images, find_labeled, read_dataset_json, required_folder, resolve_dataset
from nnunet_ssl.unlabeled.folds import SPLITS, read_splits


@dataclass(frozen=True)
class Case:
    """An image with its truth."""

    name: str  # as nnU-Net calls it
    images: tuple[Path, ...]  # a file a channel
    label: Path  # the true label map
    kind: str = "test"  # or validation, training: cases of the fold


def find_cases(dataset_id: str | int, fold: str) -> list[Case]:
    """The test cases that have a truth; where there are none the validation cases of the fold.

    Fold ``all`` has no validation cases: nnU-Net validates it on its training cases, which are given then.

    Raises:
        UserError: there is neither.
    """
    dataset = resolve_dataset(dataset_id)
    raw = Path(required_folder("nnUNet_raw")) / dataset
    dataset_json = read_dataset_json(str(raw))
    ending = dataset_json["file_ending"]
    if (raw / "imagesTs").is_dir() and (raw / "labelsTs").is_dir():
        images = find_images(str(raw / "imagesTs"), ending)[0]
        labels = {name: raw / "labelsTs" / f"{name}{ending}" for name in images}
        if without := [name for name, label in labels.items() if not label.is_file()]:
            print(f"Left out, because {raw / 'labelsTs'} does not have their truth: {', '.join(without)}", flush=True)
        if len(without) < len(images):
            return [_case(name, images[name], labels[name]) for name in images if name not in without]
    return _cases_of_fold(dataset, raw, dataset_json, fold)


def _cases_of_fold(dataset: str, raw: Path, dataset_json: dict[str, Any], fold: str) -> list[Case]:
    kind = "training" if fold == "all" else "validation"
    images = find_labeled(str(raw), dataset_json)
    names = list(images)
    if fold != "all":
        file = Path(required_folder("nnUNet_preprocessed")) / dataset / SPLITS
        remedy = (
            f"It must name the validation cases, because {raw} has no test cases with a truth (imagesTs and labelsTs): "
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


def _case(name: str, images: Sequence[str], label: Path, kind: str = "test") -> Case:
    return Case(name, tuple(map(Path, images)), label, kind)


def cases_in_words(cases: Sequence[Case]) -> str:
    """For captions: how many of which kind, from where."""
    return f"{len(cases)} {cases[0].kind} case{'s' if len(cases) > 1 else ''}, truth from `{cases[0].label.parent}`"
