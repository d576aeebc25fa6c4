"""Whose case is whose, where patients have several: ``groups.json``, case -> patient."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from scipy.cluster.hierarchy import DisjointSet

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json
from nnunet_ssl.unlabeled.find import GROUPS


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


def kept_groups_files(dataset_name: str) -> list[str]:
    """Where ``nnUNetv2_ssl_warp --groups`` keeps what it was given: beside the warps of each configuration."""
    folder = os.path.join(nnUNet_preprocessed.get() or os.devnull, dataset_name)
    return sorted(glob.glob(os.path.join(glob.escape(folder), f"*_warped*_{GROUPS}")))


def all_groups(dataset_name: str) -> dict[str, str]:
    """The dataset's groups, and those that ``nnUNetv2_ssl_warp --groups`` keeps beside its warps, in one.

    Raises:
        UserError: a file holds something else.
    """
    return joined([groups_of_dataset(dataset_name), *map(read_groups, kept_groups_files(dataset_name))])


def joined(groupings: Iterable[dict[str, str]]) -> dict[str, str]:
    """Several groupings, case -> patient, in one.

    Cases that any of them gives to one patient are of one patient. A case that none names is a patient by itself, of
    its own name. Empty where there are no groups.
    """
    groupings = [groups for groups in groupings if groups]
    if len(groupings) < 2:
        return groupings[0] if groupings else {}
    same = DisjointSet()
    for groups in groupings:
        for case, patient in groups.items():
            same.add(("case", case))
            same.add(("patient", patient))
            same.merge(("case", case), ("patient", patient))
            if patient not in groups:  # by this file, a case of that name is of that patient
                same.add(("case", patient))
                same.merge(("case", patient), ("patient", patient))
    names: dict = {}  # of the patients, by what stands for each
    for groups in groupings:
        for case, patient in groups.items():
            names.setdefault(same["case", case], patient)
    found = {name: names[same[kind, name]] for kind, name in same if kind == "case"}
    return {case: patient for case, patient in found.items() if case != patient}
