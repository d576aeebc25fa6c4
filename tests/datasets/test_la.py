"""``nnUNetv2_ssl_dataset la`` on made-up NRRD and h5 files with the challenge's names, and on the real folder."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.raw_files import REAL, array, cases, fold, image, label, nothing_written, write

from nnunet_ssl.commands.dataset import main
from nnunet_ssl.datasets import writing
from nnunet_ssl.datasets.cases import Case
from nnunet_ssl.datasets.editing import crop_in_plane
from nnunet_ssl.datasets.la import RECIPE, SOME_TEST, TRAIN, crop
from nnunet_ssl.datasets.reading import load
from nnunet_ssl.errors import UserError

ISO = (0.625, 0.625, 0.625)
TEST = [*SOME_TEST, *(f"ZZ{number:018d}" for number in range(10))]
FEW = TRAIN[:9]


@pytest.fixture
def data(tmp_path):
    """The first nine training cases and all test cases as NRRD, labels 0 and 255; one header without a voxel size."""
    first = write(tmp_path / "Training Set" / FEW[0] / "lgemri.nrrd", image(np.uint8, 0, 255), spacing=ISO)
    truth = write(first.with_name("laendo.nrrd"), label(0, 255, 255), spacing=ISO)
    for case in FEW[1:] + TEST:
        folder = first.parent.parent / case
        folder.mkdir()
        (folder / "lgemri.nrrd").write_bytes(first.read_bytes())
        (folder / "laendo.nrrd").write_bytes(truth.read_bytes())
    write(first.parent.parent / FEW[1] / "laendo.nrrd", label(0, 255, 255), spacing=(1.0, 1.0, 1.0))
    (tmp_path / "few.txt").write_text("\n".join(FEW))
    return tmp_path


def run(data, *more):
    main(["la", "--data", str(data), "-d", "650", "--train-list", str(data / "few.txt"), *more])


def test_the_list_is_the_literatures():
    assert len(set(TRAIN)) == 80
    assert not set(TRAIN) & set(SOME_TEST)
    assert TRAIN[7] == "38CWS74285MFGZZXR09Z"
    assert TRAIN[15] == "5BHTH9RHH3PQT913I59W"


def test_the_literatures_list_has_no_other_order(data, fresh_folders):
    """Or several seeds would be one labeled set, and count as several."""
    with pytest.raises(UserError, match=r"--seed 1: the literature's list has one order, .*'order_by_seed'"):
        run(data, "--seed", "1")
    nothing_written(fresh_folders)


def test_challenge_files(data, fresh_folders):
    run(data)
    dataset = fresh_folders.raw / "Dataset650_LALabeled8"
    labeled = [f"la_{case}" for case in FEW[:8]]
    assert cases(dataset / "imagesTr") == cases(dataset / "labelsTr") == labeled
    assert cases(dataset / "imagesUn") == [f"la_{FEW[8]}"]
    assert cases(dataset / "imagesTs") == cases(dataset / "labelsTs") == sorted(f"la_{case}" for case in TEST)
    assert fold(fresh_folders, dataset.name) == {"train": labeled, "val": labeled[:5]}
    for case in labeled[:2]:
        written = sitk.ReadImage(str(dataset / "labelsTr" / f"{case}.nii.gz"))
        assert np.allclose(written.GetSpacing(), ISO)
        assert (sitk.GetArrayFromImage(written) == label(0, 1, 1)).all()
    assert (array(dataset / "imagesTr" / f"{labeled[0]}_0000.nii.gz") == image(np.uint8, 0, 255)).all()


def test_without_the_twenty_test_cases(data, fresh_folders):
    (data / "Training Set" / TEST[-1] / "lgemri.nrrd").unlink()
    with pytest.raises(UserError, match=r"holds 19 cases that are not among the 80 .* --test-list"):
        run(data)
    (data / "test.txt").write_text(TEST[0])
    run(data, "--test-list", str(data / "test.txt"))
    assert cases(fresh_folders.raw / "Dataset650_LALabeled8" / "imagesTs") == [f"la_{TEST[0]}"]


def test_missing_training_cases_are_named(data, fresh_folders):
    with pytest.raises(UserError, match=f"{TRAIN[9]}/lgemri.nrrd is missing") as error:
        main(["la", "--data", str(data), "-d", "650"])
    assert len(str(error.value).splitlines()) == 1 + 71


def test_a_truncated_nrrd_is_refused(data, fresh_folders):
    file = data / "Training Set" / FEW[8] / "lgemri.nrrd"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match=f"la_{FEW[8]}: .*lgemri.nrrd cannot be read"):
        run(data)
    assert nothing_written(fresh_folders)


def test_neither_nor_both_kinds_of_files(tmp_path, data, fresh_folders):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds neither"):
        run(data, "--data", str(tmp_path / "empty"))
    (data / "Training Set" / FEW[0] / "mri_norm2.h5").touch()
    with pytest.raises(UserError, match="holds both"):
        run(data)


def wide(shape, box):
    """A label (z, y, x) with foreground in a box."""
    content = np.zeros(shape, np.uint8)
    content[box] = 1
    return sitk.GetImageFromArray(content)


def test_crop_to_label_in_plane():
    truth = wide((3, 300, 200), np.s_[1, 150:250, 90:95])
    whole = sitk.GetImageFromArray(np.arange(truth.GetNumberOfPixels(), dtype=np.float32).reshape(3, 300, 200))
    small, cut = crop_in_plane(whole, truth, margin=(10, 20), minimum=112)
    assert small.GetSize() == cut.GetSize() == (112, 140, 3)  # x: 5 + 20 is less than 112; y: 100 + 40; z whole
    assert sitk.GetArrayViewFromImage(cut).sum() == sitk.GetArrayViewFromImage(truth).sum()
    x, y, _ = (round(value) for value in small.GetOrigin())
    assert y == 130
    assert abs((x + 56) - 92.5) <= 1  # in the middle
    assert small[0, 0, 0] == whole[x, y, 0]


@pytest.mark.parametrize("corner", [np.s_[:, :2, :2], np.s_[:, -2:, -2:]])
def test_crop_at_the_border_keeps_the_least_size(corner):
    truth = wide((2, 150, 130), corner)
    small, cut = crop_in_plane(truth, truth, margin=(10, 10), minimum=112)
    assert small.GetSize() == (112, 112, 2)
    assert sitk.GetArrayViewFromImage(cut).sum() == 8


def test_crop_of_small_images_and_empty_labels():
    truth = wide((2, 50, 130), np.s_[:, 20:22, 20:22])
    assert crop_in_plane(truth, truth, (10, 10), 112)[0].GetSize() == (112, 50, 2)
    empty = wide((2, 50, 130), np.s_[:0])
    assert crop_in_plane(empty, empty, (10, 10), 112)[0].GetSize() == (130, 50, 2)


def test_crop_is_asked_for_and_the_same_each_time(data, fresh_folders):
    content = np.zeros((3, 200, 210), np.uint8)
    content[1, 30:150, 40:170] = 255
    folder = data / "Training Set" / FEW[8]  # unlabeled
    write(folder / "laendo.nrrd", content, spacing=ISO)
    write(folder / "lgemri.nrrd", content, spacing=ISO)
    run(data, "--crop-to-label")
    dataset = fresh_folders.raw / "Dataset650_LALabeled8"
    depth, height, width = array(dataset / "imagesUn" / f"la_{FEW[8]}_0000.nii.gz").shape
    assert depth == 3
    assert 20 <= height - 120 <= 40
    assert 20 <= width - 130 <= 40
    assert not (dataset / "labelsUn").exists()
    case = Case(f"la_{FEW[8]}", "unlabeled", folder / "lgemri.nrrd", folder / "laendo.nrrd")
    assert crop(case, *load(case, RECIPE)[:2])[0].GetSize() == (width, height, depth)


def test_h5_without_h5py(data, fresh_folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    for case in FEW + TEST:
        folder = data / "Training Set" / case
        (folder / "lgemri.nrrd").rename(folder / "mri_norm2.h5")
    with pytest.raises(UserError, match="pip install h5py"):
        run(data)


def test_h5_files(data, fresh_folders):
    h5py = pytest.importorskip("h5py")
    content = image(np.float32)  # z, y, x; in the file x, y, z
    for case in FEW + TEST:
        folder = data / "Training Set" / case
        (folder / "lgemri.nrrd").unlink()
        with h5py.File(folder / "mri_norm2.h5", "w") as file:
            file["image"] = content.transpose(2, 1, 0)
            if case != FEW[8]:  # unlabeled
                file["label"] = label(0, 1, 1, dtype=np.int64).transpose(2, 1, 0)
    run(data)
    dataset = fresh_folders.raw / "Dataset650_LALabeled8"
    written = sitk.ReadImage(str(dataset / "imagesTr" / f"la_{FEW[0]}_0000.nii.gz"))
    assert np.allclose(written.GetSpacing(), ISO)
    assert np.allclose(sitk.GetArrayFromImage(written), content)
    assert (array(dataset / "labelsTs" / f"la_{TEST[0]}.nii.gz") == label(0, 1, 1)).all()
    assert cases(dataset / "imagesUn") == [f"la_{FEW[8]}"]

    with h5py.File(data / "Training Set" / FEW[0] / "mri_norm2.h5", "a") as file:
        del file["label"]
    (data / "Training Set" / FEW[1] / "mri_norm2.h5").write_bytes(b"no h5")
    with pytest.raises(UserError, match="has no 'label', only 'image'") as error:
        run(data, "-d", "651")
    assert f"{FEW[1]}/mri_norm2.h5 cannot be read" in str(error.value)


def test_a_protocol_says_which_case_is_what(tmp_path, fresh_folders):
    data, (labeled, test, unlabeled) = tmp_path / "data", TRAIN[:3]
    for case in (labeled, test, unlabeled):
        write(data / "images" / f"{case}.nii.gz", image(np.uint8, 0, 255), spacing=(1.0, 1.0, 1.0))
        write(data / "labels" / f"{case}.nii.gz", label(0, 255), spacing=(1.0, 1.0, 1.0))
    protocol = {"train": [unlabeled, labeled], "test": [test], "labelled_order": [[labeled, unlabeled]]}
    (data / "protocol.json").write_text(json.dumps(protocol))
    options = ["la", "--data", str(data), "-d", "650", "--labeled", "1"]
    with pytest.raises(UserError, match=r"protocol.json says .*: leave out --test-list and --crop-to-label"):
        main([*options, "--crop-to-label", "--test-list", "x.txt"])
    main(options)
    dataset = fresh_folders.raw / "Dataset650_LALabeled1"
    assert cases(dataset / "labelsTr") == [labeled]
    assert cases(dataset / "imagesUn") == [unlabeled]
    written = sitk.ReadImage(str(dataset / "labelsTr" / f"{labeled}.nii.gz"))
    assert written.GetSpacing() == (1, 1, 1)  # the voxel sizes of such files are taken at their word
    assert (sitk.GetArrayFromImage(written) == label(0, 1)).all()


@pytest.mark.skipif(not (REAL / "la").is_dir(), reason="the left atrium data are not beside the project")
def test_real_data(fresh_folders, monkeypatch):
    """A few cases of the real folder, with the literature's order."""
    assert [name[3:] for name in json.loads((REAL / "la" / "protocol.json").read_text())["labelled_order"][0]] == TRAIN
    checked = []
    monkeypatch.setattr(writing, "_check", lambda case, recipe: checked.append(case) or [])
    monkeypatch.setattr(writing, "_write", lambda case, recipe, target: None)
    main(["la", "--data", str(REAL / "la"), "--labeled", "16", "-d", "650"])
    assert len(checked) == 90
    assert fold(fresh_folders, "Dataset650_LALabeled16")["train"] == sorted(f"la_{case}" for case in TRAIN[:16])
    for case in (checked[0], checked[-1]):
        whole, truth, problems = load(case, RECIPE)
        assert problems == []
        assert whole.GetSize() == truth.GetSize()
        assert 0 < sitk.GetArrayViewFromImage(truth).mean() < 0.2
