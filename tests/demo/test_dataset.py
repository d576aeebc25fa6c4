"""The demo's dataset is what the demo says it is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ssl.demo.dataset import ORGANS, make_case, write_dataset


@pytest.fixture(scope="module")
def cases():
    return [make_case(np.random.default_rng([0, number])) for number in range(8)]


def voxels(cases, organ):
    return np.array([(labels == ORGANS[organ]).sum() for _, labels in cases])


@pytest.mark.parametrize("organ", [name for name in ORGANS if name != "background"])
def test_every_organ_is_in_every_case(cases, organ):
    assert voxels(cases, organ).min() >= 15


def test_one_organ_is_small_and_one_is_thin(cases):
    assert voxels(cases, "nodule").mean() < 0.1 * voxels(cases, "liver").mean()
    for _, labels in cases:
        z = np.nonzero(labels == ORGANS["vessel"])[0]
        across = max(np.count_nonzero(z == plane) for plane in np.unique(z))
        assert len(np.unique(z)) > 0.6 * labels.shape[0]  # long along z
        assert across <= 24  # and a few voxels across in every plane


def test_organs_overlap_in_intensity(cases):
    """No pair of neighbors in brightness can be told apart by a threshold, even within a case."""
    for pair in (("liver", "spleen"), ("liver", "kidney"), ("nodule", "vessel")):
        best = []
        for image, labels in cases:
            a, b = (image[labels == ORGANS[organ]] for organ in pair)
            cuts = np.quantile(np.concatenate([a, b]), np.linspace(0.02, 0.98, 49))
            right = [max((a < c).mean() + (b >= c).mean(), (a >= c).mean() + (b < c).mean()) / 2 for c in cuts]
            best.append(max(right))
        assert np.median(best) < 0.9


def test_cases_differ_in_shape_and_place(cases):
    liver = voxels(cases, "liver")
    assert liver.std() > 0.1 * liver.mean()
    centers = np.array([np.argwhere(labels == ORGANS["kidney"]).mean(0) for _, labels in cases])
    assert centers.std(0).max() > 1.0


def test_a_case_follows_from_its_seed():
    first, again, other = (make_case(np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])


def test_written_dataset_has_no_label_of_an_unlabeled_case(tmp_path):
    folder = write_dataset(tmp_path, 0, labeled=2, unlabeled=3, test=1)
    names = {sub.name: sorted(file.name for file in sub.iterdir()) for sub in folder.iterdir() if sub.is_dir()}
    assert {name: len(files) for name, files in names.items()} == {
        "imagesTr": 2,
        "labelsTr": 2,
        "imagesUn": 3,
        "imagesTs": 1,
        "labelsTs": 1,
    }
    assert len({name for sub in ("imagesTr", "imagesUn", "imagesTs") for name in names[sub]}) == 6
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 2
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr" / names["labelsTr"][0])))
    assert set(np.unique(label)) == set(ORGANS.values())
