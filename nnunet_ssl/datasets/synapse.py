"""Synapse multi-organ CT (BTCV, 30 labeled cases, 13 organs) as an nnU-Net raw dataset with few labels.

    nnUNetv2_ssl_dataset synapse --data DIR --labeled 4 -d 701
    nnUNetv2_ssl_dataset synapse --data DIR --split skcdf --labeled 8 -d 702

DIR holds ``img<number>.nii.gz`` and ``label<number>.nii.gz`` in any folders, as ``RawData/Training`` does.

Three lists of cases are in circulation, and results on different ones do not compare:

| ``--split`` | train / validation / test | ``--labeled`` | window (HU) |
| --- | --- | --- | --- |
| ``ga`` (default), of GA-CPS, and most likely the SHTA paper's | 20 / 4 / 6 | 2, 4, 8 | -125 to 275 |
| ``dhc``, of DHC: the same cases | 20 / 4 / 6 | 2, 4, 8 | -75 to 275 |
| ``skcdf``, of SKCDF | 20 / 4 / 6 | 2, 4, 8 | -75 to 275 |
| ``magicnet``, of MagicNet, without validation cases | 18 / 0 / 12 | 5, 7 | -125 to 275 |

The fold trains on the labeled cases and validates on the validation cases; without any it validates on the first
five labeled cases, by which nothing is to be chosen.

What differs from the literature's preprocessing:

- Intensities are cut to the window (``--window`` for another, ``--no-window`` for none) and stay HU: to bring them to
  0 and 1 would be undone by nnU-Net's normalization.
- Images keep their voxel sizes; nnU-Net resamples to the plans' spacing and brings predictions back to the images'
  own grid. The literature trains and evaluates on resized volumes whose making it has not published in full.
"""

from __future__ import annotations

import argparse

from nnunet_ssl.datasets.cases import Files
from nnunet_ssl.datasets.editing import add_window, windowed
from nnunet_ssl.datasets.lists import Lists, add_labeled, add_lists
from nnunet_ssl.datasets.recipe import Recipe
from nnunet_ssl.datasets.writing import prepare

ALL = [f"{number:04d}" for number in (*range(1, 11), *range(21, 41))]


def _lists(test: str, validation: str, labeled: dict[int, str]) -> Lists:
    train = [case for case in ALL if case not in f"{test} {validation}".split()]
    sets = {number: cases.split() for number, cases in labeled.items()}
    return Lists(train, test.split(), validation.split(), labeled=sets, pattern=r"\d{4}")


DHC = _lists(
    test="0004 0007 0010 0033 0035 0036",
    validation="0006 0025 0026 0040",
    labeled={2: "0023 0028", 4: "0002 0023 0034 0039", 8: "0002 0009 0021 0023 0027 0031 0032 0037"},
)
SPLITS = {
    "ga": DHC,
    "dhc": DHC,
    "skcdf": _lists(
        test="0008 0027 0029 0033 0037 0039",
        validation="0035 0036 0038 0040",
        labeled={2: "0007 0030", 4: "0021 0023 0028 0032", 8: "0003 0004 0005 0006 0010 0023 0028 0034"},
    ),
    "magicnet": _lists(
        test="0008 0022 0038 0036 0032 0002 0029 0003 0001 0004 0025 0035",
        validation="",
        labeled={5: "0006 0039 0021 0005 0007", 7: "0006 0039 0021 0005 0007 0031 0040"},
    ),
}
NAMES = {"ga": "GA", "dhc": "DHC", "skcdf": "SKCDF", "magicnet": "MagicNet"}
WINDOWS = {"ga": (-125, 275), "dhc": (-75, 275), "skcdf": (-75, 275), "magicnet": (-125, 275)}
ORGANS = (
    "background, spleen, right kidney, left kidney, gallbladder, esophagus, liver, stomach, aorta, "
    "inferior vena cava, portal and splenic veins, pancreas, right adrenal gland, left adrenal gland"
).split(", ")
RECIPE = Recipe(
    labels={organ: number for number, organ in enumerate(ORGANS)},
    channel="CT",
    reference="Beyond the Cranial Vault, abdomen, Synapse syn3193805",
    class_groups={"Large": [1, 2, 3, 6], "Medium": [7, 8, 9, 10, 11], "Small": [4, 5, 12, 13]},  # the SHTA paper's
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this dataset alone."""
    parser.add_argument("--split", choices=SPLITS, default="ga", help="Whose lists. Default: ga")
    add_labeled(parser, 4)
    add_window(parser, "the split's")
    add_lists(parser)


def make(args: argparse.Namespace) -> None:
    """Check the data, then write the dataset and its one fold."""
    images, labels = Files(args.data, "img{}.nii.gz"), Files(args.data, "label{}.nii.gz")
    parts = SPLITS[args.split].with_files(args).parts(args.labeled, args.labeled_list)
    recipe, name = windowed(RECIPE, args, WINDOWS[args.split]), f"Synapse{NAMES[args.split]}Labeled{{}}"
    prepare(parts, images, labels, recipe, name, args, prefix="synapse_")
