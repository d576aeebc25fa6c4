"""Images that labeled ones may be warped onto: none of somebody who tests."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from tqdm import tqdm

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json, stamp
from nnunet_ssl.names import a_few
from nnunet_ssl.shapes.case import load
from nnunet_ssl.shapes.pairs import description, spread_out
from nnunet_ssl.unlabeled.find import GROUPS, PSEUDOLABELED, UNLABELED_FOLDER, find_images
from nnunet_ssl.unlabeled.store import PreparedFolder

DESCRIBED = 200  # images among which those far apart are looked for


def read_groups(file: str) -> dict[str, str]:
    """Read which case is of which patient: a JSON object of case names and patients.

    Raises:
        UserError: it is something else.
    """
    remedy = 'Write one JSON object, {"case": "patient", ...}, of all cases of patients who have several.'
    groups = read_json(file, remedy)
    for case, patient in groups.items():
        if not isinstance(patient, str):
            raise UserError(f"{file} gives {case!r} the patient {patient!r}, not a text. {remedy}")
    return groups


def groups_of_dataset(dataset_name: str) -> dict[str, str]:
    """What the dataset's ``groups.json`` says, raw or preprocessed; empty without one."""
    for base in (nnUNet_raw.get(), nnUNet_preprocessed.get()):
        file = os.path.join(base or os.devnull, dataset_name, GROUPS)
        if os.path.isfile(file):
            return read_groups(file)
    return {}


def test_images(dataset_name: str, ending: str) -> dict[str, list[str]]:
    """Test case -> its files, of the dataset's ``imagesTs``; none where that is not on this machine.

    A dataset with pseudo-labels has the groups of the dataset that it was made from.
    """
    raw = os.path.join(nnUNet_raw.get() or os.devnull, dataset_name)
    folder, record = os.path.join(raw, "imagesTs"), os.path.join(raw, PSEUDOLABELED)
    found = find_images(folder, ending)[0] if os.path.isdir(folder) else {}
    if os.path.isfile(record):
        made_with = read_json(record, "It says which dataset this one was made from.", keys={"made_with": dict})
        found |= test_images(str(made_with["made_with"].get("source")), ending)
    return found


def of_patients(cases: Collection[str], groupings: Collection[Mapping[str, str]], judging: Collection[str]) -> set[str]:
    """Those among ``cases`` that are test or validation cases by name, or by any grouping of a patient who has one."""
    found = set()
    for groups in groupings:
        judged = {groups.get(case, case) for case in judging}
        found |= {case for case in cases if groups.get(case, case) in judged}
    return found


def find_targets(
    dataset_name: str,
    ending: str,
    images: PreparedFolder,
    groupings: Collection[Mapping[str, str]],
) -> list[str]:
    """The images that may be warped onto, those far apart first.

    Whose patient validates is another question for each fold: see ``WarpManifest.of``.

    Args:
        dataset_name: for its ``imagesTs`` and ``imagesUn``, where the raw dataset is on this machine.
        ending: of its image files.
        images: the prepared images to choose from.
        groupings: each case -> patient; what any of them says counts.
    """
    tests = test_images(dataset_name, ending)
    folder = os.path.join(nnUNet_raw.get() or os.devnull, dataset_name, UNLABELED_FOLDER)
    unlabeled = find_images(folder, ending)[0] if os.path.isdir(folder) else {}
    copies = _copies(unlabeled, tests) & set(images.cases)
    if left_out := sorted(of_patients(images.cases, groupings, tests) | copies):
        print(
            f"nnunet_ssl: {len(left_out)} images are not warped onto, because they are test images or "
            f"show test patients ({a_few(left_out)}).",
            flush=True,
        )
    cases = [case for case in images.cases if case not in left_out]
    if not cases:
        return []
    cases = [str(case) for case in np.random.default_rng(0).permutation(cases)]
    looks = [
        description(load(images.places[case], case)[0])
        for case in tqdm(cases[:DESCRIBED], "Looking at images to warp onto", delay=3, leave=False)
    ]
    return [cases[i] for i in spread_out(np.stack(looks))] + cases[DESCRIBED:]


def _copies(images: Mapping[str, list[str]], tests: Mapping[str, list[str]]) -> set[str]:
    """Images whose first file has the same content as a test image's."""
    sizes: dict[int, list[str]] = {}
    for files in tests.values():
        sizes.setdefault(os.path.getsize(files[0]), []).append(files[0])
    return {
        case
        for case, files in images.items()
        if (alike := sizes.get(os.path.getsize(files[0]))) and stamp(files[0])[2] in [stamp(file)[2] for file in alike]
    }
