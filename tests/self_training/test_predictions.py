"""How a teacher's predictions are kept, and the dataset that is made of them."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from batchgenerators.utilities.file_and_folder_operations import save_pickle
from helpers.damage import JSON_DAMAGE
from helpers.datasets import TinyDataset
from matplotlib.image import imread
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.errors import UserError
from nnunet_ssl.self_training.confidence import Measured
from nnunet_ssl.self_training.dataset import draw_scores, read_source, write_pseudolabeled, write_report
from nnunet_ssl.self_training.predictions import Predictions
from nnunet_ssl.unlabeled.find import find_unlabeled

TEACHER = {"fold": "0", "checkpoint": ["checkpoint_final.pth", 1, 2, "digest"]}
CERTAINTY = {"un_00": 0.95, "un_01": 0.7, "un_02": 0.92, "un_03": 0.8}


# ---------------------------------------------------------------------- predictions


@pytest.fixture
def dataset(tiny_copy) -> TinyDataset:
    """Of its five labeled cases one validates, and one is in neither part of the fold."""
    dataset = tiny_copy("3d")
    splits = [{"train": ["tr_02", "tr_00", "tr_01"], "val": ["tr_03"]}]
    (dataset.preprocessed / "splits_final.json").write_text(json.dumps(splits))
    return dataset


def predict(dataset: TinyDataset, folder: Path, case: str, certainty: float) -> None:
    """Write what ``nnUNetv2_predict --save_probabilities`` leaves of a case: here the same certainty everywhere."""
    reader = SimpleITKIO()
    image, properties = reader.read_images([str(dataset.raw / "imagesUn" / f"{case}_0000.nii.gz")])
    labels = np.zeros(image.shape[1:], np.uint8)
    labels[4:10, 5:15] = 1
    labels[6:8, 8:12] = 2
    probabilities = np.full((3, *labels.shape), (1 - certainty) / 2, np.float32)
    np.put_along_axis(probabilities, labels[None].astype(int), certainty, 0)
    np.savez_compressed(folder / f"{case}.npz", probabilities=probabilities)
    (folder / f"{case}.pkl").write_bytes(b"")
    reader.write_seg(labels, str(folder / f"{case}.nii.gz"), properties)


def predictions_of(dataset: TinyDataset, folder: Path, teacher: dict = TEACHER) -> Predictions:
    return Predictions(str(folder), teacher, find_unlabeled(str(dataset.raw), dataset.dataset_json), ".nii.gz")


def collect(dataset: TinyDataset, predictions: Predictions) -> None:
    predictions.collect(PlansManager(dataset.plans), dataset.dataset_json)


@pytest.fixture
def predicted(dataset, tmp_path) -> Predictions:
    predictions = predictions_of(dataset, tmp_path / "predicted")
    predictions.begin()
    for case, certainty in CERTAINTY.items():
        predict(dataset, tmp_path / "predicted", case, certainty)
    collect(dataset, predictions)
    return predictions


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_predictions_are_measured_and_kept_without_their_probabilities(dataset, predicted, tmp_path):
    confidences = {case: measured.confidence for case, measured in predicted.measured.items()}
    assert confidences == pytest.approx(CERTAINTY)
    assert files_in(tmp_path / "predicted") == {"confidences.json", *(f"{case}.nii.gz" for case in CERTAINTY)}
    again = predictions_of(dataset, tmp_path / "predicted")
    assert again.missing() == []
    assert again.measured == predicted.measured


def votes_on(dataset: TinyDataset, folder: Path, certainty: float) -> dict[str, str]:
    """What an atlas says: the label of ``predict``, one voxel on, with this certainty."""
    folder.mkdir()
    for case in CERTAINTY:
        predict(dataset, folder, case, certainty)
        with np.load(folder / f"{case}.npz") as archive:
            moved = np.roll(archive["probabilities"], 1, -2).astype(np.float16)
        np.savez_compressed(folder / f"{case}.npz", probabilities=moved)
        _, properties = SimpleITKIO().read_images([str(dataset.raw / "imagesUn" / f"{case}_0000.nii.gz")])
        save_pickle(properties, str(folder / f"{case}.pkl"))
    return {case: str(folder / case) for case in CERTAINTY}


@pytest.mark.parametrize("network", [True, False])
def test_two_teachers_give_the_mean_of_their_probabilities(dataset, tmp_path, network):
    votes = votes_on(dataset, tmp_path / "votes", 0.9)
    folder = tmp_path / "predicted"
    predictions = predictions_of(dataset, folder)
    predictions.begin()
    for case, certainty in CERTAINTY.items():
        if network:
            predict(dataset, folder, case, certainty)
    said = {}
    for case in CERTAINTY:
        teachers = []
        for place in [tmp_path / "votes", *([folder] if network else [])]:
            with np.load(place / f"{case}.npz") as archive:
                teachers.append(archive["probabilities"].astype(float))
        said[case] = teachers
    predictions.collect(PlansManager(dataset.plans), dataset.dataset_json, votes, network)

    assert files_in(folder) == {"confidences.json", *(f"{case}.nii.gz" for case in CERTAINTY)}
    for case, teachers in said.items():
        mean = np.mean(teachers, 0)
        label, _ = SimpleITKIO().read_seg(str(folder / f"{case}.nii.gz"))
        np.testing.assert_array_equal(label[0], mean.argmax(0))
        measured = predictions.measured[case]
        shell = mean.argmax(0) == 1
        assert measured.probability["shell"] == pytest.approx(mean[1][shell].mean(), abs=1e-3)
        maps = [teacher.argmax(0) for teacher in teachers]
        expected = [2 * ((maps[0] == k) & (maps[-1] == k)).sum() / sum((m == k).sum() for m in (maps[0], maps[-1]))
                    for k in (1, 2)]  # fmt: skip
        assert measured.dice == (
            dict(zip(("shell", "core"), map(pytest.approx, expected), strict=True)) if network else {}
        )
    again = predictions_of(dataset, folder)
    assert again.missing() == []
    assert again.measured == predictions.measured


@pytest.mark.parametrize("regions", [False, True])
def test_where_no_atlas_votes_the_network_decides(dataset, tmp_path, regions):
    """As under an ignore label of all atlases: silence is not a vote for background, nor disagreement."""
    dataset_json = dataset.dataset_json
    if regions:
        labels = {"background": 0, "whole": [1, 2], "core": 2}
        dataset_json |= {"labels": labels, "regions_class_order": [1, 2]}
    votes, folder = votes_on(dataset, tmp_path / "votes", 0.9), tmp_path / "predicted"
    predictions = predictions_of(dataset, folder)
    predictions.begin()
    for case, certainty in CERTAINTY.items():
        predict(dataset, folder, case, certainty)
        for place in (tmp_path / "votes", folder):  # the atlas sees the upper half alone, and agrees there
            with np.load(folder / f"{case}.npz") as archive:
                said = archive["probabilities"].copy()
            if place != folder:
                said[:, :7] = 0
            elif regions:
                said = np.stack([said[1] + said[2], said[2]])
            np.savez_compressed(place / f"{case}.npz", probabilities=said)
    predictions.collect(PlansManager(dataset.plans), dataset_json, votes)
    for case, certainty in CERTAINTY.items():
        label, _ = SimpleITKIO().read_seg(str(folder / f"{case}.nii.gz"))
        expected = np.zeros_like(label[0])
        expected[4:10, 5:15], expected[6:8, 8:12] = 1, 2
        np.testing.assert_array_equal(label[0], expected)
        assert predictions.measured[case].agreement == 1
        assert predictions.measured[case].confidence == pytest.approx(certainty, abs=0.2 if regions else 1e-3)


@pytest.mark.parametrize("ignore", [False, True])
def test_where_nobody_says_anything_nothing_is_learned_if_it_can_be_said(dataset, tmp_path, ignore):
    dataset_json = dataset.dataset_json
    if ignore:
        dataset_json["labels"] = {"background": 0, "shell": 1, "core": 2, "ignore": 3}
    votes, folder = votes_on(dataset, tmp_path / "votes", 0.9), tmp_path / "predicted"
    for case in CERTAINTY:
        with np.load(tmp_path / "votes" / f"{case}.npz") as archive:
            said = archive["probabilities"].copy()
        said[:, :7] = 0
        np.savez_compressed(tmp_path / "votes" / f"{case}.npz", probabilities=said)
    predictions = predictions_of(dataset, folder)
    predictions.begin()
    predictions.collect(PlansManager(dataset.plans), dataset_json, votes, network=False)
    for case in CERTAINTY:
        label, _ = SimpleITKIO().read_seg(str(folder / f"{case}.nii.gz"))
        assert (label[0, :7] == (3 if ignore else 0)).all()
        np.testing.assert_array_equal(label[0, 7:], said[:, 7:].argmax(0))


def test_the_dataset_holds_what_two_teachers_agree_on(dataset, predicted, tmp_path):
    for case, dice in (("un_00", 0.1), ("un_01", 0.9), ("un_02", 0.0), ("un_03", 0.6)):
        predicted.measured[case] = predicted.measured[case]._replace(dice={"shell": dice, "core": dice})
    source = read_source(dataset.name, "0")
    write_pseudolabeled("Dataset960_X", source, predicted, 0.6, None, {}, by="agreement", finish=True)
    folder = dataset.folders.raw / "Dataset960_X"
    assert json.loads((folder / "ssl_pseudolabel.json").read_text())["pseudo_labeled"] == ["un_01", "un_03"]
    folds = json.loads((folder / "splits_final.json").read_text())
    assert folds[1] == {"train": source.labeled, "val": source.validation}  # to finish on
    assert folds[0]["train"] == sorted([*source.labeled, "un_01", "un_03"])
    with open(folder / "pseudolabels.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["case"], row["agreement"], row["kept"]) for row in rows] == [
        ("un_01", "0.9000", "yes"), ("un_03", "0.6000", "yes"), ("un_00", "0.1000", "no"), ("un_02", "0.0000", "no"),
    ]  # fmt: skip
    assert rows[0]["agreement_core"] == "0.9000"
    assert rows[0]["confidence"] == "0.7000"
    with pytest.raises(UserError, match=r"agree most on un_01, with 0\.900\. Lower --min-agreement, or use"):
        write_pseudolabeled("Dataset961_X", source, predicted, 0.95, None, {}, by="agreement")


def test_several_folds_are_one_teacher(dataset):
    """Who has trained one of them validates nothing."""
    splits = dataset.preprocessed / "splits_final.json"
    folds = [(["tr_00", "tr_01"], ["tr_02", "tr_03"]), (["tr_01", "tr_02"], ["tr_00", "tr_03"]), (["tr_03"], ["tr_00"])]
    splits.write_text(json.dumps([{"train": train, "val": val} for train, val in folds]))
    source = read_source(dataset.name, "0", "1")
    assert source.labeled == ["tr_00", "tr_01", "tr_02"]
    assert source.validation == ["tr_03"]
    source = read_source(dataset.name, "0", "1", "2")
    assert source.labeled == source.validation == ["tr_00", "tr_01", "tr_02", "tr_03"]  # nobody is left


def test_what_a_kill_has_cut_off_is_predicted_again(dataset, tmp_path):
    folder = tmp_path / "predicted"
    predictions = predictions_of(dataset, folder)
    predictions.begin()
    for case in ("un_00", "un_01", "un_02"):
        predict(dataset, folder, case, 0.9)
    for file in (folder / "un_00.nii.gz", folder / "un_01.npz"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    predictions = predictions_of(dataset, folder)
    predictions.begin()
    collect(dataset, predictions)
    assert predictions.missing() == ["un_00", "un_01", "un_03"]
    assert predictions.missing(1, 2) == ["un_01", "un_03"]
    assert files_in(folder) == {"confidences.json", "un_02.nii.gz"}


def test_another_teacher_and_another_image_make_predictions_stale(dataset, predicted, tmp_path):
    folder = tmp_path / "predicted"
    image = dataset.raw / "imagesUn" / "un_01_0000.nii.gz"
    image.write_bytes(image.read_bytes()[::-1])
    (folder / "un_03.nii.gz").unlink()
    again = predictions_of(dataset, folder)
    assert again.missing() == ["un_01", "un_03"]
    assert "un_01.nii.gz" in files_in(folder)  # looking changes nothing
    again.begin()
    assert files_in(folder) == {"confidences.json", "un_00.nii.gz", "un_02.nii.gz"}
    assert predictions_of(dataset, folder).missing() == ["un_01", "un_03"]

    other = predictions_of(dataset, folder, {**TEACHER, "checkpoint": ["checkpoint_final.pth", 1, 2, "another"]})
    assert other.missing() == sorted(CERTAINTY)
    other.begin()
    assert files_in(folder) == {"confidences.json"}
    assert predictions_of(dataset, folder, None).missing() == sorted(CERTAINTY)  # a teacher that is yet to come


def test_copies_are_the_same_and_are_read_once(dataset, predicted, tmp_path, monkeypatch):
    """``cp -r`` and ``tar`` change times alone."""
    folder = tmp_path / "predicted"
    for file in [*(dataset.raw / "imagesUn").iterdir(), *folder.iterdir()]:
        os.utime(file, ns=(1, 1))
    copied = {**TEACHER, "checkpoint": ["checkpoint_final.pth", 1, 99, "digest"]}
    again = predictions_of(dataset, folder, copied)
    assert again.missing() == []
    again.save()
    for file in (dataset.raw / "imagesUn").iterdir():  # of the same size and time: nobody looks
        file.write_bytes(file.read_bytes()[::-1])
        os.utime(file, ns=(1, 1))
    assert predictions_of(dataset, folder, copied).missing() == []


def test_a_foreign_record_removes_nothing_elsewhere(dataset, predicted, tmp_path):
    """Names in ``confidences.json`` become paths of files that are removed."""
    folder = tmp_path / "predicted"
    mine = [tmp_path / "mine.nii.gz", tmp_path / "mine.npz"]
    for file in mine:
        file.write_text("mine")
    content = json.loads((folder / "confidences.json").read_text())
    for name in ("../mine", str(tmp_path / "mine")):
        content["images"][name] = content["images"]["un_00"]
        (folder / "confidences.json").write_text(json.dumps(content))
        predictions_of(dataset, folder).begin()
        assert all(file.is_file() for file in mine)


@pytest.mark.parametrize("damaged", JSON_DAMAGE)
def test_a_damaged_record_means_that_predictions_are_made_again(dataset, predicted, tmp_path, damaged):
    JSON_DAMAGE[damaged](tmp_path / "predicted" / "confidences.json")
    again = predictions_of(dataset, tmp_path / "predicted")
    assert again.missing() == sorted(CERTAINTY)
    again.begin()


# ---------------------------------------------------------------------- the dataset


def content(folder: Path) -> dict[str, bytes]:
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and not f.name.endswith("-lock"))
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("copy", [False, True])
def test_the_dataset_holds_true_and_predicted_labels(dataset, predicted, tmp_path, copy):
    for case in CERTAINTY:  # labels that nobody can open without waiting for ever
        os.mkfifo(dataset.raw / "labelsTr" / f"{case}.nii.gz")
    source = read_source(dataset.name, "0")
    made_with = {"source": dataset.name, "min_confidence": 0.9}
    split = write_pseudolabeled("Dataset960_Tiny_pseudo1", source, predicted, 0.9, None, made_with, copy)

    folder = dataset.folders.raw / "Dataset960_Tiny_pseudo1"
    true, kept, rest = ["tr_00", "tr_01", "tr_02", "tr_03"], ["un_00", "un_02"], ["un_01", "un_03"]
    written = content(folder)
    expected = {f"imagesTr/{case}_0000.nii.gz" for case in true + kept}
    expected |= {f"labelsTr/{case}.nii.gz" for case in true + kept} | {f"imagesUn/{case}_0000.nii.gz" for case in rest}
    expected |= {"dataset.json", "splits_final.json", "ssl_pseudolabel.json", "pseudolabels.csv", "pseudolabels.png"}
    assert set(written) == expected
    for name, data in written.items():
        if name.startswith("images"):
            place = "imagesUn" if "/un_" in name else "imagesTr"
            assert data == (dataset.raw / place / Path(name).name).read_bytes()
            assert (folder / name).is_symlink() is not copy
    for case in true:
        assert written[f"labelsTr/{case}.nii.gz"] == (dataset.raw / "labelsTr" / f"{case}.nii.gz").read_bytes()
    for case in kept:
        assert written[f"labelsTr/{case}.nii.gz"] == (tmp_path / "predicted" / f"{case}.nii.gz").read_bytes()
        assert not (folder / "labelsTr" / f"{case}.nii.gz").is_symlink()  # outlives the predictions

    [fold] = json.loads(written["splits_final.json"])
    assert fold == {"train": ["tr_00", "tr_01", "tr_02", *kept], "val": ["tr_03"]}
    assert split.labeled == fold["train"]
    assert json.loads(written["dataset.json"]) == {**dataset.dataset_json, "numTraining": 6, "name": folder.name}
    record = json.loads(written["ssl_pseudolabel.json"])
    assert (record["pseudo_labeled"], record["unlabeled"], record["made_with"]) == (kept, rest, made_with)
    assert all(f.name.endswith("-lock") for f in dataset.folders.raw.glob(".*"))


def test_report_names_each_case_the_most_confident_first(predicted, tmp_path):
    predicted.measured["un_01"] = Measured({"shell": 0, "core": 0}, {"shell": None, "core": None})
    write_report(str(tmp_path / "report.csv"), predicted.measured, ["un_00"])
    with open(tmp_path / "report.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["case"] for row in rows] == ["un_00", "un_02", "un_03", "un_01"]
    assert rows[0] == {
        "case": "un_00", "confidence": "0.9500", "kept": "yes", "voxels_shell": str(6 * 10 * 24 - 2 * 4 * 24),
        "confidence_shell": "0.9500", "voxels_core": str(2 * 4 * 24), "confidence_core": "0.9500",
    }  # fmt: skip
    assert rows[3]["confidence"] == "0.0000"
    assert rows[3]["kept"] == "no"
    assert rows[3]["confidence_core"] == ""


@pytest.mark.parametrize("threshold", [0.85, None])
def test_picture_shows_all_confidences(tmp_path, threshold):
    drawn = []
    for number, confidences in enumerate((CERTAINTY, {**CERTAINTY, "un_03": 0.0}, dict.fromkeys(CERTAINTY, 1.0))):
        file = tmp_path / f"{number}.png"
        draw_scores(str(file), confidences, ["un_00", "un_02"], threshold)
        drawn.append(imread(file))
    assert drawn[0].shape[:2] == (420, 720)
    assert not np.array_equal(drawn[0], drawn[1])


def test_fold_all_trains_and_validates_on_all_true_labels(dataset, predicted):
    source = read_source(dataset.name, "all")
    assert source.labeled == source.validation == dataset.cases("imagesTr")
    split = write_pseudolabeled("Dataset960_All", source, predicted, None, 0.5, {})
    [fold] = json.loads((dataset.folders.raw / "Dataset960_All" / "splits_final.json").read_text())
    assert fold == {"train": [*dataset.cases("imagesTr"), "un_00", "un_02"], "val": dataset.cases("imagesTr")}
    assert split.unlabeled == ["un_01", "un_03"]


def test_all_kept_leaves_no_images_without_labels(dataset, predicted):
    write_pseudolabeled("Dataset960_All", read_source(dataset.name, "0"), predicted, 0.1, None, {})
    assert not (dataset.folders.raw / "Dataset960_All" / "imagesUn").exists()


def test_refuses_and_leaves_nothing(dataset, predicted, monkeypatch):
    source = read_source(dataset.name, "0")
    before = content(dataset.folders.raw)
    with pytest.raises(UserError, match=r"un_00, with 0\.950\. Lower --min-confidence, or use --keep"):
        write_pseudolabeled("Dataset960_X", source, predicted, 0.99, None, {})
    monkeypatch.setattr(os, "symlink", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    with pytest.raises(UserError, match=r"Operation not permitted.*--copy"):
        write_pseudolabeled("Dataset960_X", source, predicted, 0.9, None, {})
    predicted.measured = {case: Measured({"a": 0}, {"a": None}) for case in CERTAINTY}
    with pytest.raises(UserError, match="sees no foreground"):
        write_pseudolabeled("Dataset960_X", source, predicted, 0.1, None, {})
    assert content(dataset.folders.raw) == before
    assert all(file.name.endswith("-lock") for file in dataset.folders.raw.glob(".*"))


def test_refuses_sources_that_cannot_work(dataset):
    splits = dataset.preprocessed / "splits_final.json"
    with pytest.raises(UserError, match=r"has 1 fold\(s\), but not -f 3"):
        read_source(dataset.name, "3")
    splits.write_text('[{"train": ["nobody"], "val": ["tr_03"]}]')
    with pytest.raises(UserError, match="names nobody"):
        read_source(dataset.name, "0")
    splits.unlink()
    with pytest.raises(UserError, match=r"splits_final\.json cannot be read"):
        read_source(dataset.name, "0")
    image = dataset.raw / "imagesUn" / "un_00_0000.nii.gz"
    image.rename(image.with_name("tr_04_0000.nii.gz"))
    with pytest.raises(UserError, match="tr_04 is also a labeled or validation case"):
        read_source(dataset.name, "all")
    (dataset.raw / "imagesUn").rename(dataset.raw / "elsewhere")
    with pytest.raises(UserError, match="imagesUn does not exist"):
        read_source(dataset.name, "all")


def test_images_of_validation_patients_are_left_out(dataset, capsys):
    (dataset.raw / "groups.json").write_text(json.dumps({"tr_03": "p1", "un_02": "p1", "tr_00": "p2", "un_01": "p2"}))
    source = read_source(dataset.name, "0")
    assert source.validation == ["tr_03"]
    assert list(source.unlabeled) == ["un_00", "un_01", "un_03"]
    assert "1 unlabeled images of validation patients are left out (un_02)" in capsys.readouterr().out
    assert "un_02" in read_source(dataset.name, "all").unlabeled  # there all cases validate and train
