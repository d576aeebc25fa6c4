"""What the ``prepare_*.py`` scripts have in common: from published files to an nnU-Net raw dataset with few labels.

A script says where its files are (``Files``), which cases have which part (``Lists``), what the labels mean and what
is done to a case (``Recipe``). ``prepare`` does the rest, the same for all:

1. every file that is needed is read and checked, and all problems are listed at once;
2. the dataset is written under a hidden name and gets its own when it is complete.

Labels of unlabelled cases are not opened, with one exception that a user has to ask for: crops around them.
"""

from __future__ import annotations

import argparse
import errno
import json
import re
import shutil
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import write_json
from nnunet_ssl.pools import all_outcomes
from nnunet_ssl.unlabeled.find import required_folder
from nnunet_ssl.unlabeled.split import SPLITS, is_unfinished, new_dataset, read_list

Part = Literal["labeled", "validation", "unlabeled", "test"]
ENDING = ".nii.gz"
GROUPS = "groups.json"  # case -> patient, in the raw dataset
VALIDATION_CASES = 5  # of the labelled ones, where a protocol has no validation list: nnU-Net wants some
FOLDERS = {"labeled": "Tr", "validation": "Tr", "unlabeled": "Un", "test": "Ts"}
UNREADABLE = (RuntimeError, OSError, EOFError, ValueError, zlib.error, ImageFileError)  # what readers of images raise
DRAWN_TEST, DRAWN_TRAIN = 40, 160  # cases, where there is no protocol.json


class CaseError(Exception):
    """Something is wrong with a file; the text goes into the list of problems."""


# --------------------------------------------------------------------------------------------------- files and lists


class Files:
    """Where a dataset's files are, by case; the ``._*`` files that macOS puts into archives are none.

    Args:
        root: folder that is searched with all that is below it.
        template: the end of a file's path, the case in braces: ``img{}.nii.gz``, ``{}/lgemri.nrrd``. A template that
            ends in ``.gz`` also finds the unpacked file.
        folders: look for folders that hold such a file, not for the file itself (DICOM).
    """

    def __init__(self, root: Path, template: str, folders: bool = False) -> None:
        if not root.is_dir():
            raise UserError(f"{root} is not a folder.")
        self.root, self.template = root, template
        pattern = re.escape(template).replace(r"\{\}", "(?P<case>[^/]+)").replace(r"\*\*/", "(?:.*/)?")
        pattern = pattern.replace(r"\*", "[^/]*")
        pattern = pattern.removesuffix(r"\.gz") + r"(?:\.gz)?" if pattern.endswith(r"\.gz") else pattern
        self.found: dict[str, set[Path]] = defaultdict(set)
        for file in root.rglob("*"):
            match = re.fullmatch(f"(?:.*/)?{pattern}", file.relative_to(root).as_posix())
            if match and not file.name.startswith("._"):
                self.found[match["case"]].add(file.parent if folders else file)

    def one(self, case: str, problems: list[str]) -> Path | None:
        """The one file of a case; where there is none or more than one, that is added to ``problems``."""
        files, name = sorted(self.found.get(case, ())), self.template.replace("{}", case)
        if not files:
            problems.append(f"{name} is missing below {self.root}.")
        elif len(files) > 1:
            problems.append(f"{name} is there {len(files)} times: {', '.join(map(str, files))}. Keep one.")
        return files[0] if len(files) == 1 else None


def read_cases(file: Path, option: str, pattern: str) -> list[str]:
    """The cases that a file lists, one a line or as a JSON list; what ``pattern`` finds first in each is the case."""
    lines = read_list(str(file), option)
    matches = [re.search(pattern, line) for line in lines]
    if None in matches:
        raise UserError(f"{option} {file}: no case in the line {lines[matches.index(None)]!r}.")
    return [match[0] for match in matches]


@dataclass(frozen=True)
class Lists:
    """A protocol: which cases train, validate and test, and which of the training cases keep their labels.

    Attributes:
        train: training cases.
        test: test cases.
        validation: validation cases, or none.
        ordered: for n up to this number, the first n of ``train`` are a labelled set.
        labeled: further labelled sets, by their size.
        pattern: what a case looks like in a file of the user.
    """

    train: list[str]
    test: list[str]
    validation: list[str] = field(default_factory=list)
    ordered: int = 0
    labeled: dict[int, list[str]] = field(default_factory=dict)
    pattern: str = r"[^,\s]+"

    def with_files(self, args: argparse.Namespace) -> Lists:
        """These lists, those replaced that the user has given as files."""
        own = {
            name: read_cases(file, f"--{name}-list", self.pattern)
            for name in ("train", "validation", "test")
            if (file := getattr(args, f"{name}_list"))
        }
        content = {**vars(self), **own}
        if "train" in own:
            content.update(ordered=len(own["train"]), labeled={})
        return Lists(**content)

    def parts(
        self, labeled: str, labeled_list: Path | None = None, keep: Callable[[str], bool] = lambda case: True
    ) -> dict[str, Part]:
        """The part of each case, in the order of the lists, the labelled ones first.

        Args:
            labeled: how many training cases keep their labels, or "all".
            labeled_list: a file that says which ones do, in place of the number.
            keep: cases for which it is false are left out of all lists.

        Raises:
            UserError: no labelled set of this size is known, or the lists contradict each other.
        """
        chosen = read_cases(labeled_list, "--labeled-list", self.pattern) if labeled_list else self._labeled(labeled)
        chosen, train, validation, test = (
            [case for case in cases if keep(case)] for cases in (chosen, self.train, self.validation, self.test)
        )
        strangers = sorted(set(chosen) - set(train))
        if strangers:
            source = labeled_list or f"the set of --labeled {labeled}"
            raise UserError(f"{source} holds cases that are not training cases: {', '.join(strangers)}.")
        rest = [case for case in train if case not in set(chosen)]
        pairs: list[tuple[Part, list[str]]] = [
            ("labeled", chosen), ("validation", validation), ("unlabeled", rest), ("test", test),
        ]  # fmt: skip
        count = Counter(case for _, cases in pairs for case in cases)
        twice = sorted(case for case, times in count.items() if times > 1)
        if twice:
            raise UserError(f"the lists of cases hold a case twice: {', '.join(twice)}.")
        return {case: part for part, cases in pairs for case in cases}

    def _labeled(self, labeled: str) -> list[str]:
        number = int(labeled) if labeled.isdecimal() else 0
        if labeled == "all":
            return self.train
        if number in self.labeled:
            return self.labeled[number]
        limit = min(self.ordered, len(self.train))
        if 1 <= number <= limit:
            return self.train[:number]
        known = [*map(str, sorted(self.labeled)), *([f"1 to {limit}"] if limit else []), "all"]
        raise UserError(f"--labeled {labeled}: expected {' or '.join(known)}; --labeled-list takes another set.")


# ----------------------------------------------------------------------------------------------------------- aligning


def align_by_header(label: sitk.Image, image: sitk.Image) -> sitk.Image:
    """The label on its image's grid; where its axes run another way, they are turned as the headers say.

    Raises:
        CaseError: they differ in size, spacing, direction, or by more than half a voxel in origin.
    """
    orient = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines
    orientation = orient(image.GetDirection())
    if orient(label.GetDirection()) != orientation:
        label = sitk.DICOMOrient(label, orientation)
    _check_size_and_spacing(label, image)
    if not np.allclose(label.GetDirection(), image.GetDirection(), atol=1e-2):
        raise CaseError("image and label differ in the direction of their axes.")
    shift = image.TransformPhysicalPointToContinuousIndex(label.GetOrigin())  # in voxels of each axis
    if np.max(np.abs(shift)) > 0.5:
        raise CaseError(f"image and label differ in origin: {_text(image.GetOrigin())} and {_text(label.GetOrigin())}.")
    label.CopyInformation(image)
    return label


def align_by_voxels(label: sitk.Image, image: sitk.Image) -> sitk.Image:
    """The label on its image's grid, voxel by voxel, whatever the headers say of position and direction."""
    _check_size_and_spacing(label, image)
    label.CopyInformation(image)
    return label


def align_by_slice_number(label: sitk.Image, image: sitk.Image) -> sitk.Image:
    """As ``align_by_voxels``, for a label whose slices follow the numbers of its DICOM series."""
    if image.GetMetaData("SLICE_ORDER") == "descending":
        turned = np.ascontiguousarray(sitk.GetArrayFromImage(label)[::-1])
        label, spacing = sitk.GetImageFromArray(turned), label.GetSpacing()
        label.SetSpacing(spacing)
    return align_by_voxels(label, image)


def _check_size_and_spacing(label: sitk.Image, image: sitk.Image) -> None:
    for what, of_image, of_label, tolerance in (
        ("size", image.GetSize(), label.GetSize(), 0),
        ("spacing", image.GetSpacing(), label.GetSpacing(), 1e-3),
    ):
        if not np.allclose(of_image, of_label, rtol=tolerance, atol=0):
            raise CaseError(f"image and label differ in {what}: {_text(of_image)} and {_text(of_label)}.")


def _text(numbers: Iterable[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)


# ------------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Case:
    """A case and its files; ``label`` is None where it is not to be opened."""

    name: str
    part: Part
    image: Path
    label: Path | None


def _nothing(image: sitk.Image) -> None:
    pass


@dataclass(frozen=True)
class Recipe:
    """What a script says about its dataset. Its functions are module-level ones, so that processes can share them.

    Attributes:
        labels: name -> number, as in ``dataset.json``.
        channel: nnU-Net normalises ``CT`` by statistics of the dataset and anything else image by image.
        reference: where the data come from.
        label_values: value in the published file -> number; by default they are the same.
        class_groups: name -> numbers of labels; ``nnUNetv2_ssl_evaluate`` averages over them.
        mend: corrects what a header says, in place, before image and label are compared.
        align: puts a label on its image's grid.
        edit: ``(case, image, label) -> (image, label)``, what is done to the intensities and the extent.
        h5_axes: the arrays' axes in h5 files.
        h5_spacing: mm; h5 files do not say.
        licence: of the data.
    """

    labels: dict[str, int]
    channel: str
    reference: str
    label_values: dict[int, int] | None = None
    class_groups: dict[str, list[int]] | None = None
    mend: Callable[[sitk.Image], None] = _nothing
    align: Callable[[sitk.Image, sitk.Image], sitk.Image] = align_by_header
    edit: Callable[[Case, sitk.Image, sitk.Image | None], tuple[sitk.Image, sitk.Image | None]] | None = None
    h5_axes: str = "xyz"
    h5_spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    licence: str | None = None


def load(case: Case, recipe: Recipe) -> tuple[sitk.Image | None, sitk.Image | None, list[str]]:
    """Read and check a case; returns image, label (uint8, the dataset's numbers) and what is wrong with them."""
    problems: list[str] = []
    image = label = None
    try:
        image = _read(case.image, "image", recipe)
    except CaseError as problem:
        problems.append(f"{case.name}: {problem}")
    if case.label is None:
        return image, None, problems
    try:
        label = _numbers(_read(case.label, "label", recipe), recipe)
    except CaseError as problem:
        problems.append(f"{case.name}: {problem}")
    if image is not None and label is not None:
        try:
            label = recipe.align(label, image)
        except CaseError as problem:
            problems.append(f"{case.name}: {problem}")
    return image, label, problems


def _read(path: Path, key: str, recipe: Recipe) -> sitk.Image:
    if path.suffix == ".h5":
        image = _read_h5(path, key, recipe)
    elif path.is_dir():
        image = _read_dicom(path)
    else:
        image = _read_file(path, key)
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise CaseError(f"{path} holds {image.GetNumberOfComponentsPerPixel()} values a voxel, expected one.")
    if not np.isfinite(sitk.GetArrayViewFromImage(image)).all():
        raise CaseError(f"the {key} holds NaN or infinite voxels.")
    recipe.mend(image)
    return image


def _read_file(path: Path, key: str) -> sitk.Image:
    try:
        if path.name.endswith((".nii", ".nii.gz")):
            _check_nifti(path, key)
        image = sitk.ReadImage(str(path))
    except UNREADABLE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise CaseError(f"{path} cannot be read: {reason}") from error
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:  # some headers count one volume as a fourth axis
        image = image[:, :, :, 0]
    if image.GetDimension() != 3:
        raise CaseError(f"{path} is {' x '.join(map(str, image.GetSize()))}, expected one volume.")
    return image


def _check_nifti(path: Path, key: str) -> None:
    """What SimpleITK passes over: it reads NaN as 0 and truncated files as if they were whole."""
    if not np.isfinite(np.asanyarray(nibabel.load(path).dataobj)).all():
        raise CaseError(f"the {key} holds NaN or infinite voxels.")


def _read_h5(path: Path, key: str, recipe: Recipe) -> sitk.Image:
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{path} needs h5py, which is not installed: pip install h5py") from error
    try:
        with h5py.File(path) as file:
            if key not in file:
                raise CaseError(f"{path} has no {key!r}, only {', '.join(map(repr, file)) or 'nothing'}.")
            array = file[key][:]
    except OSError as error:
        raise CaseError(f"{path} cannot be read: {error}") from error
    if array.ndim != 3:
        raise CaseError(f"{path}: {key!r} has shape {array.shape}, expected three axes.")
    if key == "label":
        array = array.astype(np.float32)  # bool and 64 bit integers are not everybody's
    array = array.transpose([recipe.h5_axes.index(axis) for axis in "zyx"])
    image = sitk.GetImageFromArray(np.ascontiguousarray(array))
    image.SetSpacing(recipe.h5_spacing)
    return image


def _read_dicom(folder: Path) -> sitk.Image:
    """A series as a volume, slices ascending in space; ``SLICE_ORDER`` in its metadata says how they are numbered."""
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        raise CaseError(f"{folder} holds {len(series)} DICOM series, expected one.")
    reader = sitk.ImageSeriesReader()
    reader.MetaDataDictionaryArrayUpdateOn()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0]))
    try:
        image = reader.Execute()
        slices = range(image.GetSize()[2])
        numbers = np.array([int(reader.GetMetaData(i, "0020|0013")) for i in slices])
        positions = np.array([[float(x) for x in reader.GetMetaData(i, "0020|0032").split("\\")] for i in slices])
    except RuntimeError as error:
        raise CaseError(f"{folder} cannot be read: {str(error).strip().splitlines()[-1]}") from error
    gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    if len(gaps) and gaps.max() - gaps.min() > 0.05 * gaps.min():
        raise CaseError(f"{folder}: slices are {gaps.min():g} to {gaps.max():g} mm apart; is one missing or doubled?")
    steps = np.unique(np.diff(numbers))
    if len(steps) > 1 or (len(steps) and steps[0] not in (-1, 1)):
        raise CaseError(f"{folder}: the slices are not numbered in the order of their positions.")
    image.SetMetaData("SLICE_ORDER", "descending" if len(steps) and steps[0] < 0 else "ascending")
    return image


def _numbers(label: sitk.Image, recipe: Recipe) -> sitk.Image:
    """The label with the dataset's numbers as uint8; published ones are often float, and sometimes 255 for 1."""
    values = recipe.label_values or {number: number for number in recipe.labels.values()}
    array = sitk.GetArrayViewFromImage(label)
    if np.issubdtype(array.dtype, np.floating):
        rounded = np.rint(array)
        if np.abs(array - rounded).max(initial=0) > 1e-3:
            raise CaseError("the label holds fractions; it was interpolated.")
        array = rounded
    numbers, known = np.zeros(array.shape, np.uint8), np.zeros(array.shape, bool)
    for value, number in values.items():
        here = array == value
        numbers[here] = number
        known |= here
    if not known.all():
        foreign = [int(value) for value in np.unique(array[~known])]
        raise CaseError(f"the label holds {foreign}, expected {sorted(values)}.")
    result = sitk.GetImageFromArray(numbers)
    result.CopyInformation(label)
    return result


# ------------------------------------------------------------------------------------------------------------ editing


def clip(image: sitk.Image, low: float, high: float) -> sitk.Image:
    """Intensities outside the window become its bounds; the pixel type stays."""
    return sitk.Clamp(image, image.GetPixelID(), low, high)


def resample(image: sitk.Image, spacing: tuple[float, float, float], interpolator: int) -> sitk.Image:
    """The same extent at another spacing (mm), from the same corner."""
    old, size = np.array(image.GetSpacing()), np.array(image.GetSize())
    new_size = np.maximum(1, np.rint(size * old / spacing)).astype(int)
    # voxel centres: the first of the new ones lies half a new voxel from the same corner
    origin = image.TransformContinuousIndexToPhysicalPoint(((np.array(spacing) / old - 1) / 2).tolist())
    outside = float(sitk.GetArrayViewFromImage(image).min())
    return sitk.Resample(
        image, new_size.tolist(), sitk.Transform(), interpolator, origin, spacing, image.GetDirection(), outside
    )


def crop_in_plane(
    image: sitk.Image, label: sitk.Image, margin: tuple[int, int], minimum: int
) -> tuple[sitk.Image, sitk.Image]:
    """Cut both to the label's box in x and y; z stays whole.

    Args:
        image: the image.
        label: its label, on the same grid; without foreground nothing is cut.
        margin: voxels around the box in x and in y.
        minimum: voxels that the result has at least, where the image has them.
    """
    foreground = np.argwhere(sitk.GetArrayViewFromImage(label).any(axis=0))  # (y, x)
    if not len(foreground):
        return image, label
    cuts = []
    for axis in (0, 1):
        size, positions = image.GetSize()[axis], foreground[:, 1 - axis]
        low, high = max(0, positions.min() - margin[axis]), min(size, positions.max() + 1 + margin[axis])
        width = max(high - low, min(minimum, size))
        low = min(max(0, low - (width - (high - low)) // 2), size - width)
        cuts.append(slice(int(low), int(low + width)))
    return image[cuts[0], cuts[1], :], label[cuts[0], cuts[1], :]


def _clip_case(
    case: Case, image: sitk.Image, label: sitk.Image | None, low: float, high: float, only: frozenset[str] | None
) -> tuple[sitk.Image, sitk.Image | None]:
    return (clip(image, low, high) if only is None or case.name in only else image), label


def add_window(parser: argparse.ArgumentParser, default: str) -> None:
    """``--window LOW HIGH`` and ``--no-window``, for ``windowed``."""
    group = parser.add_mutually_exclusive_group()
    text = f"cut intensities to these HU; default {default}"
    group.add_argument("--window", nargs=2, type=float, metavar=("LOW", "HIGH"), help=text)
    group.add_argument("--no-window", action="store_true", help="leave intensities as they are")


def windowed(
    recipe: Recipe, args: argparse.Namespace, default: tuple[float, float], only: frozenset[str] | None = None
) -> Recipe:
    """The recipe with the window that the user has asked for.

    Args:
        recipe: the recipe.
        args: what ``add_window`` has added.
        default: where the user says nothing.
        only: names of the cases that it holds for; all by default.
    """
    if args.no_window:
        return recipe
    low, high = args.window or default
    if low >= high:
        raise UserError(f"--window {low:g} {high:g}: the first must be the lower one.")
    return replace(recipe, edit=partial(_clip_case, low=low, high=high, only=only))


# ------------------------------------------------------------------------------------------------------------ writing


def arguments(description: str | None, lists: bool = True) -> argparse.ArgumentParser:
    """The arguments that all scripts take.

    Args:
        description: the script's docstring.
        lists: whether the user may give lists of cases.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the published data")
    parser.add_argument("-d", dest="dataset_id", type=int, required=True, help="id of the dataset to make")
    parser.add_argument("-np", dest="processes", type=int, default=1, help="cases at a time; default 1")
    text = "image and label match voxel by voxel, even where their headers differ in position or direction"
    parser.add_argument("--trust-voxels", action="store_true", help=text)
    if lists:
        for name in ("train", "validation", "test", "labeled"):
            text = f"{name} cases, one a line or a JSON list, in place of the published ones"
            parser.add_argument(f"--{name}-list", type=Path, metavar="FILE", help=text)
    return parser


def prepare(
    cases: list[Case],
    problems: list[str],
    recipe: Recipe,
    name: str,
    args: argparse.Namespace,
    groups: dict[str, str] | None = None,
) -> None:
    """Check all cases, then write the dataset and its one fold.

    Args:
        cases: all cases, the labelled ones in their order.
        problems: what was found out before any file was read, such as missing files.
        recipe: what the dataset is.
        name: the dataset's name without its number.
        args: what ``arguments`` has parsed.
        groups: case -> patient, where patients have several cases; goes into ``groups.json``.

    Raises:
        UserError: anything is wrong; then nothing was written.
    """
    raw, prepared = (Path(required_folder(variable)) for variable in ("nnUNet_raw", "nnUNet_preprocessed"))
    dataset = f"Dataset{args.dataset_id:03d}_{name}"
    for folder in (raw, prepared):
        taken = sorted(folder.glob(f"Dataset{args.dataset_id:03d}_*"))
        if taken and not (taken[0].name == dataset and is_unfinished(dataset)):  # left by a killed run
            raise UserError(f"{taken[0]} exists: choose another -d, or remove it first.")

    if args.trust_voxels and recipe.align is align_by_header:
        recipe = replace(recipe, align=align_by_voxels)
    found = all_outcomes(_check, [(case, recipe) for case in cases], args.processes, "Checking")
    problems.extend(sorted(problem for of_case in found for problem in of_case))
    if problems:
        raise UserError("nothing was written:\n" + "\n".join(problems))

    by_part = {part: [case.name for case in cases if case.part == part] for part in FOLDERS}
    fold = {
        "train": sorted(by_part["labeled"]),
        "val": sorted(by_part["validation"] or by_part["labeled"][:VALIDATION_CASES]),
    }
    with new_dataset(str(raw), dataset, True, str(prepared)) as building:
        folder = Path(building)
        for part in by_part:
            if by_part[part]:
                (folder / f"images{FOLDERS[part]}").mkdir(parents=True, exist_ok=True)
                if part != "unlabeled":
                    (folder / f"labels{FOLDERS[part]}").mkdir(exist_ok=True)
        all_outcomes(_write, [(case, recipe, folder) for case in cases], args.processes, "Writing")
        write_json(str(folder / "dataset.json"), _dataset_json(by_part, recipe))
        write_json(str(folder / SPLITS), [fold])
        if groups:
            write_json(str(folder / GROUPS), groups)
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
    if edited is image and recipe.mend is _nothing and _is_plain(case.image):
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
    _forget_metadata(image)
    try:
        sitk.WriteImage(image, str(file), useCompression=True)
        np.asanyarray(nibabel.load(file).dataobj)
    except UNREADABLE as error:
        raise OSError(errno.EIO, "the file is not whole; is the disk full?", str(file)) from error


def _is_plain(path: Path) -> bool:
    """Whether a file is what nnU-Net wants: .nii.gz with three axes."""
    return path.name.endswith(ENDING) and nibabel.load(path).ndim == 3


def _forget_metadata(image: sitk.Image) -> None:
    """What DICOM and NIfTI headers say besides the geometry: names, dates, old scale factors."""
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)


def _dataset_json(by_part: dict[str, list[str]], recipe: Recipe) -> dict[str, Any]:
    content = {
        "channel_names": {"0": recipe.channel},
        "labels": recipe.labels,
        "numTraining": len(by_part["labeled"]) + len(by_part["validation"]),
        "file_ending": ENDING,
        "reference": recipe.reference,
        "licence": recipe.licence,
        "class_groups": recipe.class_groups,
    }
    return {key: value for key, value in content.items() if value is not None}


# ---------------------------------------------------------------------------------------- a folder with protocol.json


def from_protocol(
    argv: list[str] | None, description: str | None, title: str, labeled: str, recipe: Recipe, patients: bool = False
) -> None:
    """Prepare a folder with ``images`` and ``labels``, or ``imagesTr`` and ``labelsTr``, which hold the same names.

    The lists are in its ``protocol.json``; without one they are drawn by ``draw_lists``. Where patients have several
    cases, the lists name patients, and ``cases_of_patient`` says which cases are theirs.

    Args:
        argv: arguments without the program's name.
        description: the script's docstring.
        title: begins the dataset's name.
        labeled: how many labelled cases (or patients) by default.
        recipe: what the dataset is.
        patients: whether ``cases_of_patient`` must be there, since lists of cases would split patients.
    """
    parser = arguments(description, lists=False)
    parser.add_argument("--seed", type=int, default=0, help="which order of the training cases, from 0; default 0")
    parser.add_argument("--labeled", default=labeled, help=f"training cases that keep labels, or 'all'; here {labeled}")
    args = parser.parse_args(argv)
    suffix = "Tr" if (args.data / "imagesTr").is_dir() else ""
    if not (args.data / f"images{suffix}").is_dir():
        raise UserError(f"{args.data} holds neither imagesTr nor images: --data takes the folder that does.")
    images, labels = (Files(args.data / f"{folder}{suffix}", "{}.nii.gz") for folder in ("images", "labels"))
    file = args.data / "protocol.json"
    cases_of: dict[str, list[str]] = {}
    if file.is_file():
        train, test, several, cases_of = _read_protocol(file, args.seed)
    if patients and not cases_of:
        raise UserError(f"{file} with 'cases_of_patient' is needed: lists of cases would test on patients that train.")
    if not file.is_file():
        train, test = draw_lists(images.found, args.seed, images.root)
        several = True
        print(
            f"Without {file} the lists were drawn ({len(train)} training and {len(test)} test cases of "
            f"{len(images.found)}): results on them compare with each other, not with those of docs/results.md, whose "
            "lists are in a protocol.json of its own."
        )
    parts = Lists(train, test, ordered=len(train) - 1).parts(args.labeled)
    if cases_of:
        parts = {case: part for patient, part in parts.items() for case in cases_of[patient]}
    problems: list[str] = []
    cases = make_cases(parts, images, labels, problems)
    seed = f"Seed{args.seed}" if several else ""
    name = f"{title}AllLabels" if args.labeled == "all" else f"{title}{seed}Labeled{args.labeled}"
    prepare(cases, problems, recipe, name, args, {case: patient for patient in cases_of for case in cases_of[patient]})


def draw_lists(cases: Iterable[str], seed: int, folder: Path) -> tuple[list[str], list[str]]:
    """Lists for a dataset whose owners publish none.

    Sorted by name and permuted by ``default_rng(0)``, the first 40 cases are test cases and the next 160, or as many
    as there are, training cases. A seed's order is ``default_rng(seed)``'s permutation of the sorted training cases.

    Args:
        cases: all that are there.
        seed: of the training cases' order; test cases and training cases are the same for all.
        folder: where they are, for messages.

    Returns:
        The training cases in the seed's order, and the test cases.

    Raises:
        UserError: the seed is negative, or there are not two training cases.
    """
    if seed < 0:
        raise UserError(f"--seed {seed}: expected 0 or more.")
    names = sorted(cases)
    if len(names) < DRAWN_TEST + 2:
        raise UserError(
            f"{folder} holds {len(names)} cases (.nii.gz), and without a protocol.json beside it {DRAWN_TEST} of them "
            "are drawn as test cases. Give the folder of the whole dataset, or write a protocol.json."
        )
    drawn = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
    train = sorted(drawn[DRAWN_TEST : DRAWN_TEST + DRAWN_TRAIN])
    return [train[i] for i in np.random.default_rng(seed).permutation(len(train))], drawn[:DRAWN_TEST]


def make_cases(
    parts: dict[str, Part], images: Files, labels: Files, problems: list[str], prefix: str = "", open_all: bool = False
) -> list[Case]:
    """The cases with their files; missing and doubled files are added to ``problems``.

    Args:
        parts: what ``Lists.parts`` gave.
        images: the images' files.
        labels: the labels' files.
        problems: is added to.
        prefix: before a case's name in nnU-Net's files.
        open_all: whether labels of unlabelled cases are opened.
    """
    cases = []
    for case, part in parts.items():
        image = images.one(case, problems)
        wanted = part != "unlabeled" or open_all
        label = labels.one(case, problems) if wanted else None
        if image and (label or not wanted):
            cases.append(Case(f"{prefix}{case}", part, image, label))
    return cases


def _read_protocol(file: Path, seed: int) -> tuple[list[str], list[str], bool, dict[str, list[str]]]:
    """The training cases in the order of the seed, the test cases, whether there are several orders, and their cases.

    Where there is ``cases_of_patient``, training and test "cases" are patients; else the last one is empty.
    """
    try:
        protocol = json.loads(file.read_text(encoding="utf-8"))
        train, test, orders = (protocol[key] for key in ("train", "test", "labelled_order"))
        cases_of = {patient: list(cases) for patient, cases in protocol.get("cases_of_patient", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        wanted = '{"train": [...], "test": [...], "labelled_order": [[...], ...]}'
        raise UserError(f"{file} cannot be read ({error!r}); expected {wanted}, the lists holding cases.") from error
    what = "patient" if cases_of else "case"
    if len(set(train + test)) != len(train) + len(test):
        raise UserError(f"{file} names a {what} twice among 'train' and 'test'.")
    for number, order in enumerate(orders):
        if sorted(order) != sorted(train):
            raise UserError(f"{file}: order {number} of 'labelled_order' does not hold exactly the {what}s of 'train'.")
    if cases_of:
        cases_of = {patient: cases_of.get(patient, []) for patient in train + test}
        if without := [patient for patient, cases in cases_of.items() if not cases]:
            raise UserError(f"{file}: 'cases_of_patient' names no case of {', '.join(without)}.")
        count = Counter(case for cases in cases_of.values() for case in cases)
        if twice := sorted(case for case, times in count.items() if times > 1):
            raise UserError(f"{file}: 'cases_of_patient' names a case twice: {', '.join(twice)}.")
    if not 0 <= seed < len(orders):
        raise UserError(f"--seed {seed}: {file} has orders 0 to {len(orders) - 1}.")
    return orders[seed], test, len(orders) > 1, cases_of
