"""Datasets whose owners publish no lists: the lists stand in a ``protocol.json``, or they are drawn."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nnunet_ssl.datasets.cases import Files
from nnunet_ssl.datasets.lists import Lists, twice
from nnunet_ssl.datasets.recipe import Recipe
from nnunet_ssl.datasets.writing import prepare
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json

FILE = "protocol.json"


class Drawn(NamedTuple):
    """How many cases, or patients, are drawn where there is no ``protocol.json``."""

    test: int
    train: int  # as many as there are, where there are fewer


def add_order(parser: argparse.ArgumentParser) -> None:
    """``--seed``, for ``from_protocol``."""
    text = f"Seed: which order of {FILE}'s training cases, from 0. Default: 0"
    parser.add_argument("--seed", type=int, help=text)


def same_names(data: Path) -> tuple[Files, Files]:
    """The files of ``images`` and ``labels``, or of ``imagesTr`` and ``labelsTr``: the same names in both.

    Raises:
        UserError: neither is there.
    """
    suffix = "Tr" if (data / "imagesTr").is_dir() else ""
    if not (data / f"images{suffix}").is_dir():
        raise UserError(f"{data} holds neither imagesTr nor images: --data takes the folder that does.")
    return Files(data / f"images{suffix}", "{}.nii.gz"), Files(data / f"labels{suffix}", "{}.nii.gz")


def from_protocol(
    args: argparse.Namespace,
    title: str,
    recipe: Recipe,
    files: tuple[Files, Files],
    drawn: Drawn | None = None,
    patients: dict[str, list[str]] | None = None,
) -> None:
    """Prepare a dataset by the lists in its folder's ``protocol.json``; without one they are drawn by ``draw_lists``.

    Args:
        args: the command's.
        title: with which the dataset's name begins.
        recipe: of the dataset.
        files: its images and its labels.
        drawn: how many to draw; None where the lists are not drawn.
        patients: the cases of each patient, if patients have several. Then lists name patients, and a
            ``protocol.json`` must have its own ``cases_of_patient``, since lists of cases would split patients.

    Raises:
        UserError: anything is wrong; then nothing was written.
    """
    file, seed = args.data / FILE, args.seed or 0
    if drawn is None or file.is_file():
        train, test, several, cases_of = read_protocol(file, seed)
        if patients is not None and not cases_of:
            raise UserError(f"{file} needs 'cases_of_patient': lists of cases would test on patients that train.")
    else:
        cases_of, several = patients or {}, True
        names = files[0].found if patients is None else patients
        train, test = draw_lists(names, seed, args.data, drawn, "cases" if patients is None else "patients")
        print(
            f"Without {file} the lists were drawn ({len(train)} for training and {len(test)} for testing, of "
            f"{len(names)}): results on them can be compared with each other, but not with docs/results.md, "
            f"which uses its own {FILE}."
        )
    parts = Lists(train, test, ordered=len(train) - 1).parts(args.labeled)
    if cases_of:
        parts = {case: part for patient, part in parts.items() for case in cases_of[patient]}
    order = f"Seed{seed}" if several else ""
    name = f"{title}AllLabels" if args.labeled == "all" else f"{title}{order}Labeled{args.labeled}"
    groups = {case: patient for patient in train + test for case in cases_of.get(patient, ())}
    prepare(parts, *files, recipe, name, args, groups=groups)


def draw_lists(
    names: Iterable[str], seed: int, folder: Path, drawn: Drawn, what: str = "cases"
) -> tuple[list[str], list[str]]:
    """Lists for a dataset whose owners publish none.

    Sorted by name and permuted by ``default_rng(0)``, the first ``drawn.test`` are for testing and the next
    ``drawn.train``, or as many as there are, for training. A seed's order is ``default_rng(seed)``'s permutation of
    those, sorted.

    Returns:
        What is for training in the seed's order, and what is for testing.

    Raises:
        UserError: the seed is negative, or ``folder`` does not hold enough for two in training.
    """
    if seed < 0:
        raise UserError(f"--seed {seed}: expected 0 or more.")
    names = sorted(names)
    if len(names) < drawn.test + 2:
        raise UserError(
            f"{folder} holds {len(names)} {what} (.nii.gz), and without a {FILE} in it {drawn.test} of them "
            f"are drawn for testing. Give the folder of the whole dataset, or write a {FILE}."
        )
    order = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
    train = sorted(order[drawn.test : drawn.test + drawn.train])
    return [train[i] for i in np.random.default_rng(seed).permutation(len(train))], order[: drawn.test]


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
