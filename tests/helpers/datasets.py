"""Tiny made-up nnU-Net datasets, planned and prepared by nnU-Net itself.

``conftest.py`` serves them as fixtures; nothing here needs pytest.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import SimpleITK as sitk


@dataclass(frozen=True)
class Recipe:
    """What a tiny dataset is made of; the defaults are a plain 3D one.

    Attributes:
        dataset_id, name: together nnU-Net's folder name, ``Dataset901_Tiny``.
        configuration: the one that is planned, shrunk and prepared.
        shape, spacing: of the images in nnU-Net's axis order, z y x (y x for real 2D images).
        channels: of each image, one file each.
        ignore: whether the upper part of each labeled image carries the ignore label 3.
        core: whether there is a second class, within the first.
        regions: whether the labels are nnU-Net regions: the whole (1 and 2) and its core (2).
        file_ending: ``.nii.gz``, or ``.png`` for real 2D images.
        planner: nnU-Net's planner class.
        patch_size, features: of the shrunk plans, a feature count a stage.
    """

    dataset_id: int = 901
    name: str = "Tiny"
    configuration: str = "3d_fullres"
    shape: tuple[int, ...] = (20, 22, 24)
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    channels: int = 1
    labeled: int = 5
    unlabeled: int = 4
    test: int = 2
    ignore: bool = False
    core: bool = True
    regions: bool = False
    file_ending: str = ".nii.gz"
    planner: str = "ExperimentPlanner"
    patch_size: tuple[int, ...] = (16, 16, 16)
    features: tuple[int, ...] = (4, 6, 8)
    batch_size: int = 2
    seed: int = 0


RECIPES: dict[str, Recipe] = {
    "3d": Recipe(),
    "2d": Recipe(902, "Tiny2d", configuration="2d", patch_size=(16, 16)),
    "png": Recipe(
        903, "TinyPng", configuration="2d", shape=(32, 40), spacing=(1.0, 1.0), file_ending=".png", patch_size=(16, 16)
    ),
    "multichannel": Recipe(904, "TinyChannels", channels=2),
    "anisotropic": Recipe(
        905, "TinyAniso", shape=(12, 32, 36), spacing=(5.0, 1.0, 1.0), patch_size=(8, 16, 16), features=(4, 6, 8)
    ),
    "ignore": Recipe(906, "TinyIgnore", ignore=True),
    "regions": Recipe(907, "TinyRegions", regions=True),
    "regions_ignore": Recipe(919, "TinyRegionsIgnore", regions=True, ignore=True),
    "resenc": Recipe(908, "TinyResEnc", planner="nnUNetPlannerResEncM"),
}


@dataclass(frozen=True)
class Folders:
    """nnU-Net's three folders."""

    raw: Path
    preprocessed: Path
    results: Path

    @classmethod
    def below(cls, parent: Path) -> Folders:
        """Make the three folders in ``parent``."""
        folders = cls(parent / "raw", parent / "preprocessed", parent / "results")
        for folder in (folders.raw, folders.preprocessed, folders.results):
            folder.mkdir(parents=True, exist_ok=True)
        return folders

    def environment(self) -> dict[str, str]:
        """nnU-Net's three environment variables."""
        return {
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
        }


@dataclass(frozen=True)
class TinyDataset:
    """A dataset on disk, planned and prepared for one configuration."""

    recipe: Recipe
    folders: Folders
    plans_name: str

    @property
    def id(self) -> int:
        """The dataset's number, as ``-d`` takes it."""
        return self.recipe.dataset_id

    @property
    def name(self) -> str:
        """For example ``Dataset901_Tiny``."""
        return f"Dataset{self.recipe.dataset_id:03d}_{self.recipe.name}"

    @property
    def configuration(self) -> str:
        """The configuration that was prepared."""
        return self.recipe.configuration

    @property
    def raw(self) -> Path:
        """Folder of the raw dataset."""
        return self.folders.raw / self.name

    @property
    def preprocessed(self) -> Path:
        """Folder of the prepared dataset."""
        return self.folders.preprocessed / self.name

    @property
    def plans_file(self) -> Path:
        """The plans that were shrunk."""
        return self.preprocessed / f"{self.plans_name}.json"

    @property
    def plans(self) -> dict[str, Any]:
        """The plans, read anew."""
        return json.loads(self.plans_file.read_text())

    @property
    def dataset_json(self) -> dict[str, Any]:
        """``dataset.json``, read anew."""
        return json.loads((self.raw / "dataset.json").read_text())

    def cases(self, folder: str) -> list[str]:
        """Names of the cases in a raw folder, for example ``imagesUn``."""
        ending = f"_0000{self.recipe.file_ending}"
        return sorted(file.name.removesuffix(ending) for file in (self.raw / folder).glob(f"*{ending}"))


def make_case(recipe: Recipe, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw an ellipsoid (label 1), with a core (label 2) if the recipe has one, on a noisy ground.

    Returns:
        image: float32 ``[channels, *shape]``; labels: uint8 ``[*shape]``.
    """
    shape = np.array(recipe.shape)
    center = shape / 2 + rng.uniform(-0.08, 0.08, len(shape)) * shape
    radii = shape * rng.uniform(0.28, 0.36, len(shape))
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    distance = np.sqrt((((grid - center) / radii) ** 2).sum(-1))
    labels = (distance < 1).astype(np.uint8)
    if recipe.core:
        labels[distance < 0.5] = 2
    means = rng.permuted([100.0, 150.0, 200.0]) if recipe.channels > 1 else np.array([60.0, 130.0, 200.0])
    image = np.stack([(means[labels] if c == 0 else means[::-1][labels]) for c in range(recipe.channels)])
    image = image + rng.normal(0, 12, image.shape)
    return image.astype(np.float32), labels


def _write(array: np.ndarray, file: Path, spacing: Sequence[float]) -> None:
    if file.suffix == ".png":
        sitk.WriteImage(sitk.GetImageFromArray(np.clip(array, 0, 255).astype(np.uint8)), str(file))
        return
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in reversed(spacing)])
    sitk.WriteImage(image, str(file))


def write_images(recipe: Recipe, folder: Path, case: str, image: np.ndarray) -> list[Path]:
    """Write the channels of an image as nnU-Net names them; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{case}_{channel:04d}{recipe.file_ending}" for channel in range(len(image))]
    for array, file in zip(image, files, strict=True):
        _write(array, file, recipe.spacing)
    return files


def write_raw_dataset(recipe: Recipe, raw: Path) -> Path:
    """Write imagesTr, labelsTr, imagesUn, imagesTs, labelsTs and dataset.json; returns the dataset's folder."""
    rng = np.random.default_rng(recipe.seed)
    folder = raw / f"Dataset{recipe.dataset_id:03d}_{recipe.name}"
    parts = (("tr", "imagesTr", "labelsTr", recipe.labeled), ("un", "imagesUn", None, recipe.unlabeled),
             ("ts", "imagesTs", "labelsTs", recipe.test))  # fmt: skip
    for stem, images, label_folder, count in parts:
        for i in range(count):
            image, labels = make_case(recipe, rng)
            case = f"{stem}_{i:02d}"
            write_images(recipe, folder / images, case, image)
            if label_folder is None:
                continue
            if recipe.ignore and label_folder == "labelsTr":
                labels[: len(labels) // 4] = 3
            (folder / label_folder).mkdir(exist_ok=True)
            _write(labels, folder / label_folder / f"{case}{recipe.file_ending}", recipe.spacing)

    labels_json: dict[str, Any] = {"background": 0, "shell": 1, **({"core": 2} if recipe.core else {})}
    if recipe.regions:
        labels_json = {"background": 0, "whole": [1, 2], "core": 2}
    if recipe.ignore:
        labels_json["ignore"] = 3
    dataset_json: dict[str, Any] = {
        "channel_names": {str(c): f"channel{c}" for c in range(recipe.channels)},
        "labels": labels_json,
        "numTraining": recipe.labeled,
        "file_ending": recipe.file_ending,
    }
    if recipe.regions:
        dataset_json["regions_class_order"] = [1, 2]
    (folder / "dataset.json").write_text(json.dumps(dataset_json, indent=2))
    return folder


@contextmanager
def threads_for_processes() -> Iterator[None]:
    """Let nnU-Net's process pools be thread pools: a spawned worker takes seconds to import nnU-Net."""
    from nnunetv2.utilities import utils

    class ThreadContext:
        Pool = ThreadPool

    real = multiprocessing.get_context

    def get_context(method: str | None = None) -> Any:
        return ThreadContext if method == "spawn" else real(method)

    with (
        mock.patch.object(multiprocessing, "get_context", get_context),
        mock.patch.object(utils, "Pool", ThreadPool),
    ):
        yield


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    with mock.patch.dict(os.environ, variables):
        yield


def plan_and_preprocess(recipe: Recipe, folders: Folders) -> TinyDataset:
    """Fingerprint, plan, shrink the plans and prepare a raw dataset with nnU-Net's own functions."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    from nnunet_ssl.demo.plans import shrink_plans

    class FewSamples(DatasetFingerprintExtractor):
        """Draws fewer voxels for the intensity statistics than the stock hundred million."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.num_foreground_voxels_for_intensitystats = 1e5

    # planning hands nnUNet_n_proc_DA to torch as a number of threads, so it must not be 0
    with environment({**folders.environment(), "nnUNet_n_proc_DA": "1"}), threads_for_processes():
        api.extract_fingerprint_dataset(recipe.dataset_id, FewSamples, 2, check_dataset_integrity=True)
        plans_name = api.plan_experiments([recipe.dataset_id], recipe.planner)
        dataset = TinyDataset(recipe, folders, plans_name)
        shrink_plans(
            dataset.plans_file,
            recipe.configuration,
            recipe.features,
            patch_size=recipe.patch_size,
            batch_size=recipe.batch_size,
            convs_per_stage=1,
        )
        api.preprocess([recipe.dataset_id], plans_name, (recipe.configuration,), (2,))
    return dataset
