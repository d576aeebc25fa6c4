"""From checked cases to an nnU-Net raw dataset and its one fold, complete or not at all."""

from __future__ import annotations

import argparse
import errno
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import nibabel
import SimpleITK as sitk

from nnunet_ssl.datasets.cases import Case, Files, Part
from nnunet_ssl.datasets.reading import load
from nnunet_ssl.datasets.recipe import Recipe, align_by_header, align_by_voxels, nothing
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import write_json
from nnunet_ssl.pools import all_outcomes
from nnunet_ssl.volumes import VolumeError, check_file

ENDING = ".nii.gz"
VALIDATION_CASES = 5  # of the labeled ones, where a protocol has no validation list: nnU-Net wants some
FOLDERS = {"labeled": "Tr", "validation": "Tr", "unlabeled": "Un", "test": "Ts"}


def prepare(
    parts: dict[str, Part],
    images: Files,
    labels: Files,
    recipe: Recipe,
    name: str,
    args: argparse.Namespace,
    *,
    prefix: str = "",
    open_all: bool = False,
    problems: Sequence[str] = (),
    groups: dict[str, str] | None = None,
) -> None:
    """Find and check the files of all cases, then write the dataset and its one fold.

    Args:
        parts: what ``Lists.parts`` gave: all cases, the labeled ones in their order.
        images, labels, recipe: their files, and what the dataset is.
        name: the dataset's name without its number; ``{}`` is the number of labeled cases.
        args: what the command has parsed.
        prefix: before a case's name in nnU-Net's files.
        open_all: whether labels of unlabeled cases are opened.
        problems: what was found out before.
        groups: case -> patient, where patients have several cases; goes into ``groups.json``.

    Raises:
        UserError: anything is wrong; then nothing was written.
    """
    # heavy: only once the arguments are known to be good
    from nnunet_ssl.unlabeled.find import GROUPS, required_folder
    from nnunet_ssl.unlabeled.folds import SPLITS
    from nnunet_ssl.unlabeled.raw_dataset import new_dataset, refuse_existing

    raw, prepared = (Path(required_folder(variable)) for variable in ("nnUNet_raw", "nnUNet_preprocessed"))
    dataset = f"Dataset{args.target_id:03d}_{name.format(list(parts.values()).count('labeled'))}"
    refuse_existing(args.target_id, dataset, "-d")
    if args.trust_voxels and recipe.align is align_by_header:
        recipe = replace(recipe, align=align_by_voxels)
    cases, problems = [], list(problems)
    for case, part in parts.items():
        image = images.one(case, problems)
        wanted = part != "unlabeled" or open_all
        label = labels.one(case, problems) if wanted else None
        if image and (label or not wanted):
            cases.append(Case(f"{prefix}{case}", part, image, label))
    found = all_outcomes(_check, [(case, recipe) for case in cases], args.processes, "Checking")
    problems += sorted(problem for of_case in found for problem in of_case)
    if problems:
        raise UserError("nothing was written:\n" + "\n".join(problems))

    by_part = {part: [case.name for case in cases if case.part == part] for part in FOLDERS}
    fold = {
        "train": sorted(by_part["labeled"]),
        "val": sorted(by_part["validation"] or by_part["labeled"][:VALIDATION_CASES]),
    }
    content = {
        "channel_names": {"0": recipe.channel},
        "labels": recipe.labels,
        "numTraining": len(by_part["labeled"]) + len(by_part["validation"]),
        "file_ending": ENDING,
        "reference": recipe.reference,
        "licence": recipe.license,
        "class_groups": recipe.class_groups,
    }
    with new_dataset(str(raw), dataset, True, str(prepared)) as building:
        folder = Path(building)
        for part in {case.part for case in cases}:
            (folder / f"images{FOLDERS[part]}").mkdir(exist_ok=True)
            if part != "unlabeled":
                (folder / f"labels{FOLDERS[part]}").mkdir(exist_ok=True)
        all_outcomes(_write, [(case, recipe, folder) for case in cases], args.processes, "Writing")
        write_json(folder / "dataset.json", {key: value for key, value in content.items() if value is not None})
        write_json(folder / SPLITS, [fold])
        if groups:
            write_json(folder / GROUPS, groups)
    counts = [f"{len(names)} {part.replace('eled', 'elled')}" for part, names in by_part.items() if names]
    print(f"{raw / dataset}: {', '.join(counts)} cases; one fold, {SPLITS} here and in {prepared / dataset}")


def _check(case: Case, recipe: Recipe) -> list[str]:
    return load(case, recipe)[2]


def _write(case: Case, recipe: Recipe, target: Path) -> None:
    """Write a case; an image that nothing is done to is copied, byte for byte."""
    image, label, problems = load(case, recipe)
    if problems:
        raise UserError(f"a file has changed since it was checked: {problems[0]}")
    target_image = target / f"images{FOLDERS[case.part]}" / f"{case.name}_0000{ENDING}"
    edited, label = recipe.edit(case, image, label) if recipe.edit else (image, label)
    if edited is image and recipe.mend is nothing and _is_plain(case.image):
        with target_image.open("wb") as file, case.image.open("rb") as source:
            shutil.copyfileobj(source, file)  # copyfile's error would blame the source where the disk is full
    else:
        _write_image(edited, target_image)
    if case.part != "unlabeled":
        _write_image(label, target / f"labels{FOLDERS[case.part]}" / f"{case.name}{ENDING}")


def _write_image(image: sitk.Image, file: Path) -> None:
    """Write a file and read it again: on a full disk SimpleITK leaves half of it and says nothing.

    Raises:
        OSError: the file is not whole.
    """
    for key in image.GetMetaDataKeys():  # what DICOM and NIfTI headers contain apart from the geometry: names, dates
        image.EraseMetaData(key)
    try:
        sitk.WriteImage(image, str(file), useCompression=True)
        check_file(str(file))
    except (RuntimeError, VolumeError) as error:
        raise OSError(errno.EIO, "the file is incomplete; is the disk full?", str(file)) from error


def _is_plain(path: Path) -> bool:
    """Whether a file is what nnU-Net wants: .nii.gz with three axes."""
    return path.name.endswith(ENDING) and nibabel.load(path).ndim == 3
