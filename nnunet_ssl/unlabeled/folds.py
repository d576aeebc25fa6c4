"""Which cases a fold trains and validates on: nnU-Net's ``splits_final.json``, and what it makes up without one."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import NamedTuple

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json
from nnunet_ssl.names import path_component

SPLITS = "splits_final.json"
FOLDS = 5  # that nnU-Net makes by itself
REMEDY = "Train fold all, or choose the cases with nnUNetv2_ssl_split."


class Fold(NamedTuple):
    """The cases of one fold."""

    train: list[str]
    val: list[str]


def read_splits(file: str, remedy: str) -> list[Fold]:
    """Read a ``splits_final.json``.

    Raises:
        UserError: it is missing, unreadable or of another shape, or a case's name cannot be a file's; ``remedy`` says
            what to do.
    """
    folds = []
    for number, fold in enumerate(read_json(file, remedy, list)):
        parts = [fold.get(part) if isinstance(fold, dict) else None for part in Fold._fields]
        lists = [cases for cases in parts if isinstance(cases, list)]
        if len(lists) < len(parts):
            raise UserError(f'{file}: fold {number} is not written as {{"train": [...], "val": [...]}}. {remedy}')
        folds.append(Fold(*([path_component(case, "case", file) for case in cases] for cases in lists)))
    return folds


def trained_with(preprocessed: str) -> set[str]:
    """The cases that a fold of the ``splits_final.json`` in a folder trains with; none without that file.

    Raises:
        UserError: it is unreadable or of another shape.
    """
    file = os.path.join(preprocessed, SPLITS)
    folds = read_splits(file, "Correct it.") if os.path.lexists(file) else []
    return {case for fold in folds for case in fold.train}


def refuse_fold(fold: int | str, cases: Collection[str], preprocessed: str) -> None:
    """Refuse a fold, a number or ``all``, that nnU-Net cannot train, by the rules of its ``do_split``.

    The cases are preprocessed in the dataset's folder ``preprocessed``, which may have a ``splits_final.json``.

    Raises:
        UserError: too few cases, a case that is not there, or a part that is empty.
    """
    file = os.path.join(preprocessed, SPLITS)
    if not cases:
        raise UserError(f"{preprocessed} holds no preprocessed case. Run nnUNetv2_plan_and_preprocess.")
    if isinstance(fold, str):  # all
        return
    if not os.path.lexists(file):
        if len(cases) < FOLDS:
            raise UserError(
                f"fold {fold}: there is no {file}, and the {FOLDS} folds that nnU-Net makes by itself need {FOLDS} "
                f"labeled cases, but there are {len(cases)}. {REMEDY}"
            )
        return
    folds = read_splits(file, REMEDY)
    if fold >= len(folds):  # nnU-Net draws four fifths of the cases
        if int(0.8 * len(cases)) == 0:
            raise UserError(f"fold {fold}: one labeled case cannot both train and validate. {REMEDY}")
        return
    for part, names in folds[fold]._asdict().items():
        if not names:
            raise UserError(f"{file}: fold {fold} has no case under '{part}'. {REMEDY}")
        if missing := [name for name in names if name not in cases]:
            raise UserError(
                f"{file}: fold {fold} names {missing[0]} under '{part}', which is not preprocessed. {REMEDY}"
            )
