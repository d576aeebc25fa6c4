"""The demo's made-up anatomy: five organs in a body, few of the images with labels.

Made so that three labeled cases are not enough: the organs overlap in intensity with each other and with unlabeled
tissue next to them, contrast and shape change from case to case, and a smooth field and noise lie over the image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from nnunet_ssl.files import write_json

ORGANS = {"background": 0, "liver": 1, "spleen": 2, "kidney": 3, "nodule": 4, "vessel": 5}
SHAPE = (32, 40, 36)  # z y x
DATASET = "Dataset001_SSLDemo"
LABELED, UNLABELED, TEST = 3, 32, 20

# Mean and spread of what a case's organ is bright by, in the middle of the case's gray scale: they overlap.
_INTENSITY = {
    "air": (0.0, 0.0),
    "body": (0.36, 0.03),
    "liver": (0.56, 0.04),
    "spleen": (0.62, 0.04),
    "kidney": (0.70, 0.05),
    "nodule": (0.80, 0.05),
    "vessel": (0.86, 0.05),
    "lump": (0.66, 0.10),
}
_GRAIN = {"body": 1.5, "liver": 1.0, "spleen": 0.7, "kidney": 1.8, "nodule": 0.7, "vessel": 0.7, "lump": 1.0}  # voxels
_TEXTURE = 0.04  # standard deviation of the texture, of a gray scale from 0 to 1
_NOISE = 0.04


def make_case(rng: np.random.Generator, shape: tuple[int, int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Draw one case.

    Args:
        rng: where all of its variation comes from.
        shape: voxels of each axis, z y x.

    Returns:
        image: float32 ``[*shape]``, 0 to about 1000; labels: uint8 ``[*shape]`` of ``ORGANS``. Every organ is there.
    """
    grid = _warped_grid(rng, shape)
    tissue = np.full(shape, "air", dtype="<U8")
    tissue[_ellipsoid(grid, (0, 0, 0), (1.3, 0.88, 0.88))] = "body"
    # tissue without a label that looks like an organ, at one of two places
    for center in ((-0.45, 0.48, 0.25), (0.45, -0.42, 0.15)):
        if rng.random() < 0.7:
            tissue[_ellipsoid(grid, _near(rng, center, 0.12), rng.uniform(0.1, 0.2, 3))] = "lump"
    liver = _ellipsoid(grid, _near(rng, (0.2, -0.1, -0.42), 0.05), _size(rng, (0.55, 0.5, 0.36)))
    liver &= ~_ellipsoid(grid, _near(rng, (-0.2, 0.3, -0.2), 0.06), _size(rng, (0.5, 0.3, 0.3)))  # a notch
    tissue[liver] = "liver"
    tissue[_ellipsoid(grid, _near(rng, (0.3, 0.15, 0.52), 0.05), _size(rng, (0.36, 0.3, 0.2)))] = "spleen"
    kidney_center = _near(rng, (-0.4, 0.42, -0.35), 0.05)
    kidney = _ellipsoid(grid, kidney_center, _size(rng, (0.4, 0.26, 0.24)))
    kidney &= ~_ellipsoid(grid, np.add(kidney_center, (0, -0.05, 0.2)), _size(rng, (0.15, 0.15, 0.16)))  # the hilum
    tissue[kidney] = "kidney"
    tissue[_vessel(rng, grid, shape)] = "vessel"
    nodule_center = _near(rng, (0.2, -0.15, -0.4), 0.13)  # somewhere in the liver
    tissue[_ellipsoid(grid, nodule_center, _size(rng, (0.19, 0.15, 0.165)))] = "nodule"

    labels = np.zeros(shape, np.uint8)
    for organ, label in ORGANS.items():
        labels[tissue == organ] = label
    return _image(rng, tissue), labels


def _warped_grid(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Coordinates from -1 to 1, ``[*shape, 3]``, turned, scaled and bent a little differently for each case."""
    axes = [np.linspace(-1, 1, n) for n in shape]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    affine = np.diag(rng.uniform(0.9, 1.12, 3)) + rng.normal(0, 0.06, (3, 3))
    bend = np.stack([gaussian_filter(rng.normal(size=shape), min(shape) / 6, mode="nearest") for _ in range(3)], -1)
    return grid @ affine + rng.uniform(-0.05, 0.05, 3) + 0.06 * bend / bend.std()


def _near(rng: np.random.Generator, center: tuple[float, ...], spread: float) -> tuple[float, ...]:
    return tuple(np.array(center) + rng.uniform(-spread, spread, 3))


def _size(rng: np.random.Generator, radii: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(np.array(radii) * rng.uniform(0.82, 1.2) * rng.uniform(0.9, 1.1, 3))


def _ellipsoid(grid: np.ndarray, center: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    return (((grid - np.array(center)) / np.array(radii)) ** 2).sum(-1) < 1


def _vessel(rng: np.random.Generator, grid: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """A tube of about four voxels across that winds along z through the middle of the body."""
    z, y, x = np.moveaxis(grid, -1, 0)
    phase, swing = rng.uniform(0, 2 * np.pi, 2), rng.uniform(0.06, 0.14, 2)
    center_y = 0.2 + swing[0] * np.sin(2.2 * z + phase[0])
    center_x = 0.12 + swing[1] * np.sin(2.8 * z + phase[1])
    radius = rng.uniform(1.7, 2.2) * 2 / min(shape[1:])
    return (np.hypot(y - center_y, x - center_x) < radius) & (np.abs(z) < 0.9)


def _image(rng: np.random.Generator, tissue: np.ndarray) -> np.ndarray:
    """Gray values of a tissue map: means of this case, texture, partial volume, a smooth field, noise."""
    image = np.zeros(tissue.shape)
    for name, (mean, spread) in _INTENSITY.items():
        inside = tissue == name
        if name == "air" or not inside.any():
            continue
        grain = gaussian_filter(rng.normal(size=tissue.shape), _GRAIN[name])
        image[inside] = rng.normal(mean, spread) + _TEXTURE * (grain / grain.std())[inside]
    image = gaussian_filter(image, 0.6)
    field = gaussian_filter(rng.normal(size=tissue.shape), min(tissue.shape) / 3, mode="nearest")
    image *= 1 + 0.15 * (field - field.mean()) / field.std()
    image = rng.uniform(0.85, 1.15) * np.clip(image, 0, None) ** rng.uniform(0.85, 1.2)  # gain and contrast of the scan
    return (1000 * np.clip(image + rng.normal(0, _NOISE, image.shape), 0, None)).astype(np.float32)


def write_dataset(
    raw: Path,
    seed: int,
    *,
    labeled: int = LABELED,
    unlabeled: int = UNLABELED,
    test: int = TEST,
    shape: tuple[int, int, int] = SHAPE,
    name: str = DATASET,
) -> Path:
    """Write the dataset as nnU-Net's raw format with ``imagesUn``, complete or not at all.

    The labels of the unlabeled cases are written nowhere.

    Args:
        raw: the folder ``nnUNet_raw``.
        seed: the same seed gives the same dataset.
        labeled, unlabeled, test: numbers of cases in imagesTr, imagesUn and imagesTs.
        shape: of the images.
        name: of the dataset.

    Returns:
        The dataset's folder.

    Raises:
        UserError: it cannot be written.
    """
    from nnunet_ssl.unlabeled.raw_dataset import new_dataset  # heavy

    raw.mkdir(parents=True, exist_ok=True)
    numbers = itertools.count()
    with new_dataset(str(raw), name, copy=True) as building:
        for suffix, count in (("Tr", labeled), ("Un", unlabeled), ("Ts", test)):
            images, truths = Path(building, f"images{suffix}"), Path(building, f"labels{suffix}")
            images.mkdir()
            if suffix != "Un":
                truths.mkdir()
            for number in itertools.islice(numbers, count):
                image, labels = make_case(np.random.default_rng([seed, number]), shape)
                sitk.WriteImage(sitk.GetImageFromArray(image), str(images / f"case_{number:03d}_0000.nii.gz"))
                if suffix != "Un":
                    sitk.WriteImage(sitk.GetImageFromArray(labels), str(truths / f"case_{number:03d}.nii.gz"))
        dataset_json = {
            "channel_names": {"0": "MRI"},
            "labels": ORGANS,
            "numTraining": labeled,
            "file_ending": ".nii.gz",
            "description": "Made up by nnUNetv2_ssl_demo",
        }
        write_json(Path(building, "dataset.json"), dataset_json)
    return raw / name
