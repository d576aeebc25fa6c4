"""Reading published images and labels: NIfTI, NRRD, h5 and DICOM, whole and with the numbers that were promised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.datasets.cases import Case
from nnunet_ssl.datasets.recipe import Recipe
from nnunet_ssl.errors import UserError
from nnunet_ssl.volumes import VolumeError, check_file, unreadable


def load(case: Case, recipe: Recipe) -> tuple[sitk.Image | None, sitk.Image | None, list[str]]:
    """Read and check a case; returns image, label (uint8, the dataset's numbers) and what is wrong with them."""
    problems: list[str] = []
    image = label = None
    try:
        image = _read(case.image, "image", recipe)
    except VolumeError as problem:
        problems.append(f"{case.name}: {problem}.")
    if case.label is None:
        return image, None, problems
    try:
        label = _numbers(_read(case.label, "label", recipe), recipe)
        label = label if image is None else recipe.align(label, image)
    except VolumeError as problem:
        problems.append(f"{case.name}: {problem}.")
    return image, label, problems


def _read(path: Path, key: str, recipe: Recipe) -> sitk.Image:
    if path.suffix == ".h5":
        image = _read_h5(path, key, recipe)
    elif path.is_dir():
        image = _read_dicom(path)
    else:
        image = _read_file(path)
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise VolumeError(f"{path} holds {image.GetNumberOfComponentsPerPixel()} values per voxel, expected one")
    if not np.isfinite(sitk.GetArrayViewFromImage(image)).all():
        raise VolumeError(f"the {key} holds NaN or infinite voxels")
    recipe.mend(image)
    return image


def _read_file(path: Path) -> sitk.Image:
    check_file(str(path))
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise unreadable(str(path), error) from error
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:  # some headers count one volume as a fourth axis
        image = image[:, :, :, 0]
    if image.GetDimension() != 3:
        raise VolumeError(f"{path} is {' x '.join(map(str, image.GetSize()))}, expected one volume")
    return image


def _read_h5(path: Path, key: str, recipe: Recipe) -> sitk.Image:
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{path} needs h5py, which is not installed: pip install h5py") from error
    try:
        with h5py.File(path) as file:
            if key not in file:
                raise VolumeError(f"{path} has no {key!r}, only {', '.join(map(repr, file)) or 'nothing'}")
            array = file[key][:]
    except OSError as error:
        raise unreadable(str(path), error) from error
    if array.ndim != 3:
        raise VolumeError(f"{path}: {key!r} has shape {array.shape}, expected three axes")
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
        raise VolumeError(f"{folder} holds {len(series)} DICOM series, expected one")
    reader = sitk.ImageSeriesReader()
    reader.MetaDataDictionaryArrayUpdateOn()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0]))
    try:
        image = reader.Execute()
        slices = range(image.GetSize()[2])
        numbers = np.array([int(reader.GetMetaData(i, "0020|0013")) for i in slices])
        positions = np.array([[float(x) for x in reader.GetMetaData(i, "0020|0032").split("\\")] for i in slices])
    except RuntimeError as error:
        raise unreadable(str(folder), error) from error
    gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    if len(gaps) and gaps.max() - gaps.min() > 0.05 * gaps.min():
        raise VolumeError(
            f"{folder}: slices are {gaps.min():g} to {gaps.max():g} mm apart; one may be missing or duplicated"
        )
    steps = np.unique(np.diff(numbers))
    if len(steps) > 1 or (len(steps) and steps[0] not in (-1, 1)):
        raise VolumeError(f"{folder}: the slices are not numbered in the order of their positions")
    image.SetMetaData("SLICE_ORDER", "descending" if len(steps) and steps[0] < 0 else "ascending")
    return image


def _numbers(label: sitk.Image, recipe: Recipe) -> sitk.Image:
    """The label with the dataset's numbers as uint8; published ones are often float, and sometimes 255 for 1."""
    values = recipe.label_values or {number: number for number in recipe.labels.values()}
    array = sitk.GetArrayViewFromImage(label)
    if np.issubdtype(array.dtype, np.floating):
        rounded = np.rint(array)
        if np.abs(array - rounded).max(initial=0) > 1e-3:
            raise VolumeError("the label holds fractions; it was interpolated")
        array = rounded
    numbers, known = np.zeros(array.shape, np.uint8), np.zeros(array.shape, bool)
    for value, number in values.items():
        here = array == value
        numbers[here] = number
        known |= here
    if not known.all():
        foreign = [int(value) for value in np.unique(array[~known])]
        raise VolumeError(f"the label holds {foreign}, expected {sorted(values)}")
    result = sitk.GetImageFromArray(numbers)
    result.CopyInformation(label)
    return result
