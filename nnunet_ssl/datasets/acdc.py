"""ACDC (cine MRI of the heart, two frames a patient) as an nnU-Net raw dataset with few labels.

    nnUNetv2_ssl_dataset acdc --data DIR --seed 0 --labeled 3 -d 780
    nnUNetv2_ssl_dataset acdc --data DIR --labeled all -d 789

DIR holds, with any folders in between, the patients' folders as published: ``<patient>_frame01.nii.gz`` and
``<patient>_frame01_gt.nii.gz``, two frames a patient. Or it holds ``images`` and ``labels``, the same names in both,
``<patient>_frame01.nii.gz``. Other files, such as the whole films, are passed over.

``protocol.json`` in DIR, where there is one, assigns the patients:

    {"train": ["p1", "p2", "p3"], "test": ["p4"], "labelled_order": [["p2", "p1", "p3"], ["p3", "p2", "p1"]],
     "cases_of_patient": {"p1": ["p1_frame01", "p1_frame12"], "p2": ...}}

Without it the lists are drawn as ``nnUNetv2_ssl_dataset hippocampus -h`` says: 20 patients for testing, and the next 60
for training, of the 100 of the published training set, whether the other 50 are in DIR or not. Results on drawn lists
compare with each other, not with ``docs/results.md``.

``--labeled n`` counts patients: all cases of the first n patients of the order (``--seed``, from 0) keep their labels,
and no patient is in two parts. ``groups.json`` in the dataset says whose case each one is.

There is no validation list; the fold trains on all labeled cases and validates on the first five of them, by which
nothing is to be chosen.

The data ask for registration and for the citation: O. Bernard et al., Deep learning techniques for automatic MRI
cardiac multi-structures segmentation and diagnosis, IEEE Transactions on Medical Imaging 37(11), 2018.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

from nnunet_ssl.datasets.cases import Files
from nnunet_ssl.datasets.lists import add_labeled
from nnunet_ssl.datasets.protocol_json import Drawn, add_order, from_protocol, same_names
from nnunet_ssl.datasets.recipe import Recipe

PUBLISHED = {f"patient{number:03d}" for number in range(1, 101)}  # for training
RECIPE = Recipe(
    labels={"background": 0, "right ventricle": 1, "myocardium": 2, "left ventricle": 3},
    channel="MRI",
    reference="ACDC, Bernard et al. 2018",
    license="registration and citation asked, non-commercial",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this dataset alone."""
    add_order(parser)
    add_labeled(parser, 3, what="patients")


def make(args: argparse.Namespace) -> None:
    """Check the data, then write the dataset and its one fold."""
    if any((args.data / folder).is_dir() for folder in ("images", "imagesTr")):
        images, labels = same_names(args.data)
    else:
        images, labels = Files(args.data, "{}.nii.gz"), Files(args.data, "{}_gt.nii.gz")
    patients: dict[str, list[str]] = defaultdict(list)
    for case in sorted(labels.found):
        patients[case.partition("_frame")[0]].append(case)
    if patients.keys() >= PUBLISHED:
        patients = {patient: patients[patient] for patient in sorted(PUBLISHED)}
    from_protocol(args, "ACDC", RECIPE, (images, labels), Drawn(test=20, train=60), patients)
