"""``scripts/prepare_hippocampus.py`` on a made-up folder of the same layout, and on the real one where it is there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from prepare_hippocampus import main
from raw_files import REAL

from nnunet_ssl.errors import UserError

TRAIN, TEST = [f"case_{i}" for i in range(6)], ["test_0", "test_1"]


@pytest.fixture
def data(tmp_path):
    """Eight cases and two orders."""
    folder = tmp_path / "data"
    rng = np.random.default_rng(0)
    for sub in ("images", "labels"):
        (folder / sub).mkdir(parents=True)
    for case in TRAIN + TEST:
        image = rng.normal(size=(6, 7, 8)).astype(np.float32)
        label = rng.integers(0, 3, image.shape).astype(np.float32)
        sitk.WriteImage(sitk.GetImageFromArray(image), str(folder / "images" / f"{case}.nii.gz"))
        sitk.WriteImage(sitk.GetImageFromArray(label), str(folder / "labels" / f"{case}.nii.gz"))
    protocol = {"train": TRAIN, "test": TEST, "labelled_order": [TRAIN, TRAIN[::-1]]}
    (folder / "protocol.json").write_text(json.dumps(protocol))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(file.name.replace("_0000", "").removesuffix(".nii.gz") for file in folder.iterdir())


def test_first_cases_of_the_order_keep_their_labels(data, fresh_folders):
    main(["--data", str(data), "--seed", "1", "--labeled", "2", "-d", "640"])
    dataset = fresh_folders.raw / "Dataset640_HippocampusSeed1Labeled2"
    assert names(dataset / "imagesTr") == names(dataset / "labelsTr") == ["case_4", "case_5"]
    assert names(dataset / "imagesUn") == ["case_0", "case_1", "case_2", "case_3"]
    assert names(dataset / "imagesTs") == names(dataset / "labelsTs") == TEST
    splits = json.loads((fresh_folders.preprocessed / dataset.name / "splits_final.json").read_text())
    assert splits == [{"train": ["case_4", "case_5"], "val": ["case_4", "case_5"]}]
    label = sitk.ReadImage(str(dataset / "labelsTr" / "case_4.nii.gz"))
    assert label.GetPixelID() == sitk.sitkUInt8


def test_all_labels(data, fresh_folders):
    main(["--data", str(data), "--labeled", "all", "-d", "649"])
    dataset = fresh_folders.raw / "Dataset649_HippocampusAllLabels"
    assert names(dataset / "labelsTr") == TRAIN
    assert not (dataset / "imagesUn").exists()


def truncate(data):
    file = data / "images" / "case_3.nii.gz"
    file.write_bytes(file.read_bytes()[:100])


def other_label(data):
    file = data / "labels" / "test_1.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(np.full((6, 7, 8), 7, np.float32)), str(file))


def not_finite(data):
    sitk.WriteImage(
        sitk.GetImageFromArray(np.full((6, 7, 8), np.nan, np.float32)), str(data / "images" / "case_0.nii.gz")
    )


def other_size(data):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((6, 7, 9), np.float32)), str(data / "labels" / "case_1.nii.gz"))


def order_with_a_stranger(data):
    protocol = json.loads((data / "protocol.json").read_text())
    protocol["labelled_order"][0][0] = "stranger"
    (data / "protocol.json").write_text(json.dumps(protocol))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "case_3: .*cannot be read"),
        (other_label, r"test_1: the label holds \[7\]"),
        (not_finite, "case_0: the image holds NaN"),
        (other_size, "case_1: image and label differ"),
        (lambda data: (data / "labels" / "case_1.nii.gz").unlink(), r"case_1.nii.gz is missing"),
        (order_with_a_stranger, "order 0"),
    ],
    ids=["truncated", "foreign label", "NaN", "size", "missing", "order"],
)
def test_nothing_is_written_where_a_file_is_wrong(data, fresh_folders, harm, message):
    harm(data)
    with pytest.raises(UserError, match=message):
        main(["--data", str(data), "--labeled", "2", "-d", "640"])
    assert list(fresh_folders.raw.iterdir()) == list(fresh_folders.preprocessed.iterdir()) == []


@pytest.mark.parametrize("labeled", ["0", "6", "some"])
def test_impossible_numbers_of_labels(data, fresh_folders, labeled):
    with pytest.raises(UserError, match=f"--labeled {labeled}"):
        main(["--data", str(data), "--labeled", labeled, "-d", "640"])


def test_an_id_is_not_taken_twice(data, fresh_folders):
    main(["--data", str(data), "--labeled", "2", "-d", "640"])
    with pytest.raises(UserError, match="Dataset640_HippocampusSeed0Labeled2 exists"):
        main(["--data", str(data), "--labeled", "3", "-d", "640"])


def test_labels_of_unlabelled_cases_are_not_opened(data, fresh_folders):
    (data / "labels" / "case_3.nii.gz").unlink()
    (data / "labels" / "case_4.nii.gz").write_bytes(b"not a label")
    main(["--data", str(data), "--labeled", "2", "-d", "640"])


@pytest.mark.skipif(not (REAL / "hippocampus").is_dir(), reason="the hippocampus data are not beside the project")
def test_real_data(fresh_folders):
    main(["--data", str(REAL / "hippocampus"), "--seed", "2", "-d", "640"])
    dataset = fresh_folders.raw / "Dataset640_HippocampusSeed2Labeled5"
    count = {sub: len(list((dataset / sub).iterdir())) for sub in ("imagesTr", "labelsTr", "imagesUn", "imagesTs")}
    assert count == {"imagesTr": 5, "labelsTr": 5, "imagesUn": 155, "imagesTs": 40}
