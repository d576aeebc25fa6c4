"""The dataset to start from, and the one in which the best predictions are labels, with a report of all cases.

The best predictions join the labeled cases; the validation cases stay as they are.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json, write_json
from nnunet_ssl.names import a_few
from nnunet_ssl.self_training.confidence import Measured, choose
from nnunet_ssl.self_training.predictions import Predictions
from nnunet_ssl.unlabeled.find import (
    PSEUDOLABELED,
    find_labeled,
    find_unlabeled,
    read_dataset_json,
    refuse_labeled_names,
    required_folder,
    with_spacing,
)
from nnunet_ssl.unlabeled.folds import SPLITS, read_splits
from nnunet_ssl.unlabeled.groups import all_groups
from nnunet_ssl.unlabeled.raw_dataset import Split, new_dataset, write_dataset
from nnunet_ssl.unlabeled.stamps import refuse_copies

WHO_IS_BEST = {"confidence": "the most confident is the one of", "agreement": "the teachers agree most on"}
REPORT, PICTURE = "pseudolabels.csv", "pseudolabels.png"


class Source(NamedTuple):
    """The dataset to start from, seen by some of its folds. No label of an unlabeled case has a place in it."""

    name: str  # for instance Dataset504_Hippocampus_5labeled
    folder: str  # the raw dataset
    dataset_json: dict  # its dataset.json
    images: dict[str, list[str]]  # case -> channel files, of the labeled cases
    unlabeled: dict[str, list[str]]  # the same of imagesUn
    labeled: list[str]  # the cases that one of the folds trains on
    validation: list[str]  # those that none of them does; where there are none, as in fold "all", the labeled ones

    @property
    def identity(self) -> dict[str, str]:
        """Who is what, in few words: what a dataset that was made from others would hide, patients who judge too."""
        parts: dict[str, list] = {"labeled": self.labeled, "validation": self.validation}
        parts["unlabeled"] = self._with_sizes()
        return {name: f"{len(part)} cases ({_digest(part)})" for name, part in parts.items()}

    def _with_sizes(self) -> list[list]:
        """Another image of the same name rarely has the same size; whether its content is new, predicting tells."""
        return [[case, *map(os.path.getsize, files)] for case, files in sorted(self.unlabeled.items())]


def _digest(content: list) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]


def read_source(name: str, *folds: str) -> Source:
    """Find out who is what in a raw dataset, by names alone.

    In fold ``all`` all labeled cases train and validate, as nnU-Net has it.

    Raises:
        UserError: no such dataset or fold, no unlabeled image, or one that bears a labeled one's name or is its copy.
    """
    folder = os.path.join(required_folder("nnUNet_raw"), name)
    dataset_json = read_dataset_json(folder)
    images = find_labeled(folder, dataset_json)
    unlabeled = find_unlabeled(folder, dataset_json)
    refuse_labeled_names(unlabeled, images)
    refuse_copies(unlabeled, images)
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
    if validation != labeled:  # their patients are to be new to the student
        groups = all_groups(name)
        judging = {groups.get(case, case) for case in validation}
        left_out = {case for case in unlabeled if groups.get(case, case) in judging}
        unlabeled = {case: files for case, files in unlabeled.items() if case not in left_out}
        if left_out:
            print(f"{len(left_out)} unlabeled images of validation patients are left out ({a_few(sorted(left_out))}).")
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

    Images and true labels are links, as ``nnUNetv2_ssl_split`` makes them, or with ``copy`` copies; the pseudo-labels
    are new files.

    Args:
        target: the new dataset's name.
        source: where images and true labels come from.
        predictions: the teacher's, all of them measured.
        at_least, keep: as for ``choose``.
        made_with: what the record says of how it was made.
        by: which cases are the best: by ``confidence``, or by ``agreement`` between two teachers.
        finish: whether there is a fold 1, which trains on the labeled cases alone.

    Returns:
        Who is what; ``labeled`` holds the pseudo-labeled cases too.

    Raises:
        UserError: no case is kept, or the dataset cannot be written. Nothing is written then.
    """
    scores = {case: getattr(measured, by) for case, measured in predictions.measured.items()}
    kept = choose(scores, at_least, keep)
    if not kept:
        best = max(scores, key=lambda case: scores[case])
        nothing = "The teacher sees no foreground." if by == "confidence" else "The teachers agree on no foreground."
        raise UserError(
            f"no prediction in {predictions.folder} is kept: {WHO_IS_BEST[by]} {best}, with "
            f"{scores[best]:.3f}. " + (f"Lower --min-{by}, or use --keep." if scores[best] else nothing)
        )
    rest = sorted(set(source.unlabeled) - set(kept))
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
            for file in with_spacing(case, [predictions.label_file(case)]):
                shutil.copyfile(file, os.path.join(building, "labelsTr", os.path.basename(file)))
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


def write_report(file: str, measured: dict[str, Measured], kept: Iterable[str], by: str = "confidence") -> None:
    """Write a row for each unlabeled case, the most confident first, or the one that the teachers agree on most."""
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
    """Draw the histogram of all cases' confidence or agreement, with the threshold that parts the kept ones.

    Where a fraction was kept, ``at_least`` is None, and the last of these bounds them.
    """
    from matplotlib.figure import Figure

    kept = set(kept)
    threshold = min(scores[case] for case in kept) if at_least is None else at_least
    groups = [scores[case] for case in kept], [scores[case] for case in scores if case not in kept]
    labels = [f"kept ({len(groups[0])})", f"not kept ({len(groups[1])})"]
    figure = Figure(figsize=(6, 3.5))
    axis = figure.subplots()
    bins = np.linspace(min([*scores.values(), threshold, 0.99]), 1, 31).tolist()
    axis.hist(groups, bins, stacked=True, label=labels, color=["#30638e", "#d1495b"])
    axis.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3g}")
    axis.set(xlabel=f"{by} of a case", ylabel="cases")
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
