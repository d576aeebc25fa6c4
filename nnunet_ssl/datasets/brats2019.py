"""BraTS 2019 (FLAIR, whole tumor) as an nnU-Net raw dataset with few labels.

    nnUNetv2_ssl_dataset brats2019 --data MICCAI_BraTS_2019_Data_Training --labeled 25 -d 731 \\
        --train-list train.txt --validation-list val.txt --test-list test.txt

``--data``, with any folders in between, holds either

- the challenge's own files: ``<case>_flair.nii.gz`` and ``<case>_seg.nii.gz``, or
- the h5 files of SSL4MIS: ``<case>.h5`` with ``image`` and ``label`` (needs h5py).

The lists of 250 training, 25 validation and 60 test cases ship with SSL4MIS (``data/BraTS2019``: ``train.txt``,
``val.txt``, ``test.txt``) and are not repeated here. The first n training cases are labeled: 25 are the literature's
10 %, 50 its 20 %.

What differs from the literature's preprocessing:

- Intensities above the 99.9 % quantile of the brain's box are cut, as there, but by the exact value instead of a
  histogram of 256 bins.
- Images are not cut to the brain's box: nnU-Net does that in training and puts predictions back into the whole image.
  The literature's box also lacks the last slice on each axis.
- nnU-Net itself makes mean 0 and standard deviation 1.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.datasets.cases import Case, Files
from nnunet_ssl.datasets.editing import clip
from nnunet_ssl.datasets.lists import Lists, add_labeled, add_lists
from nnunet_ssl.datasets.recipe import Recipe
from nnunet_ssl.datasets.writing import prepare
from nnunet_ssl.errors import UserError

RECIPE = Recipe(
    labels={"background": 0, "whole tumor": 1},
    channel="FLAIR",
    reference="Brain Tumor Segmentation challenge 2019",
    label_values={0: 0, 1: 1, 2: 1, 4: 1},  # necrosis, oedema, enhancing tumor
    h5_axes="zyx",
)


def cut_bright(case: Case, image: sitk.Image, label: sitk.Image | None) -> tuple[sitk.Image, sitk.Image | None]:
    """Cut intensities at the 99.9th percentile of the brain's box."""
    array = sitk.GetArrayViewFromImage(image)
    positions = np.nonzero(array)
    if not len(positions[0]):
        return image, label
    box = array[tuple(slice(axis.min(), axis.max() + 1) for axis in positions)]
    return clip(image, float(array.min()), float(np.quantile(box, 0.999))), label


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this dataset alone."""
    add_labeled(parser, 25)
    add_lists(parser)


def make(args: argparse.Namespace) -> None:
    """Check the data, then write the dataset and its one fold."""
    if not (args.train_list and args.validation_list and args.test_list):
        raise UserError("--train-list, --validation-list and --test-list are needed: SSL4MIS ships them.")
    lists = Lists([], [], pattern=r"BraTS\w+").with_files(args)

    images, labels = Files(args.data, "{}_flair.nii.gz"), Files(args.data, "{}_seg.nii.gz")
    recipe = replace(RECIPE, edit=cut_bright)
    if not images.found:
        images = labels = Files(args.data, "{}.h5")
        recipe = RECIPE
    parts = lists.parts(args.labeled, args.labeled_list)
    prepare(parts, images, labels, recipe, "BraTS2019Labeled{}", args)
