"""The left atrium data (2018 Atrial Segmentation Challenge) as an nnU-Net raw dataset with few labels.

    nnUNetv2_ssl_dataset la --data DIR --labeled 8 -d 650
    nnUNetv2_ssl_dataset la --data DIR --labeled all -d 659

DIR, with any folders in between, is one of

- the challenge's training set: ``<case>/lgemri.nrrd`` and ``<case>/laendo.nrrd``;
- the h5 files that the literature passes around: ``<case>/mri_norm2.h5`` with ``image`` and ``label`` (needs h5py);
- a folder with ``images``, ``labels`` (or ``imagesTr``, ``labelsTr``) and ``protocol.json``, in the format that
  ``nnUNetv2_ssl_dataset hippocampus -h`` describes.

The 80 training cases are the literature's, in its order: the first 4, 8 or 16 are its labeled 5, 10 and 20 %. The
other 20 of the 100 cases are test cases. There is no validation list; the fold validates on the first five labeled
cases, by which nothing is to be chosen.

What differs from the literature's preprocessing:

- It cuts every case, test cases too, to a box around its true left atrium, 10 to 20 voxels wider in x and y. That
  tells the network where the atrium is, so here images stay whole. ``--crop-to-label`` cuts them as the literature
  does, for numbers that compare with its tables; it opens the labels of all cases. The h5 files are cut already.
- It makes mean 0 and standard deviation 1; nnU-Net does that itself.

Files whose header gives no voxel size (1 mm) are taken as 0.625 mm in each direction, the challenge's.
"""

from __future__ import annotations

import argparse
import zlib
from dataclasses import replace

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.datasets.cases import Case, Files, choose_h5
from nnunet_ssl.datasets.editing import crop_in_plane
from nnunet_ssl.datasets.lists import Lists, add_labeled, add_lists
from nnunet_ssl.datasets.protocol_json import FILE, add_order, from_protocol, same_names
from nnunet_ssl.datasets.recipe import Recipe
from nnunet_ssl.datasets.writing import prepare
from nnunet_ssl.errors import UserError

SPACING = (0.625, 0.625, 0.625)
CASES = 100
TRAIN = """
06SR5RBREL16DQ6M8LWS 0RZDK210BSMWAA6467LU 1D7CUD1955YZPGK8XHJX 1GU15S0GJ6PFNARO469W 1MHBF3G6DCPWHSKG7XCP
23X6SY44VT9KFHR7S7OC 2XL5HSFSE93RMOJDRGR4 38CWS74285MFGZZXR09Z 3C2QTUNI0852XV7ZH4Q1 3DA0T2V6JJ2NLUAV6FWM
4498CA6DZWELOXCBRYRF 45C45I6IXAFGNRO067W9 4CHFJGF6ZUM7CMZTNFQF 4EPVTT1HPA8U60CDUKXE 57SGAJMLCTCH92QUA0EE
5BHTH9RHH3PQT913I59W 5FKQL4K14KCB72Y8YMC2 5HH0WPWIY06DLAFOBQ4M 5QFK2PMHNX7UALK52NNA 5UB5KFD2PK38Z4LS6W80
6799D6LEBH3NSRV1KH27 78NJ5YFQF72BGC8RO51C 7FUCNXB39F78WTOP5K71 8GYK8A9MBRC9TV0FVSRA 8M99G0JLAXG9GLPV0O8G
8RE90C8H5DKF4V6HO8UU 8ZG2TRZ81MAWHZPN9KKG 9DCM2IB45SK6YKQNYUQY 9DHWWP5Y66VDMPXISZ13 9DQYTIU00I4JC0OEOKQQ
A11O45O3NAXWM7T2H8CH A4R1S23KR0KU2WSYHK2X A5RNNK0A891WUSC2V624 AT5CRO5JUDBWD4RUPXSQ BNK95S2SJXEGSW7VAKYU
BXJWOUYP2J3EN4U92517 BYSRSI3H4YTWKMM3MADP BZUFJX66T0W6ZPVTL9DU CB5P5W7X310NIIVU7UZV CBIJFVZ5L9BS0LKWE8YL
CCGAKN4EDT72KC8TTJ76 CLXFYOBQDCVXQ9P7YC07 CMPXO4J23G58J53Q98SZ CZPMV6KWZ4I7IJJP9FOK DLKXBV73A55ZTSZ0QQI2
DQ5UYBGR5QP6L692QSG6 DYXSCIWHLSUOZIDDSZ40 E2ZMO66WGS74UKXTZPPQ EJ5V7SPR4961JWD6SS8V FGM5NIWN3URY4HF4WNUW
GSC9KNY0VEZXFSGWNF25 HVE7DR3CUA2IM3RC6OMA HZZ4O0BRKF8S0YX3NNF7 I2VZ7N8H9QYNYT7ZZF1Y IDWWHGWJ5STOQXSDT6GU
IIY6TYJMTJIZRIZLB9YW IJJY51YW3W4YJJ7DTVTK IQYKPTWXVV9H0IHB8YXC JEC6HJ7SQJXBKVREX03F JGFOLWJF7YCYD8DPHQNH
K32FD6LRSUSSXGS1YUOX KM5RYAMP4P4ZP6XWP3Q2 KSNYHUBHHUJTYJ14UQZR LH4FVU3TQDEC87YGN6FL LJSDNMND9SHKM7Q4IRHJ
MFTDVMBWFNQ3F5KHBRDR MJHV7F65TB2A76CQLOC3 MVKIPGBKTNSENNP1S4HB O5TSIKRD4AIB8K84WIR9 OIRDLE32TXZX942FVZMM
P1OTI3IWJUIB5NRLULLH PVNXUK681N9BY14K4Z86 Q0MEX9ZIKAGJORSPLQ3Y Q7J0WYM695R9MA285ZW0 QZC1W0FNR19KJFLOCFLH
R8ER97O9UUN77C02VE2J RSZY41MT2FGDKHWWL5L2 SN4LF8SGBSRQUPTDSX78 TDDI6L3Y0L9VVFP9MNFS UZUZZT2W9IUSHL6ASOX3
""".split()
SOME_TEST = """
ULHWPWKKLTE921LQLH1P UPT6DX9IQY9JAZ7HJKA7 VDOF02M8ZHEAADFMS6NP VIXBEFTNVHZWKAKURJBN WBG9WYZ1B25WDT5WAT8T
WNPKE0W404QE9AELX1LR WW8F5CO4S4K5IM5Z7EXX XYDLYJ5CS19FDBVLJIPI YDKD1HVHSME6NVMA8I39 ZIJLJAVQV3FJ6JSQOH1E
""".split()


def voxel_size(image: sitk.Image) -> None:
    """Set the challenge's voxel size where the header has none."""
    if np.allclose(image.GetSpacing(), 1):
        image.SetSpacing(SPACING)


def crop(case: Case, image: sitk.Image, label: sitk.Image | None) -> tuple[sitk.Image, sitk.Image | None]:
    """Cut to the label's box plus 10 to 20 voxels in x and in y, at least 112; the same at each run."""
    margins = np.random.default_rng(zlib.crc32(case.name.encode())).integers(10, 21, 2)
    return crop_in_plane(image, label, (int(margins[0]), int(margins[1])), 112)


RECIPE = Recipe(
    labels={"background": 0, "left atrium": 1},
    channel="LGE MRI",
    reference="2018 Atrial Segmentation Challenge",
    label_values={0: 0, 1: 1, 255: 1},
    mend=voxel_size,
    h5_spacing=SPACING,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this dataset alone."""
    add_labeled(parser, 8)
    add_order(parser)
    parser.add_argument("--crop-to-label", action="store_true", help="Cut all cases to their true atrium, a leak")
    add_lists(parser)


def make(args: argparse.Namespace) -> None:
    """Check the data, then write the dataset and its one fold."""
    if (args.data / FILE).is_file():
        others = ("train_list", "validation_list", "test_list", "labeled_list", "crop_to_label")
        if given := ["--" + name.replace("_", "-") for name in others if getattr(args, name)]:
            raise UserError(f"{args.data / FILE} says which case is what: leave out {' and '.join(given)}.")
        from_protocol(args, "LA", replace(RECIPE, mend=Recipe.mend), same_names(args.data))
        return
    if args.seed is not None:
        raise UserError(
            f"--seed {args.seed}: the literature's list has one order, and {args.data} holds no {FILE} with others: "
            "leave out --seed ('order_by_seed' in a benchmark's protocol)."
        )

    images, labels = Files(args.data, "{}/lgemri.nrrd"), Files(args.data, "{}/laendo.nrrd")
    h5 = Files(args.data, "{}/mri_norm2.h5")
    if choose_h5(images, h5):
        images = labels = h5

    test = sorted(set(images.found) - set(TRAIN))
    if not (args.train_list and args.test_list) and (
        len(test) != CASES - len(TRAIN) or not set(SOME_TEST) <= set(test)
    ):
        raise UserError(
            f"{args.data} holds {len(test)} cases that are not among the 80 training cases, and the literature tests "
            f"on the other 20 of 100: give the folder of the challenge's 100 training cases, or --test-list."
        )
    lists = Lists(TRAIN, test, ordered=len(TRAIN) - 1).with_files(args)
    parts = lists.parts(args.labeled, args.labeled_list)
    recipe = replace(RECIPE, edit=crop) if args.crop_to_label else RECIPE
    prepare(parts, images, labels, recipe, "LALabeled{}", args, prefix="la_", open_all=args.crop_to_label)
