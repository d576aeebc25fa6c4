"""A fully labeled dataset as if most of it were not: the protocol of every paper, as an nnU-Net raw dataset.

The new dataset is made of links: ``imagesTr`` and ``labelsTr`` hold the labeled and the validation cases,
``splits_final.json`` says which is which, ``imagesUn`` holds the rest without their labels. Nothing that works on the
new dataset can see a hidden label, since there is no path to one; here they are not even looked for.

Which cases: one order of all cases of the source's ``imagesTr``, a permutation drawn from the seed, less those that a
list names. Labeled cases are taken from its front, validation cases from its end. So the first 5 are among the first
10, no matter what the validation cases are, and the validation cases stay the same when more are labeled.

Where the source says which case is of which patient, the order is one of patients, numbers count patients, and each
comes with all cases. What lists leave of a validation or test patient is left out, in ``imagesUn`` too. Without such
groups each case is a patient by itself.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Mapping

import numpy as np

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_text, write_json
from nnunet_ssl.names import a_few
from nnunet_ssl.unlabeled.find import (
    SPLIT,
    UNLABELED_FOLDER,
    channel_names,
    check_channels,
    find_images,
    find_labeled,
    find_unlabeled,
    read_dataset_json,
    refuse_labeled_names,
    required_folder,
    resolve_dataset,
)
from nnunet_ssl.unlabeled.groups import all_groups
from nnunet_ssl.unlabeled.raw_dataset import Split, absent, new_dataset, refuse_existing, write_dataset
from nnunet_ssl.unlabeled.stamps import refuse_copies


def split_dataset(
    source: str | int,
    target_id: int,
    labeled: str,
    validation: str | None = None,
    test: str | None = None,
    seed: int = 0,
    copy: bool = False,
    name: str | None = None,
) -> tuple[str, Split]:
    """Make the second raw dataset, and put its ``splits_final.json`` where nnU-Net reads it.

    Args:
        source: id or name of a labeled raw dataset.
        target_id: id of the new dataset.
        labeled: how many cases keep their label: a number, a fraction of all cases but the test cases, or a file that
            lists them (one a line, or a JSON list). Numbers and fractions are of patients, if the source has groups.
        validation: the same for the validation cases; None validates on the labeled cases.
        test: a file that lists the test cases.
        seed: draws the order that numbers and fractions take from.
        copy: copy the files instead of linking to them.
        name: of the new dataset, without its id; made from the source's when None.

    Returns:
        The new dataset's name, and the split.

    Raises:
        UserError: the source, the target or the numbers do not allow it. Nothing is written then.
    """
    raw = required_folder("nnUNet_raw")
    preprocessed = required_folder("nnUNet_preprocessed")
    source = resolve_dataset(source)
    source_folder = os.path.join(raw, source)
    if not os.path.isdir(source_folder):
        raise UserError(f"{source_folder} does not exist. Name a raw dataset that has labels with -d.")
    dataset_json = read_dataset_json(source_folder)
    images = find_labeled(source_folder, dataset_json)
    _refuse_lost(source_folder, images)
    if not images:
        raise UserError(f"{os.path.join(source_folder, 'imagesTr')} holds no image with the ending "
                        f"{dataset_json['file_ending']}. Name a raw dataset that has labels with -d.")  # fmt: skip
    if wrong := [f for files in images.values() for f in files if not f.endswith(dataset_json["file_ending"])]:
        raise UserError(
            f"{wrong[0]} does not end with {dataset_json['file_ending']}, the file_ending of "
            f"{source_folder}/dataset.json. Convert it."
        )
    unlabeled = _already_unlabeled(source_folder, dataset_json, images)
    groups = all_groups(source)
    split = choose(list(images), labeled, validation, test, seed, source, groups)
    judging = {groups.get(case, case) for case in (*split.validation, *split.test)}
    rest = sorted([*split.unlabeled, *unlabeled])
    split = split._replace(unlabeled=[case for case in rest if groups.get(case, case) not in judging])
    if left_out := sorted(set(rest) - set(split.unlabeled)):
        print(f"{len(left_out)} further images of validation and test patients are left out ({a_few(left_out)}).")
    for case in set(split.unlabeled) - set(unlabeled) if "dataset" not in dataset_json else ():
        # channels are numbered anew in imagesUn, where one that is missing would pass for another
        check_channels(case, images[case], dataset_json["file_ending"], len(channel_names(dataset_json)))
    target = _target_name(target_id, name, source, len(split.labeled))
    refuse_existing(target_id, target)

    with new_dataset(raw, target, copy, preprocessed) as building:
        write_dataset(building, target, source_folder, dataset_json, {**images, **unlabeled}, split, copy)
        record = {"name": target, "source": source, "seed": seed, **split._asdict()}
        write_json(os.path.join(building, SPLIT), record)
    return target, split


def choose(
    cases: list[str],
    labeled: str,
    validation: str | None,
    test: str | None,
    seed: int,
    source: str,
    groups: Mapping[str, str] | None = None,
) -> Split:
    """Divide the cases that have a label by the rule at the top of this file; each part of the split is sorted.

    ``groups`` is case -> patient; a case that it does not name is a patient by itself. The other arguments are those of
    ``split_dataset``; ``source`` is the dataset's name, for messages.

    Raises:
        UserError: a list names a case that is not there or one twice, two lists name one patient, or the numbers ask
            for more than there are.
    """
    patient = {case: (groups or {}).get(case, case) for case in cases}
    lists = {
        option: _read_cases(value, option, cases, source)
        for option, value in (("--labeled", labeled), ("--val", validation), ("--test", test))
        if value is not None and (option == "--test" or not _is_number(value))
    }
    _refuse_shared(lists, patient)
    listed = {patient[case] for names in lists.values() for case in names}
    test_cases = lists.get("--test", [])
    patients = sorted(set(patient.values()))
    order = [patients[i] for i in np.random.RandomState(seed).permutation(len(patients))]
    free = [name for name in order if name not in listed]

    num_available = len(patients) - len({patient[case] for case in test_cases})
    num_labeled = 0 if "--labeled" in lists else _count(labeled, "--labeled", num_available)
    num_validation = 0 if validation is None or "--val" in lists else _count(validation, "--val", num_available)
    if num_labeled + num_validation > len(free):
        wanted = " and ".join(
            f"{option} {value} ({number})"
            for option, value, number in (("--labeled", labeled, num_labeled), ("--val", validation, num_validation))
            if number
        )
        raise UserError(
            f"{wanted} ask for {num_labeled + num_validation} {'patients' if groups else 'cases'}, but {source} has "
            f"{len(free)} that no list names ({len(patients)} in all). Ask for fewer."
        )

    drawn = free[:num_labeled], free[len(free) - num_validation :]
    labeled_cases, validation_cases = (
        lists.get(option, [case for case in cases if patient[case] in names])
        for option, names in zip(("--labeled", "--val"), drawn, strict=True)
    )
    taken = {*labeled_cases, *validation_cases, *test_cases}
    return Split(
        sorted(labeled_cases),
        sorted(validation_cases),
        sorted(case for case in cases if case not in taken),
        sorted(test_cases),
    )


def _refuse_lost(source_folder: str, images: dict[str, list[str]]) -> None:
    """Refuse images that are named or linked to, and are not there: the split would be made without them."""
    folders = [os.path.join(source_folder, name) for name in ("imagesTr", UNLABELED_FOLDER)]
    links = [entry.path for folder in folders if os.path.isdir(folder) for entry in os.scandir(folder)
             if entry.is_symlink() and not entry.name.startswith(".")]  # fmt: skip
    named = [file for files in images.values() for file in files]
    if lost := [file for file in [*named, *sorted(links)] if not os.path.exists(file)]:
        raise UserError(f"{lost[0]} {absent(lost[0])}. Bring the image back, or remove the case from {source_folder}.")


def _already_unlabeled(source_folder: str, dataset_json: dict, images: dict[str, list[str]]) -> dict[str, list[str]]:
    """What the source has in ``imagesUn`` itself, by the rules that training has for it."""
    folder = os.path.join(source_folder, UNLABELED_FOLDER)
    if not (os.path.isdir(folder) and any(find_images(folder, dataset_json["file_ending"]))):
        return {}
    found = find_unlabeled(source_folder, dataset_json)
    refuse_labeled_names(found, images)
    refuse_copies(found, images)
    return found


def _target_name(target_id: int, name: str | None, source: str, num_labeled: int) -> str:
    prefix = f"Dataset{target_id:03d}_"
    if name is None:
        return f"{prefix}{source.partition('_')[2]}_{num_labeled}labeled"
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"--name {name} must be letters, digits, - and _ only.")
    return prefix + name.removeprefix(prefix)


def _is_number(value: str) -> bool:
    return re.fullmatch(r"[+-]?([0-9]{1,9}\.?[0-9]{0,30}|\.[0-9]{1,30})", value) is not None


def _count(value: str, option: str, available: int) -> int:
    if "." in value:
        if not 0 < float(value) < 1:
            raise UserError(f"{option} {value}: a fraction lies between 0 and 1; a number of cases has no point.")
        return max(1, round(float(value) * available))
    if int(value) < 1:
        raise UserError(f"{option} {value} must be at least 1.")
    return int(value)


def read_list(file: str, option: str, otherwise: str = "") -> list[str]:
    """The entries of a user's list: the lines of a file that are not empty, or the items of a JSON list.

    Args:
        file, option: the list, and the command's option that names it, for messages.
        otherwise: what the option takes apart from a file, for messages, for instance "a number or ".

    Raises:
        UserError: the file is not there, cannot be read or lists nothing.
    """
    if not os.path.exists(file):
        raise UserError(f"{option} {file} does not exist. Give {otherwise}a file that lists cases.")
    text = read_text(file, f"{option} takes a file with one case per line, or a JSON list.")
    try:
        names = json.loads(text) if text.lstrip().startswith("[") else text.split("\n")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option} {file} is not JSON ({error}). Write one case per line, or a JSON list.") from None
    names = [str(name).strip() for name in names if str(name).strip()]
    if not names:
        raise UserError(f"{option} {file} lists no case. Write one case per line, or a JSON list.")
    return names


def _read_cases(file: str, option: str, cases: list[str], source: str) -> list[str]:
    names = read_list(file, option, "" if option == "--test" else "a number, a fraction, or ")
    known = set(cases)
    if missing := [name for name in names if name not in known]:
        raise UserError(
            f"{option} {file} names {missing[0]}, which is not a labeled case of {source}. Cases are named without "
            f"channel and file ending, for instance {min(cases)}."
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{option} {file} names {twice[0]} twice. Remove one.")
    return names


def _refuse_shared(lists: dict[str, list[str]], patient: Mapping[str, str]) -> None:
    for one, other in itertools.combinations(sorted(lists), 2):
        if shared := sorted(set(lists[one]) & set(lists[other])):
            raise UserError(f"{one} and {other} both name {shared[0]}. A case can be one thing only: remove one.")
        if shared := sorted({patient[case] for case in lists[one]} & {patient[case] for case in lists[other]}):
            raise UserError(
                f"{one} and {other} both name cases of the patient {shared[0]}; list them under one of the two."
            )
