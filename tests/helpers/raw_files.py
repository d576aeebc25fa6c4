"""Small files as the owners of datasets publish them, for the tests of ``nnUNetv2_ssl_dataset``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"

SHAPE = (4, 5, 6)  # z, y, x


def image(dtype: type = np.int16, low: float = -1000, high: float = 1000, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Voxels that differ from each other."""
    return np.linspace(low, high, int(np.prod(shape))).reshape(shape).astype(dtype)


def label(*values: int, dtype: type = np.uint8, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A label that holds each of the values, in runs along x."""
    return np.resize(np.array(values, dtype), shape)


def write(
    path: Path,
    array: np.ndarray,
    spacing: tuple[float, ...] = (0.7, 0.8, 2.5),
    origin: tuple[float, ...] = (3.0, -4.0, 5.0),
    direction: str = "LPS",
) -> Path:
    """Write an array (z, y, x) as the file's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = sitk.GetImageFromArray(array)
    content.SetSpacing(spacing)
    content.SetOrigin(origin)
    cosines = sitk.DICOMOrientImageFilter.GetDirectionCosinesFromOrientation(direction)
    content.SetDirection(cosines)
    sitk.WriteImage(content, str(path))
    return path


def write_dicom(folder: Path, array: np.ndarray, spacing: tuple[float, float, float], numbers: list[int]) -> None:
    """Write slices in HU (z, y, x), ascending in space, with these instance numbers; the file holds HU + 1024."""
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z, number in enumerate(numbers):
        content = sitk.GetImageFromArray(array[z].astype(np.int16))
        content.SetSpacing(spacing[:2])
        tags = {
            "0008|0060": "CT",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0020|000d": "1.2.3",
            "0020|000e": "1.2.3.4",
            "0008|0018": f"1.2.3.4.{number}",
            "0020|0013": str(number),
            "0020|0032": f"-10\\-20\\{z * spacing[2]:g}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0018|0050": f"{spacing[2]:g}",
            "0028|1052": "-1024",
            "0028|1053": "1",
        }
        for key, value in tags.items():
            content.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"1-{number:03d}.dcm"))
        writer.Execute(content)


def cases(folder: Path) -> list[str]:
    """The names of the cases in a folder of nnU-Net's; none where the folder is not there."""
    return sorted(file.name.replace("_0000", "").removesuffix(".nii.gz") for file in folder.glob("*"))


def array(path: Path) -> np.ndarray:
    """The voxels of a file, z, y, x."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def fold(folders, dataset: str) -> dict[str, list[str]]:
    """The one fold of a dataset, which is where nnU-Net trains and where it plans from."""
    text = (folders.preprocessed / dataset / "splits_final.json").read_text()
    assert (folders.raw / dataset / "splits_final.json").read_text() == text
    (found,) = json.loads(text)
    return found


def nothing_written(folders) -> bool:
    """Whether no dataset appeared, and nothing else either but the lock of one."""
    left = [*folders.raw.iterdir(), *folders.preprocessed.iterdir()]
    return all(file.name.endswith("-lock") for file in left)
