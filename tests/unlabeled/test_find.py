"""Finding the unlabelled images by their names alone."""

from __future__ import annotations

import os

import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.unlabeled.find import find_labeled, find_unlabeled, refuse_labeled_names, resolve_dataset


@pytest.fixture
def images_un(tmp_path):
    """Makes ``imagesUn`` with empty files of the given names, and gives back the raw dataset's folder."""

    def make(*names: str) -> str:
        folder = tmp_path / "imagesUn"
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        return str(tmp_path)

    return make


def dataset_json(channels: int = 1, ending: str = ".nii.gz") -> dict:
    return {"channel_names": {str(i): "CT" for i in range(channels)}, "file_ending": ending}


def test_cases_and_channels_in_order(images_un):
    raw = images_un("b_0001.nii.gz", "b_0000.nii.gz", "a_1_0000.nii.gz", "a_1_0001.nii.gz", ".DS_Store")
    assert find_unlabeled(raw, dataset_json(2)) == {
        "a_1": [f"{raw}/imagesUn/a_1_0000.nii.gz", f"{raw}/imagesUn/a_1_0001.nii.gz"],
        "b": [f"{raw}/imagesUn/b_0000.nii.gz", f"{raw}/imagesUn/b_0001.nii.gz"],
    }


def test_one_file_may_hold_all_channels(images_un):
    """4D images and RGB pictures do; how many they hold shows when they are read."""
    raw = images_un("a_0000.png", "b_0000.png")
    assert list(find_unlabeled(raw, dataset_json(3, ".png"))) == ["a", "b"]


def test_the_spacing_files_of_nnunets_tiff_reader_are_no_images(images_un):
    raw = images_un("a_0000.tif", "a.json")
    assert list(find_unlabeled(raw, dataset_json(1, ".tif"))) == ["a"]


@pytest.mark.parametrize(
    ("names", "channels", "told"),
    [
        (["a_0000.nii.gz", "b_0000.nii.gz", "c_0000.nii", "d.json"], 1, r"c_0000.nii \(and 1 more\) is not an image"),
        (["a_0000.nii.gz", "a_0002.nii.gz"], 2, "case a has the channel files a_0000.nii.gz, a_0002.nii.gz"),
        (["a_0001.nii.gz"], 2, "case a has the channel files a_0001.nii.gz"),
        (["a_0000.nii.gz", "a_0001.nii.gz"], 3, "dataset.json names 3"),
        (["a_seg_0000.nii.gz"], 1, "case names that end in _seg"),
    ],
)
def test_other_names_are_refused(images_un, names, channels, told):
    with pytest.raises(UserError, match=told):
        find_unlabeled(images_un(*names), dataset_json(channels))


def test_a_link_that_leads_nowhere_is_no_image(images_un):
    raw = images_un("a_0000.nii.gz")
    os.symlink("nowhere", f"{raw}/imagesUn/b_0000.nii.gz")
    with pytest.raises(UserError, match=r"b_0000.nii.gz is not an image"):
        find_unlabeled(raw, dataset_json())


def test_names_of_labeled_cases(images_un):
    unlabeled = find_unlabeled(images_un("a_0000.nii.gz", "b_0000.nii.gz"), dataset_json())
    refuse_labeled_names(unlabeled, ["c"])
    with pytest.raises(UserError, match=r"imagesUn/b_0000.nii.gz: b is also a labelled"):
        refuse_labeled_names(unlabeled, ["b", "c"])


def test_labeled_cases_that_dataset_json_lists(tmp_path):
    listed = {**dataset_json(), "dataset": {"x": {"images": ["there/one.nii.gz"], "label": "there/two.nii.gz"}}}
    assert find_labeled(str(tmp_path), listed) == {"x": [f"{tmp_path}/there/one.nii.gz"]}
    assert find_labeled(str(tmp_path), dataset_json()) == {}


def test_a_dataset_that_is_not_there(fresh_folders):
    with pytest.raises(UserError, match=r"dataset 77: .*nnUNet_raw="):
        resolve_dataset("77")
    with pytest.raises(UserError, match="dataset seven:"):
        resolve_dataset("seven")
    (fresh_folders.raw / "Dataset077_X").mkdir()
    assert resolve_dataset("77") == resolve_dataset(77) == resolve_dataset("Dataset077_X") == "Dataset077_X"
