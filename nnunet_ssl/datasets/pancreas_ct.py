"""Pancreas-CT of the NIH (82 CT) as an nnU-Net raw dataset with few labels.

    nnUNetv2_ssl_dataset pancreas_ct --data DIR --labeled 12 -d 721
    nnUNetv2_ssl_dataset pancreas_ct --data DIR --leave-out 0025 0070 -d 722

DIR, with any folders in between, holds either

- the archive's own files: DICOM series below ``PANCREAS_<number>`` and labels ``label<number>.nii.gz``, or
- the h5 files that the literature passes around: ``image<number>_norm.h5`` (needs h5py).

The 20 test cases are MC-Net's, the other 62 train. ``--labeled 6`` and ``12`` are its 10 and 20 %. BCP uses
other lists and SASNet's are not published: give them as ``--train-list`` and ``--test-list``. There is no validation
list; the fold validates on the first five labeled cases, by which nothing is to be chosen.

Today the archive's folders of cases 0025 (a test case) and 0070 (one of the 12 labeled ones) are empty; without them
(``--leave-out``) the sets are smaller than in older papers.

The labels' headers do not fit the DICOM ones. Their voxels follow the rows, columns and slice numbers of the DICOM
series, and by those they are matched; a label whose median lies outside -50 to 250 HU is reported as misplaced.

What differs from the literature's preprocessing:

- It cuts every case, test cases too, to a box around its true pancreas, 25 voxels wider in x and y. That tells the
  network where the pancreas is, so here images stay whole. ``--crop-to-label`` cuts them as the literature does, at
  1 mm, for numbers that compare with its tables; it opens the labels of all cases. The h5 files are cut already.
- Intensities are cut to -125 to 275 HU and stay HU; nnU-Net normalizes.
- nnU-Net resamples by its plans and brings predictions back to the images' own grid (``-overwrite_target_spacing 1 1
  1`` plans at the literature's 1 mm). ``--resample`` stores 1 mm images, on which evaluation then happens too.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.datasets.cases import Case, Files, choose_h5
from nnunet_ssl.datasets.editing import clip, crop_in_plane
from nnunet_ssl.datasets.lists import Lists, add_labeled, add_lists
from nnunet_ssl.datasets.recipe import Recipe, align_by_header, align_by_voxels
from nnunet_ssl.datasets.writing import prepare
from nnunet_ssl.errors import UserError
from nnunet_ssl.volumes import VolumeError

WINDOW = (-125, 275)
SOFT_TISSUE = (-50, 250)
TEST = "0050 0059 0037 0060 0040 0074 0004 0046 0008 0054 0005 0073 0001 0039 0006 0067 0025 0051 0021 0009".split()
LABELED = "0057 0018 0062 0031 0020 0017 0032 0079 0061 0064 0070 0019".split()
REST = [case for number in range(1, 83) if (case := f"{number:04d}") not in {*TEST, *LABELED}]
LISTS = Lists(LABELED + REST, TEST, ordered=len(LABELED), pattern=r"\d{4}")


def align(label: sitk.Image, image: sitk.Image) -> sitk.Image:
    """Match by rows, columns and slice numbers, and see whether the label lies on soft tissue.

    Raises:
        VolumeError: they differ in size or spacing, or the label lies elsewhere.
    """
    if image.GetMetaData("SLICE_ORDER") == "descending":
        turned = np.ascontiguousarray(sitk.GetArrayFromImage(label)[::-1])
        label, spacing = sitk.GetImageFromArray(turned), label.GetSpacing()
        label.SetSpacing(spacing)
    label = align_by_voxels(label, image)
    inside = sitk.GetArrayViewFromImage(image)[sitk.GetArrayViewFromImage(label) > 0]
    if inside.size and not SOFT_TISSUE[0] <= np.median(inside) <= SOFT_TISSUE[1]:
        raise VolumeError(f"the label's median is {np.median(inside):g} HU, not soft tissue: it does not fit the image")
    return label


def resample(image: sitk.Image, spacing: tuple[float, float, float], interpolator: int) -> sitk.Image:
    """The same extent at another spacing (mm), from the same corner."""
    old, size = np.array(image.GetSpacing()), np.array(image.GetSize())
    new_size = np.maximum(1, np.rint(size * old / spacing)).astype(int)
    # voxel centers: the first of the new ones lies half a new voxel from the same corner
    origin = image.TransformContinuousIndexToPhysicalPoint(((np.array(spacing) / old - 1) / 2).tolist())
    outside = float(sitk.GetArrayViewFromImage(image).min())
    return sitk.Resample(
        image, new_size.tolist(), sitk.Transform(), interpolator, origin, spacing, image.GetDirection(), outside
    )


def edit(
    case: Case, image: sitk.Image, label: sitk.Image | None, to_1mm: bool, crop: bool
) -> tuple[sitk.Image, sitk.Image | None]:
    """The literature's steps in its order: 1 mm (B-spline, nearest), window, crop."""
    if to_1mm:
        image = resample(image, (1.0, 1.0, 1.0), sitk.sitkBSpline)
        label = label and resample(label, (1.0, 1.0, 1.0), sitk.sitkNearestNeighbor)
    image = clip(image, *WINDOW)
    return crop_in_plane(image, label, (25, 25), 96) if crop else (image, label)


RECIPE = Recipe(
    labels={"background": 0, "pancreas": 1},
    channel="CT",
    reference="Pancreas-CT, The Cancer Imaging Archive, doi 10.7937/K9/TCIA.2016.tNB1kqBU",
    align=align,
)
H5_RECIPE = replace(RECIPE, channel="CT, normalized case by case", align=align_by_header)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this dataset alone."""
    add_labeled(parser, 6, "6, 12")
    parser.add_argument("--leave-out", nargs="+", default=[], metavar="CASE", help="Cases to do without")
    parser.add_argument("--resample", action="store_true", help="Store the images at 1 mm")
    parser.add_argument("--crop-to-label", action="store_true", help="Cut all cases to their true pancreas, a leak")
    add_lists(parser)


def make(args: argparse.Namespace) -> None:
    """Check the data, then write the dataset and its one fold."""
    images, labels = Files(args.data, "PANCREAS_{}/**/*.dcm", folders=True), Files(args.data, "label{}.nii.gz")
    h5 = Files(args.data, "image{}_norm.h5")
    is_h5 = choose_h5(images, h5)
    if is_h5 and (args.resample or args.crop_to_label):
        raise UserError("the h5 files are resampled and cut already: leave out --resample and --crop-to-label.")

    left_out = set(args.leave_out)
    parts = LISTS.with_files(args).parts(args.labeled, args.labeled_list, lambda case: case not in left_out)
    if is_h5:
        images, labels, recipe = h5, h5, H5_RECIPE
    else:
        to_1mm = args.resample or args.crop_to_label
        recipe = replace(RECIPE, edit=partial(edit, to_1mm=to_1mm, crop=args.crop_to_label))
    name = "PancreasCTLabeled{}"
    prepare(parts, images, labels, recipe, name, args, prefix="pancreas_", open_all=args.crop_to_label)
