"""Finding the unlabeled images by their names alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.unlabeled.find import (
    find_images,
    find_labeled,
    find_unlabeled,
    read_dataset_json,
    refuse_labeled_images,
    refuse_labeled_names,
    resolve_dataset,
)

ROOT = str(Path(__file__).resolve().parents[2])


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


def test_a_link_that_leads_nowhere_is_said_to(images_un):
    raw = images_un("a_0000.nii.gz")
    os.symlink("nowhere", f"{raw}/imagesUn/b_0000.nii.gz")
    with pytest.raises(UserError, match=r"b_0000.nii.gz: the link leads nowhere, because .*imagesUn/nowhere does not"):
        find_unlabeled(raw, dataset_json())


def test_hidden_names_are_no_images(images_un):
    """macOS puts ``._x`` beside each ``x``; ``._0000.nii.gz`` would be a case of the name ``.``."""
    raw = images_un("a_0000.nii.gz", "._a_0000.nii.gz", "._0000.nii.gz", ".._0000.nii.gz", "lock_0000.nii.gz")
    assert list(find_unlabeled(raw, dataset_json())) == ["a", "lock"]


@pytest.mark.parametrize("name", [b"un_\xe9_0000.nii.gz", b"tab\t_0000.nii.gz"])
def test_names_that_libraries_cannot_take_are_refused(images_un, name):
    """ITK ends the interpreter at bytes that are not UTF-8."""
    raw = images_un("a_0000.nii.gz")
    with open(os.path.join(os.fsencode(raw), b"imagesUn", name), "wb"):
        pass
    with pytest.raises(UserError, match=r"imagesUn: file '.*_0000.nii.gz' (is not UTF-8|has characters)"):
        find_unlabeled(raw, dataset_json())


def test_a_folder_that_libraries_cannot_take_is_refused(tmp_path):
    folder = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xe9"))
    os.mkdir(folder)
    with pytest.raises(UserError, match="no UTF-8"):
        find_images(folder, ".nii.gz")


def test_where_the_locale_has_no_accents_it_is_a_sentence(images_un):
    """Python keeps such a name as bytes that it cannot decode, and ITK aborts."""
    raw = images_un("é_0000.nii.gz")
    code = f"from nnunet_ssl.unlabeled.find import find_unlabeled; find_unlabeled({raw!r}, {dataset_json()})"
    command = [sys.executable, "-X", "utf8=0", "-c", code]
    variables = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": ROOT}
    process = subprocess.run(command, env=variables, capture_output=True, encoding="utf-8")
    assert process.returncode == 1
    assert "PYTHONUTF8=1" in process.stderr
    assert "Traceback" not in process.stderr


def test_names_of_labeled_cases(images_un):
    unlabeled = find_unlabeled(images_un("a_0000.nii.gz", "b_0000.nii.gz"), dataset_json())
    refuse_labeled_names(unlabeled, ["c"])
    with pytest.raises(UserError, match=r"imagesUn/b_0000.nii.gz: b is also a labeled"):
        refuse_labeled_names(unlabeled, ["b", "c"])


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_to_a_labeled_image_is_refused_whatever_its_name(images_un, link):
    raw = images_un("a_0000.nii.gz")
    os.makedirs(f"{raw}/imagesTr")
    for name in ("x", "y"):
        open(f"{raw}/imagesTr/{name}_0000.nii.gz", "w").close()
    labeled = find_labeled(raw, dataset_json())
    refuse_labeled_images(find_unlabeled(raw, dataset_json()), labeled)
    link(f"{raw}/imagesTr/y_0000.nii.gz", f"{raw}/imagesUn/b_0000.nii.gz")
    with pytest.raises(UserError, match=r"imagesUn/b_0000.nii.gz is the image of y, a labeled"):
        refuse_labeled_images(find_unlabeled(raw, dataset_json()), labeled)


def test_labeled_cases_that_dataset_json_lists(tmp_path):
    listed = {**dataset_json(), "dataset": {"x": {"images": ["there/one.nii.gz"], "label": "there/two.nii.gz"}}}
    assert find_labeled(str(tmp_path), listed) == {"x": [f"{tmp_path}/there/one.nii.gz"]}
    assert find_labeled(str(tmp_path), dataset_json()) == {}


@pytest.mark.parametrize("listed", [{"../x": {"images": ["a"]}}, {"x": {}}, {"x": ["a"]}, {"x": {"images": [1]}}])
def test_a_list_of_cases_that_leads_elsewhere_is_refused(tmp_path, listed):
    with pytest.raises(UserError, match=r"dataset\.json: "):
        find_labeled(str(tmp_path), {**dataset_json(), "dataset": listed})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ('{"channel_names": {"0": "CT"}}', "file_ending None"),
        ('{"channel_names": {"0": "CT"}, "file_ending": "/../x"}', "file_ending '/../x'"),
        ('{"file_ending": ".nii.gz"}', "has no channel_names"),
    ],
)
def test_a_dataset_json_that_is_none(tmp_path, content, says):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=says):
        read_dataset_json(str(tmp_path))


def test_a_dataset_that_is_not_there(fresh_folders):
    with pytest.raises(UserError, match=r"dataset 77: .*nnUNet_raw="):
        resolve_dataset("77")
    with pytest.raises(UserError, match="dataset seven:"):
        resolve_dataset("seven")
    (fresh_folders.raw / "Dataset077_X").mkdir()
    assert resolve_dataset("77") == resolve_dataset(77) == resolve_dataset("Dataset077_X") == "Dataset077_X"
