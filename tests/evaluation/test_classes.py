"""What is evaluated: from dataset.json wherever it lies, or from the labels themselves."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.label_maps import write_dataset
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.classes import read_dataset

REGIONS = {
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": 3, "ignore": 4},
    "regions_class_order": [1, 2, 3],
}


@pytest.mark.parametrize("place", ["beside the truth", "in it", "with the predictions", "named"])
def test_dataset_json_is_found(tmp_path, place):
    truth = write_dataset(tmp_path / "data")
    new = {"in it": truth, "with the predictions": tmp_path / "data" / "a", "named": tmp_path}.get(place)
    file = tmp_path / "data" / "dataset.json"
    if new:
        file = shutil.move(file, new / "dataset.json")
    dataset = read_dataset(str(truth), [str(tmp_path / "data" / "a")], str(file) if place == "named" else None)
    assert dataset.classes == {1: "one", 2: "two", 3: "three"}
    assert dataset.ignore_label is None
    assert (dataset.file_ending, dataset.reader) == (".nii.gz", SimpleITKIO)


def test_without_dataset_json_the_labels_that_occur_are_the_classes(tmp_path, capsys):
    truth = write_dataset(tmp_path)
    (tmp_path / "dataset.json").unlink()
    dataset = read_dataset(str(truth), [str(tmp_path / "a")])
    assert dataset.classes == {1: "1", 2: "2", 3: "3"}
    assert "No dataset.json" in capsys.readouterr().out


def test_regions_and_ignore_label(tmp_path):
    dataset = read_dataset(str(write_dataset(tmp_path, **REGIONS)), [])
    assert dataset.classes == {(1, 2, 3): "whole", (2, 3): "core", 3: "tip"}
    assert dataset.ignore_label == 4


def test_png(tmp_path):
    dataset = read_dataset(str(write_dataset(tmp_path, ending=".png")), [])
    assert (dataset.file_ending, dataset.reader) == (".png", NaturalImage2DIO)


def test_groups_by_label_and_by_name(tmp_path):
    truth = write_dataset(tmp_path, class_groups={"Large": [1, "two"], "Small": [3]})
    assert read_dataset(str(truth), []).groups == {"Large": (1, 2), "Small": (3,)}


def test_a_list_of_one_label_is_that_label_unless_there_are_regions(tmp_path):
    """As nnU-Net has it; with regions its summary.json calls it (3,)."""
    truth = write_dataset(tmp_path)
    file = tmp_path / "dataset.json"
    content = {"labels": {"background": 0, "liver": [1], "spleen": 2}, "file_ending": ".nii.gz",
               "class_groups": {"Large": ["liver", [2]]}}  # fmt: skip
    file.write_text(json.dumps(content))
    dataset = read_dataset(str(truth), [str(tmp_path / "a")])
    assert dataset.classes == {1: "liver", 2: "spleen"}
    assert dataset.groups == {"Large": (1, 2)}
    content["labels"] = {"background": 0, "whole": [1, 2, 3], "tip": [3]}
    file.write_text(json.dumps({**content, "regions_class_order": [1, 3], "class_groups": {"All": ["whole", [3]]}}))
    assert read_dataset(str(truth), [str(tmp_path / "a")]).groups == {"All": ((1, 2, 3), (3,))}


def test_groups_of_regions(tmp_path):
    truth = write_dataset(tmp_path, class_groups={"Both": [[1, 2, 3], "core"]}, **REGIONS)
    assert read_dataset(str(truth), []).groups == {"Both": ((1, 2, 3), (2, 3))}


@pytest.mark.parametrize("wrapped", [True, False])
def test_groups_from_a_file_go_before_those_of_dataset_json(tmp_path, wrapped):
    truth = write_dataset(tmp_path, class_groups={"Large": [1]})
    groups = {"Other": [2, 3]}
    (tmp_path / "groups.json").write_text(json.dumps({"class_groups": groups} if wrapped else groups))
    assert read_dataset(str(truth), [], groups=str(tmp_path / "groups.json")).groups == {"Other": (2, 3)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"class_groups": {"Large": [9]}}, "group Large names 9, which is not a class"),
        ({"class_groups": {"Large": ["liver"]}}, "group Large names 'liver', which is not a class"),
        ({"class_groups": {"Large": []}}, "must be written as"),
        ({"class_groups": [1, 2]}, "must be written as"),
        ({"labels": {"one": 1}}, "does not accept its labels"),
        ({"class_groups": {"Large": [1.5]}}, "group Large names 1.5, which is not a class"),
        ({"class_groups": {"Large": [None]}}, "group Large names None, which is not a class"),
        ({"class_groups": {"Large": [{"one": 1}]}}, "which is not a class"),
        ({"labels": {"background": 0}}, "no label except the background"),
        ({"labels": {"background": 0, "one": -1}}, "does not accept its labels .*between 0 and 65535"),
        ({"labels": {"background": 0, "one": 10**400}}, "does not accept its labels"),
        ({"labels": {"background": 0, "one": "first"}}, "does not accept its labels"),
        ({"labels": ["background", "one"]}, "has a list under 'labels', not an object"),
        ({"labels": {"background": 0, "all": [1, 2], "two": 2}, "regions_class_order": 1}, "does not accept"),
        ({"file_ending": ""}, "file_ending '' is no file ending"),
        ({"file_ending": 7}, "has a whole number under 'file_ending', not a text"),
        ({"overwrite_image_reader_writer": ["SimpleITKIO"]}, "no reader that can read"),
        ({"overwrite_image_reader_writer": "np"}, "no reader"),
    ],
)
def test_what_dataset_json_must_not_say(tmp_path, content, message):
    truth = write_dataset(tmp_path, **content)
    with pytest.raises(UserError, match=message):
        read_dataset(str(truth), [])


def test_broken_or_wrong_files_are_named(tmp_path):
    truth = str(write_dataset(tmp_path))
    (tmp_path / "plans.json").write_text('{"plans_name": "x"}')
    with pytest.raises(UserError, match=r"plans\.json has nothing under 'labels', .* with -djfile"):
        read_dataset(truth, [], str(tmp_path / "plans.json"))
    with pytest.raises(UserError, match="nowhere cannot be read"):
        read_dataset(str(tmp_path / "nowhere"), [], str(tmp_path / "dataset.json"))


@pytest.mark.parametrize("option", ["dataset_json", "groups"])
def test_damaged_json_is_named_with_the_option(tmp_path, option):
    truth = str(write_dataset(tmp_path))
    file = tmp_path / "given.json"
    file.write_text("[1]")
    with pytest.raises(UserError, match=r"given\.json holds a list.* with -(djfile|-groups)"):
        read_dataset(truth, [], **{option: str(file)})


def test_declared_labels(tmp_path):
    assert read_dataset(str(write_dataset(tmp_path / "plain")), []).declared == {0, 1, 2, 3}
    assert read_dataset(str(write_dataset(tmp_path / "regions", **REGIONS)), []).declared == {0, 1, 2, 3, 4}
    truth = write_dataset(tmp_path / "none")
    (tmp_path / "none" / "dataset.json").unlink()
    assert read_dataset(str(truth), []).declared == {0, 1, 2, 3}


def test_a_file_name_that_cannot_be_printed(tmp_path):
    truth = write_dataset(tmp_path, num_cases=1)
    (truth / "case_0.nii.gz").rename(truth / "case\n0.nii.gz")
    with pytest.raises(UserError, match=r"labels: file 'case\\n0\.nii\.gz'"):
        read_dataset(str(truth), [])


def test_folder_without_label_maps(tmp_path):
    truth = write_dataset(tmp_path)
    for file in truth.iterdir():
        file.rename(truth / f".{file.name}")  # hidden files are none
    with pytest.raises(UserError, match=r"holds no \.nii\.gz file"):
        read_dataset(str(truth), [])


def test_truth_that_no_reader_can_read(tmp_path):
    truth = write_dataset(tmp_path, num_cases=1)
    (truth / "case_0.nii.gz").write_text("no image")
    with pytest.raises(UserError, match="no reader that can read"):
        read_dataset(str(truth), [])
