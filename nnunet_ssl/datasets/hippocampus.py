"""The hippocampus data of the Medical Segmentation Decathlon (task 4) as an nnU-Net raw dataset with few labels.

    nnUNetv2_ssl_dataset hippocampus --data Task04_Hippocampus --seed 0 --labeled 5 -d 640
    nnUNetv2_ssl_dataset hippocampus --data Task04_Hippocampus --labeled all -d 649

The folder holds ``imagesTr`` and ``labelsTr`` as published, or ``images`` and ``labels``: the same file names in both,
``<case>.nii.gz``. ``._*`` files, ``imagesTs`` (it has no labels) and ``dataset.json`` are passed over.

``protocol.json`` in the same folder, where there is one, assigns the cases:

    {"train": ["a", "b", "c"], "test": ["d"], "labelled_order": [["b", "a", "c"], ["c", "b", "a"]]}

Each list of ``labelled_order`` is an order of all training cases; ``--seed`` says which one, from 0. Its first n cases
(``--labeled n``) keep their labels.

Without ``protocol.json`` the lists are drawn: the cases, sorted by name, are permuted by
``numpy.random.default_rng(0)``; the first 40 are test cases, the next 160 (or as many as there are) train, and the
other cases are left out. The order of seed s, any number from 0, is ``default_rng(s)``'s permutation of the training
cases, sorted by name. Results on drawn lists compare with each other. The lists of ``docs/results.md`` are others, of
the same sizes.

Labeled cases go to ``imagesTr`` and ``labelsTr``, the other training cases to ``imagesUn`` without their labels, test
cases to ``imagesTs`` and ``labelsTs``. There is no validation set, so ``splits_final.json`` gives one fold that trains
on all labeled cases and validates on the first five of them: nnU-Net wants some, and nothing is chosen by them.

Every file that is used is read and checked before anything is written, and the dataset appears under its name only
when it is complete. Labels of unlabeled cases are not used.
"""

from __future__ import annotations

import argparse

from nnunet_ssl.datasets.lists import add_labeled
from nnunet_ssl.datasets.protocol_json import Drawn, add_order, from_protocol, same_names
from nnunet_ssl.datasets.recipe import Recipe

RECIPE = Recipe(
    labels={"background": 0, "anterior": 1, "posterior": 2},
    channel="MRI",
    reference="Medical Segmentation Decathlon, task 4",
    license="CC-BY-SA 4.0",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this dataset alone."""
    add_order(parser)
    add_labeled(parser, 5)


def make(args: argparse.Namespace) -> None:
    """Check the data, then write the dataset and its one fold."""
    from_protocol(args, "Hippocampus", RECIPE, same_names(args.data), Drawn(test=40, train=160))
