"""A folder of images and labels under the same names, whose lists stand in its ``protocol.json`` or are drawn."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nnunet_ssl.datasets.cases import Files
from nnunet_ssl.datasets.lists import Lists, twice
from nnunet_ssl.datasets.recipe import Recipe
from nnunet_ssl.datasets.writing import prepare
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json

FILE = "protocol.json"
DRAWN_TEST, DRAWN_TRAIN = 40, 160  # cases, where there is no protocol.json


def add_order(parser: argparse.ArgumentParser) -> None:
    """``--seed``, for ``from_protocol``."""
    text = f"Seed: which order of {FILE}'s training cases, from 0. Default: 0"
    parser.add_argument("--seed", type=int, default=0, help=text)


def from_protocol(args: argparse.Namespace, title: str, recipe: Recipe, patients: bool = False) -> None:
    """Prepare a folder with ``images`` and ``labels``, or ``imagesTr`` and ``labelsTr``, which hold the same names.

    The lists are in its ``protocol.json``; without one they are drawn by ``draw_lists``. Where patients have several
    cases, the lists name patients, and ``cases_of_patient`` says which cases are theirs. With ``patients`` it must be
    there, since lists of cases would split patients. The dataset's name begins with ``title``.

    Raises:
        UserError: anything is wrong; then nothing was written.
    """
    suffix = "Tr" if (args.data / "imagesTr").is_dir() else ""
    if not (args.data / f"images{suffix}").is_dir():
        raise UserError(f"{args.data} holds neither imagesTr nor images: --data takes the folder that does.")
    images, labels = (Files(args.data / f"{folder}{suffix}", "{}.nii.gz") for folder in ("images", "labels"))
    file = args.data / FILE
    cases_of: dict[str, list[str]] = {}
    if file.is_file():
        train, test, several, cases_of = read_protocol(file, args.seed)
    if patients and not cases_of:
        raise UserError(f"{file} with 'cases_of_patient' is needed: lists of cases would test on patients that train.")
    if not file.is_file():
        train, test = draw_lists(images.found, args.seed, images.root)
        several = True
        print(
            f"Without {file} the lists were drawn ({len(train)} training and {len(test)} test cases of "
            f"{len(images.found)}): results on them can be compared with each other, but not with docs/results.md, "
            f"which uses its own {FILE}."
        )
    parts = Lists(train, test, ordered=len(train) - 1).parts(args.labeled)
    if cases_of:
        parts = {case: part for patient, part in parts.items() for case in cases_of[patient]}
    seed = f"Seed{args.seed}" if several else ""
    name = f"{title}AllLabels" if args.labeled == "all" else f"{title}{seed}Labeled{args.labeled}"
    groups = {case: patient for patient in cases_of for case in cases_of[patient]}
    prepare(parts, images, labels, recipe, name, args, groups=groups)


def draw_lists(cases: Iterable[str], seed: int, folder: Path) -> tuple[list[str], list[str]]:
    """Lists for a dataset whose owners publish none.

    Sorted by name and permuted by ``default_rng(0)``, the first 40 cases are test cases and the next 160, or as many as
    there are, training cases. A seed's order is ``default_rng(seed)``'s permutation of the sorted training cases.

    Returns:
        The training cases in the seed's order, and the test cases.

    Raises:
        UserError: the seed is negative, or there are not two training cases in ``folder``.
    """
    if seed < 0:
        raise UserError(f"--seed {seed}: expected 0 or more.")
    names = sorted(cases)
    if len(names) < DRAWN_TEST + 2:
        raise UserError(
            f"{folder} holds {len(names)} cases (.nii.gz), and without a {FILE} next to it {DRAWN_TEST} of them "
            f"are drawn as test cases. Give the folder of the whole dataset, or write a {FILE}."
        )
    drawn = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
    train = sorted(drawn[DRAWN_TEST : DRAWN_TEST + DRAWN_TRAIN])
    return [train[i] for i in np.random.default_rng(seed).permutation(len(train))], drawn[:DRAWN_TEST]


def read_protocol(file: Path, seed: int) -> tuple[list[str], list[str], bool, dict[str, list[str]]]:
    """What a ``protocol.json`` says for a seed.

    Where there is ``cases_of_patient``, training and test "cases" are patients; else the last one is empty.

    Returns:
        The training cases in the order of the seed, the test cases, whether there are several orders, and the cases
        of each patient.

    Raises:
        UserError: it is no such file, it contradicts itself, or has no order for the seed.
    """
    wanted = 'Write {"train": [...], "test": [...], "labelled_order": [[...], ...]}, the lists holding cases.'
    protocol = read_json(file, wanted, keys={"train": list, "test": list, "labelled_order": list})
    train, test, orders = (protocol[key] for key in ("train", "test", "labelled_order"))
    try:
        cases_of = {patient: list(cases) for patient, cases in protocol.get("cases_of_patient", {}).items()}
    except (TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({error!r}). {wanted}") from error
    what = "patient" if cases_of else "case"
    if twice(train + test):
        raise UserError(f"{file} names a {what} twice among 'train' and 'test'.")
    for number, order in enumerate(orders):
        if sorted(order) != sorted(train):
            raise UserError(f"{file}: order {number} of 'labelled_order' does not hold exactly the {what}s of 'train'.")
    if cases_of:
        cases_of = {patient: cases_of.get(patient, []) for patient in train + test}
        if without := [patient for patient, cases in cases_of.items() if not cases]:
            raise UserError(f"{file}: 'cases_of_patient' names no case of {', '.join(without)}.")
        if doubled := twice([case for cases in cases_of.values() for case in cases]):
            raise UserError(f"{file}: 'cases_of_patient' names a case twice: {', '.join(doubled)}.")
    if not 0 <= seed < len(orders):
        raise UserError(f"--seed {seed}: {file} has orders 0 to {len(orders) - 1}.")
    return orders[seed], test, len(orders) > 1, cases_of
