"""AMOS 2022 (abdominal CT and MRI, 15 organs) as an nnU-Net raw dataset with few labels.

    nnUNetv2_ssl_dataset amos --data amos22 --labeled 10 -d 711 -np 4
    nnUNetv2_ssl_dataset amos --data amos22 --labeled 10 --ct-only -d 712 -np 4

``--data`` is the unpacked ``amos22.zip`` with ``imagesTr``, ``labelsTr``, ``imagesVa`` and ``labelsVa``
(``amos_<number>.nii.gz``).

The lists come from GA-CPS, DHC and SKCDF, which agree: of the 240 cases of ``imagesTr`` 216 train and 24 validate;
the 120 of ``imagesVa`` are test cases. ``--labeled 10`` and ``4`` are the published 5 % and 2 %; for the published
10 % give ``--labeled-list`` its file. Of the published 20 % files (``labeled_20p``) a sixth of the cases are also
validation cases; such a list is refused.

Numbers below 500 are CT, the others MRI. ``--ct-only`` leaves the MRI out: of 216 / 24 / 120 cases 182 / 18 / 100
stay, of 10 labeled ones 7. The published lists mix both, and so do the numbers that were published with them.

What differs from the literature's preprocessing:

- CT is cut to -125 to 275 HU, as GA-CPS has it (DHC: -75 to 275; ``--window``), and stays HU.
- MRI is left as it is. The literature cuts it with the window for CT, which means nothing there; ``--clip-mri`` does
  so too.
- The mixed dataset is normalized image by image (z-score), the CT-only one by nnU-Net's scheme for CT: statistics
  over both kinds together would fit neither.
- Images keep their voxel sizes; the literature resizes whole volumes, each repository to another size.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from nnunet_ssl.datasets.cases import Files
from nnunet_ssl.datasets.editing import add_window, windowed
from nnunet_ssl.datasets.lists import Lists, add_labeled, add_lists
from nnunet_ssl.datasets.recipe import Recipe
from nnunet_ssl.datasets.writing import prepare

WINDOW = (-125, 275)
FIRST_MRI = "0500"
PUBLISHED = {"imagesTr": 240, "imagesVa": 120}
PUBLISHED_CT = {"imagesTr": 200, "imagesVa": 100}
VALIDATION = """
0027 0066 0097 0109 0116 0124 0153 0154 0159 0197 0214 0215 0297 0336 0337 0349 0353 0381 0538 0540 0554 0585 0592 0599
""".split()
LABELED = {
    4: "0017 0077 0358 0361".split(),
    10: "0078 0158 0170 0192 0391 0396 0410 0514 0548 0578".split(),
}
ORGANS = (
    "background, spleen, right kidney, left kidney, gallbladder, esophagus, liver, stomach, aorta, postcava, pancreas, "
    "right adrenal gland, left adrenal gland, duodenum, bladder, prostate or uterus"
).split(", ")
RECIPE = Recipe(
    labels={organ: number for number, organ in enumerate(ORGANS)},
    channel="CT or MRI",
    reference="AMOS 2022, a multi-modality abdominal multi-organ segmentation challenge",
    class_groups={  # the SHTA paper's
        "Large": [1, 2, 3, 6],
        "Medium": [7, 8, 9, 10, 13, 14, 15],
        "Small": [4, 5, 11, 12],
    },
)


def is_ct(case: str) -> bool:
    """Whether a case, by its four digits, is a CT."""
    return case < FIRST_MRI


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this dataset alone."""
    add_labeled(parser, 10, "4, 10")
    parser.add_argument("--ct-only", action="store_true", help="Leave out the MRI")
    parser.add_argument("--clip-mri", action="store_true", help="Cut MRI with the window for CT too")
    add_window(parser, "-125 275")
    add_lists(parser)


def make(args: argparse.Namespace) -> None:
    """Check the data, then write the dataset and its one fold."""
    problems: list[str] = []
    found = {folder: sorted(Files(args.data, f"{folder}/amos_{{}}.nii.gz").found) for folder in PUBLISHED}
    if args.ct_only:
        found = {folder: [case for case in cases if is_ct(case)] for folder, cases in found.items()}
    for folder, number in (PUBLISHED_CT if args.ct_only else PUBLISHED).items():
        if len(found[folder]) != number and not (args.train_list and args.test_list):
            kind = "CT" if args.ct_only else "cases"
            problems.append(f"{args.data / folder} holds {len(found[folder])} {kind}; {number} were published.")
    train = [case for case in found["imagesTr"] if case not in VALIDATION]
    lists = Lists(train, found["imagesVa"], VALIDATION, labeled=LABELED, pattern=r"\d{4}").with_files(args)
    parts = lists.parts(args.labeled, args.labeled_list, is_ct if args.ct_only else lambda case: True)

    images, labels = Files(args.data, "images*/amos_{}.nii.gz"), Files(args.data, "labels*/amos_{}.nii.gz")
    recipe = replace(RECIPE, channel="CT") if args.ct_only else RECIPE
    only = None if args.clip_mri else frozenset(f"amos_{case}" for case in parts if is_ct(case))
    recipe, name = windowed(recipe, args, WINDOW, only), f"AMOS{'CT' * args.ct_only}Labeled{{}}"
    prepare(parts, images, labels, recipe, name, args, prefix="amos_", problems=problems)
