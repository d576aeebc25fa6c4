"""The hippocampus data of ``docs/results.md`` as an nnU-Net raw dataset with few labels.

    python scripts/prepare_hippocampus.py --data DIR --seed 0 --labeled 5 -d 640
    python scripts/prepare_hippocampus.py --data DIR --labeled all -d 649

DIR holds ``images/`` and ``labels/`` (same file names, NIfTI) and ``protocol.json`` with ``train``, ``test`` and
``labelled_order``, one order of the training cases a seed. The first n cases of an order go to ``imagesTr`` and
``labelsTr``, the rest to ``imagesUn`` without their labels, the test cases to ``imagesTs`` and ``labelsTs``.

The protocol has no validation set, so ``splits_final.json`` gives one fold that trains on all labelled cases and
validates on the first five of them: nnU-Net wants some, and nothing is chosen by them.

Every file is read and checked before anything is written, and the dataset appears under its name only when it is
complete.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk

from nnunet_ssl.errors import UserError

LABELS = {"background": 0, "anterior": 1, "posterior": 2}
VALIDATION_CASES = 5


def read_protocol(data: Path) -> dict[str, Any]:
    """Read ``protocol.json`` and check that its lists fit together.

    Raises:
        UserError: the file is missing, a list repeats a case, or the lists disagree.
    """
    file = data / "protocol.json"
    if not file.is_file():
        raise UserError(f"{file} is missing: --data takes the folder with images/, labels/ and protocol.json.")
    protocol = json.loads(file.read_text())
    train, test = protocol["train"], protocol["test"]
    if len(set(train + test)) != len(train) + len(test):
        raise UserError(f"{file} names a case twice among 'train' and 'test'.")
    for seed, order in enumerate(protocol["labelled_order"]):
        if sorted(order) != sorted(train):
            raise UserError(f"{file}: order {seed} of 'labelled_order' does not hold exactly the cases of 'train'.")
    return protocol


def check_case(data: Path, case: str, labels: dict[str, int]) -> list[str]:
    """Read a case's image and label; returns what is wrong with them, an empty list where nothing is."""
    files = [data / folder / f"{case}.nii.gz" for folder in ("images", "labels")]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        return [f"{file} is missing." for file in missing]
    try:
        image, label = (sitk.ReadImage(str(file)) for file in files)
    except RuntimeError as error:
        return [f"{case} cannot be read: {str(error).splitlines()[-1]}"]
    problems = []
    if image.GetSize() != label.GetSize() or not np.allclose(image.GetSpacing(), label.GetSpacing()):
        problems.append(f"{case}: image and label differ in size or spacing.")
    if not np.isfinite(nibabel.load(files[0]).get_fdata()).all():  # SimpleITK reads such voxels as 0
        problems.append(f"{case}: the image holds NaN or infinite voxels.")
    foreign = set(np.unique(sitk.GetArrayViewFromImage(label)).tolist()) - set(labels.values())
    if foreign:
        problems.append(f"{case}: the label holds {sorted(foreign)}, expected {sorted(labels.values())}.")
    return problems


def write_dataset(
    data: Path, protocol: dict[str, Any], order: list[str], labeled: int, target: Path, about: dict[str, Any]
) -> None:
    """Write the raw dataset, complete or not at all.

    Args:
        data: folder of the data.
        protocol: what ``read_protocol`` gave.
        order: the training cases; the first ``labeled`` keep their labels.
        labeled: how many.
        target: the dataset's folder, which must not exist yet.
        about: further entries of dataset.json.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    parts = [("Tr", order[:labeled], True), ("Un", order[labeled:], False), ("Ts", protocol["test"], True)]
    for suffix, cases, with_labels in parts:
        for case in cases:
            images = partial / f"images{suffix}"
            images.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data / "images" / f"{case}.nii.gz", images / f"{case}_0000.nii.gz")
            if with_labels:
                labels = partial / f"labels{suffix}"
                labels.mkdir(exist_ok=True)
                # they come as float32
                label = sitk.Cast(sitk.ReadImage(str(data / "labels" / f"{case}.nii.gz")), sitk.sitkUInt8)
                sitk.WriteImage(label, str(labels / f"{case}.nii.gz"))
    dataset_json = {
        "channel_names": {"0": "MRI"},
        "numTraining": labeled,
        "file_ending": ".nii.gz",
        **about,
    }
    (partial / "dataset.json").write_text(json.dumps(dataset_json, indent=2))
    partial.rename(target)


def main(
    argv: list[str] | None = None,
    title: str = "Hippocampus",
    labels: dict[str, int] = LABELS,
    reference: str = "Medical Segmentation Decathlon, task 4, CC-BY-SA 4.0",
) -> None:
    """Check the data, then write the dataset and its one fold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images/, labels/ and protocol.json")
    parser.add_argument("--seed", type=int, default=0, help="which of the protocol's orders, from 0")
    parser.add_argument("--labeled", default="5", help="how many training cases keep their labels, or 'all'")
    parser.add_argument("-d", dest="dataset_id", type=int, required=True, help="id of the dataset to make")
    args = parser.parse_args(argv)

    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        if variable not in os.environ:
            raise UserError(f"{variable} is not set; nnU-Net's documentation tells how to set its three folders.")
    protocol = read_protocol(args.data)
    orders = protocol["labelled_order"]
    if not 0 <= args.seed < len(orders):
        raise UserError(f"--seed {args.seed}: {args.data / 'protocol.json'} has orders 0 to {len(orders) - 1}.")
    order = orders[args.seed]
    if args.labeled == "all":
        labeled, name = len(order), f"{title}AllLabels"
    elif args.labeled.isdecimal() and 1 <= int(args.labeled) < len(order):
        seed = f"Seed{args.seed}" if len(orders) > 1 else ""
        labeled, name = int(args.labeled), f"{title}{seed}Labeled{args.labeled}"
    else:
        raise UserError(f"--labeled {args.labeled}: expected 1 to {len(order) - 1}, or 'all'.")

    dataset = f"Dataset{args.dataset_id:03d}_{name}"
    for folder in (Path(os.environ["nnUNet_raw"]), Path(os.environ["nnUNet_preprocessed"])):
        taken = sorted(folder.glob(f"Dataset{args.dataset_id:03d}_*"))
        if taken:
            raise UserError(f"{taken[0]} exists: choose another -d, or remove it first.")
    problems = [text for case in order + protocol["test"] for text in check_case(args.data, case, labels)]
    if problems:
        raise UserError("nothing was written:\n" + "\n".join(problems))

    target = Path(os.environ["nnUNet_raw"]) / dataset
    target.parent.mkdir(parents=True, exist_ok=True)
    write_dataset(args.data, protocol, order, labeled, target, {"labels": labels, "reference": reference})
    prepared = Path(os.environ["nnUNet_preprocessed"]) / dataset
    prepared.mkdir(parents=True, exist_ok=True)
    fold = {"train": sorted(order[:labeled]), "val": sorted(order[:labeled][:VALIDATION_CASES])}
    (prepared / "splits_final.json").write_text(json.dumps([fold], indent=2))
    print(
        f"{target}: {labeled} labelled, {len(order) - labeled} unlabelled, {len(protocol['test'])} test cases, "
        f"one fold in {prepared / 'splits_final.json'}"
    )


if __name__ == "__main__":
    main()
