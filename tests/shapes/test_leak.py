"""No leak, by brute force: what each fold trains with, of a dataset with patients and copies of test images."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import TinyDataset, make_case, write_images
from helpers.prepared import prepare
from helpers.wishes import manifest, warped_in, warps, wish

from nnunet_ssl.commands.warp import main
from nnunet_ssl.errors import UserError
from nnunet_ssl.shapes import targets, warped
from nnunet_ssl.shapes.warped import prepare_warps
from nnunet_ssl.shapes.wish import WarpManifest, Wish
from nnunet_ssl.unlabeled.find import GROUPS
from nnunet_ssl.unlabeled.groups import groups_of_dataset, read_groups

pytestmark = pytest.mark.usefixtures("quick_registration")

# patients: un_00 is of tr_00's, un_01 of one who has tr_01 and tr_02, un_02 is named after the case itself, un_03 tests
PATIENTS = {"tr_00": "A", "un_00": "A", "tr_01": "B", "tr_02": "B", "un_01": "B", "un_02": "tr_03", "ts_00": "T"}
PATIENTS |= {"un_03": "T"}


@pytest.fixture
def dataset(tiny_copy) -> TinyDataset:
    """With more unlabeled images: two without a patient, a test image under another name, and one under its name."""
    dataset = tiny_copy("3d")
    rng = np.random.default_rng(5)
    for case in ("un_04", "un_05"):
        write_images(dataset.recipe, dataset.raw / "imagesUn", case, make_case(dataset.recipe, rng)[0])
    images = dataset.raw / "imagesUn"
    shutil.copy(dataset.raw / "imagesTs" / "ts_01_0000.nii.gz", images / "a_copy_0000.nii.gz")
    write_images(dataset.recipe, images, "ts_00", make_case(dataset.recipe, rng)[0])
    (dataset.raw / GROUPS).write_text(json.dumps(PATIENTS))
    cases = dataset.cases("imagesTr")
    folds = [{"train": [case for case in cases if case != val], "val": [val]} for val in cases]
    (dataset.preprocessed / "splits_final.json").write_text(json.dumps(folds))
    return dataset


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def assert_no_leak(dataset: TinyDataset, moving: dict[str, str], train: list[str], val: list[str]) -> None:
    """By the rules of the issue alone: nothing of the package decides."""
    patient = lambda case: PATIENTS.get(case, case)  # noqa: E731
    entries = manifest(dataset)["cases"]
    judging = {*val, *dataset.cases("imagesTs")}
    tests = {digest(file) for file in (dataset.raw / "imagesTs").iterdir()}
    assert moving
    for case, of in moving.items():
        fixed = entries[case]["fixed"]
        assert entries[case]["moving"] == of
        assert of in train
        assert of not in val
        assert fixed in dataset.cases("imagesUn")
        assert patient(fixed) not in map(patient, judging), (fixed, val)
        assert digest(dataset.raw / "imagesUn" / f"{fixed}_0000.nii.gz") not in tests


@pytest.mark.parametrize("ahead", [True, False], ids=["warped ahead", "each fold by itself"])
def test_what_a_folds_trainer_loads_is_of_its_training_cases_and_onto_nobody_who_judges(
    dataset, make_trainer, monkeypatch, ahead
):
    monkeypatch.setattr(warped, "BUDGET", 1e6)  # all pairs
    if ahead:
        warps(dataset, tuple(dataset.cases("imagesTr")), each=20)
    used = set()
    for fold, val in enumerate(dataset.cases("imagesTr")):
        trainer = make_trainer("nnUNetTrainerWarps", dataset, fold=fold)
        train = [case for case in dataset.cases("imagesTr") if case != val]
        trainer.unlabeled = trainer._prepared_unlabeled()
        trainer.warps = trainer._prepared_warps()
        assert_no_leak(dataset, trainer.warps.moving, train, [val])
        joined = trainer.labeled_dataset()
        assert sorted(joined.identifiers) == sorted([*train, *trainer.warps.cases])
        assert trainer.get_tr_and_val_datasets()[1].identifiers == [val]
        used |= {(fold, manifest(dataset)["cases"][case]["fixed"]) for case in trainer.warps.cases}
        trainer._fold_lock.release()
    # and what may be used is used: fold 0 alone is without un_00, 1 and 2 without un_01, 3 without un_02
    assert {f for f, case in used if case == "un_04"} == set(range(5))
    assert {f for f, case in used if case == "un_00"} == {1, 2, 3, 4}
    assert {f for f, case in used if case == "un_01"} == {0, 3, 4}
    assert {f for f, case in used if case == "un_02"} == {0, 1, 2, 4}


def test_warps_onto_labeled_images_are_between_training_cases_of_other_patients_than_validate(
    dataset, make_trainer, monkeypatch
):
    """Without any unlabeled image; and all pairs that may be used are."""
    monkeypatch.setattr(warped, "BUDGET", 1e6)
    shutil.rmtree(dataset.raw / "imagesUn")
    groups = {**PATIENTS, "tr_04": "T"}  # whose patient tests
    (dataset.raw / GROUPS).write_text(json.dumps(groups))
    cases = dataset.cases("imagesTr")
    entries = {}
    for fold, val in enumerate(cases):
        trainer = make_trainer("nnUNetTrainerWarps", dataset, fold=fold, settings={"warp_onto": "labeled"})
        trainer.warps = trainer._prepared_warps()
        trainer._fold_lock.release()
        assert trainer.warps.folder == f"{warped_in(dataset)}_onto_labeled"
        entries = json.loads(Path(trainer.warps.folder, "manifest.json").read_text())["cases"]
        used = {(entries[case]["moving"], entries[case]["fixed"]) for case in trainer.warps.cases}
        judging = {groups.get(val, val), "T"}
        assert used == {
            (moving, fixed)
            for moving in cases
            for fixed in cases
            if moving != fixed and val not in (moving, fixed) and groups.get(fixed, fixed) not in judging
        }
    assert len(entries) == 5 * 4 - 4  # each registered once, whichever fold began; onto tr_04 none


def test_cases_that_no_fold_trains_with_take_no_place_among_labeled_targets(dataset, make_trainer):
    """One warp of each case is asked for; onto any of the three that only validate, it would be of no use."""
    shutil.rmtree(dataset.raw / "imagesUn")
    (dataset.raw / GROUPS).unlink()
    cases = dataset.cases("imagesTr")
    (dataset.preprocessed / "splits_final.json").write_text(json.dumps([{"train": cases[:2], "val": cases[2:]}]))
    arguments = ["-d", dataset.id, "-c", dataset.configuration, "-p", dataset.plans_name, "-np", 1]
    main([str(argument) for argument in [*arguments, "--onto", "labeled", "--pairs", 1]])
    assert Path(f"{warped_in(dataset)}_onto_labeled", "warps.png").is_file()
    trainer = make_trainer("nnUNetTrainerWarps", dataset, settings={"warp_onto": "labeled"})
    trainer.warps = trainer._prepared_warps()
    assert sorted(trainer.warps.moving.values()) == cases[:2]


def test_a_case_that_comes_into_the_splits_later_is_warped_onto(dataset, make_trainer, monkeypatch):
    monkeypatch.setattr(warped, "BUDGET", 1e6)
    (dataset.raw / GROUPS).unlink()
    cases, used = dataset.cases("imagesTr"), {}
    for number in (2, 3):
        fold = {"train": cases[:number], "val": cases[number:]}
        (dataset.preprocessed / "splits_final.json").write_text(json.dumps([fold]))
        trainer = make_trainer("nnUNetTrainerWarps", dataset, settings={"warp_onto": "labeled"})
        made = trainer._prepared_warps()
        trainer._fold_lock.release()
        used[number] = sorted(made.moving.values())
    assert used == {2: cases[:2], 3: sorted(cases[:3] * 2)}


def test_patients_and_test_cases_that_are_named_later_count_at_once(dataset):
    (dataset.raw / GROUPS).unlink()
    labeled = ("tr_01",)
    before = warps(dataset, labeled, ("tr_00",), each=20)
    fixed = lambda made: {manifest(dataset)["cases"][case]["fixed"] for case in made.cases}  # noqa: E731
    assert fixed(before) >= {"un_00", "un_03", "un_04", "un_05"}
    (dataset.raw / GROUPS).write_text(json.dumps(PATIENTS))
    write_images(dataset.recipe, dataset.raw / "imagesTs", "un_05", np.zeros((1, *dataset.recipe.shape), np.float32))
    shutil.copy(dataset.raw / "imagesUn" / "un_04_0000.nii.gz", dataset.raw / "imagesTs" / "ts_77_0000.nii.gz")
    after = warps(dataset, labeled, ("tr_00",))
    assert fixed(before) - fixed(after) == {"un_00", "un_03", "un_04", "un_05"}
    assert {case: before.places[case] for case in after.cases} == after.places  # nothing was made anew


def test_groups_of_a_file_hold_where_that_file_and_the_raw_data_are_gone(dataset):
    (dataset.raw / GROUPS).unlink()
    first = warps(dataset, ("tr_01",), ("tr_00",), each=20, groups={"tr_00": "p", "un_04": "p"})
    shutil.rmtree(dataset.raw / "imagesUn")
    shutil.rmtree(dataset.raw / "imagesTs")
    assert warps(dataset, ("tr_01",), ("tr_00",)) == first
    assert "un_04" not in {manifest(dataset)["cases"][case]["fixed"] for case in first.cases}


def test_groups_of_a_file_hold_for_every_configuration(dataset):
    (dataset.raw / GROUPS).unlink()
    warps(dataset, ("tr_01",), ("tr_00",), each=20, groups={"tr_00": "p", "un_04": "p"})
    folder = warped_in(dataset)
    folder.rename(folder.with_name("nnUNetPlans_of_another_configuration_warped"))
    made = warps(dataset, ("tr_01",), ("tr_00",), each=20)
    fixed = {manifest(dataset)["cases"][case]["fixed"] for case in made.cases}
    assert "un_04" not in fixed
    assert "un_05" in fixed


def test_groups_of_a_file_hold_where_the_manifest_is_lost(dataset):
    (dataset.raw / GROUPS).unlink()
    warps(dataset, ("tr_01",), ("tr_00",), each=20, groups={"tr_00": "p", "un_04": "p"})
    (warped_in(dataset) / "manifest.json").write_text("")
    again = warps(dataset, ("tr_01",), ("tr_00",), each=20)
    assert "un_01" in (fixed := {manifest(dataset)["cases"][case]["fixed"] for case in again.cases})
    assert "un_04" not in fixed


def test_a_mended_groups_json_counts_at_once(dataset):
    (dataset.raw / GROUPS).write_text(json.dumps({"tr_00": "p", "un_04": "p"}))
    warps(dataset, ("tr_01",), ("tr_00",), each=20)
    (dataset.raw / GROUPS).write_text(json.dumps({"tr_00": "p", "un_01": "p"}))
    made = warps(dataset, ("tr_01",), ("tr_00",), each=20)
    fixed = {manifest(dataset)["cases"][case]["fixed"] for case in made.cases}
    assert "un_01" not in fixed
    assert "un_04" in fixed


def test_test_images_of_the_datasets_behind_this_one_count(dataset):
    """Of a split, and of pseudo-labels of a split."""
    split, pseudo = "Dataset960_Tiny_split", "Dataset961_Tiny_pseudo1"
    records = {split: ("ssl_split.json", {"source": dataset.name})}
    records[pseudo] = "ssl_pseudolabel.json", {"source": split, "made_with": {"source": split}}
    for name, (record, content) in records.items():
        (dataset.folders.raw / name).mkdir()
        (dataset.folders.raw / name / record).write_text(json.dumps(content))
        assert targets.test_images(name, ".nii.gz").keys() == set(dataset.cases("imagesTs")) != set()


def test_groups_that_another_process_was_given_meanwhile_count(dataset, monkeypatch):
    """This one looks, waits for the lock, and has nothing left to make when it has it."""
    (dataset.raw / GROUPS).unlink()
    mine = wish(dataset, ("tr_01",), ("tr_00",))
    real = WarpManifest.locked

    def after_another(manifest: WarpManifest, *, wait: bool) -> AbstractContextManager:
        monkeypatch.setattr(WarpManifest, "locked", real)
        warps(dataset, ("tr_01",), each=20, groups={"tr_00": "p", "un_04": "p"})
        return real(manifest, wait=wait)

    assert not any(mine.groupings)
    monkeypatch.setattr(WarpManifest, "locked", after_another)
    made = prepare_warps(mine, 1)
    fixed = {manifest(dataset)["cases"][case]["fixed"] for case in made.cases}
    assert "un_05" in fixed
    assert "un_04" not in fixed


def test_two_cases_are_of_one_patient_by_way_of_a_third(dataset):
    """groups.json says whose un_04 is, and --groups that un_05 is of the same."""
    (dataset.raw / GROUPS).write_text(json.dumps({"tr_00": "p", "un_04": "p"}))
    made = warps(dataset, ("tr_01",), ("tr_00",), each=20, groups={"un_04": "q", "un_05": "q"})
    fixed = {manifest(dataset)["cases"][case]["fixed"] for case in made.cases}
    assert "un_00" in fixed
    assert not fixed & {"un_04", "un_05"}


def test_groups_outlive_the_warps(dataset):
    """Somebody removes the folder to free the space, as the log says one may."""
    (dataset.raw / GROUPS).unlink()
    warps(dataset, ("tr_01",), each=1, groups={"tr_00": "p", "un_04": "p"})
    shutil.rmtree(warped_in(dataset))
    made = warps(dataset, ("tr_01",), ("tr_00",), each=20)
    assert "un_04" not in {manifest(dataset)["cases"][case]["fixed"] for case in made.cases}


def test_a_file_of_groups_still_counts_beside_one_that_says_otherwise(dataset):
    """Of two that contradict each other each is obeyed: --groups named un_04's patient, and groups.json others."""
    groups = {"tr_00": "p", "un_04": "p"}
    warps(dataset, ("tr_01",), each=20, groups=groups)
    made = warps(dataset, ("tr_01",), ("tr_00",))
    fixed = {manifest(dataset)["cases"][case]["fixed"] for case in made.cases}
    assert not fixed & {"un_04", "un_00"}  # by the file, and by groups.json
    assert {"un_01", "un_05"} <= fixed


def test_names_of_test_images_count_where_imagesun_is_gone(dataset):
    prepare(dataset)
    shutil.rmtree(dataset.raw / "imagesUn")
    (dataset.raw / GROUPS).unlink()
    assert wish(dataset).of_tests == {"a_copy", "ts_00"}


def test_where_the_raw_dataset_is_gone_it_says_that_test_images_are_not_known(dataset, capsys):
    this = wish(dataset, ("tr_01",), each=1)
    shutil.rmtree(dataset.raw)
    prepare_warps(this, 1)
    assert f"{dataset.raw} is not there, so test images may be among those warped onto" in capsys.readouterr().out


def test_those_left_out_are_named(dataset, capsys):
    warps(dataset, ("tr_01",), each=1)
    told = capsys.readouterr().out
    assert "3 images are not warped onto, because they are test images or show test patients" in told
    assert "(a_copy, ts_00, un_03)" in told


def test_where_all_are_left_out_it_says_so(dataset):
    (dataset.raw / GROUPS).unlink()
    groups = dict.fromkeys([case for case in dataset.cases("imagesUn") if case != "ts_00"] + ["tr_00"], "one")
    with pytest.raises(UserError, match="no unlabeled image may be warped onto, since there is none, or all"):
        warps(dataset, ("tr_01",), ("tr_00",), each=1, groups=groups)
    made = warps(dataset, ("tr_01",), (), each=1, groups=groups)  # a fold whose validation has nobody of them
    assert len(made.cases) == 1
    with pytest.raises(UserError, match="no unlabeled image may be warped onto"):
        warps(dataset, ("tr_01",), ("tr_00",))


def test_no_file_of_a_label_that_is_not_trained_with_is_read(dataset, monkeypatch):
    """Hidden labels of unlabeled and test images, and the validation case's own, cannot be read at all."""
    for folder, cases in (("labelsUn", dataset.cases("imagesUn")), ("labelsTs", dataset.cases("imagesTs"))):
        for case in cases:
            file = dataset.raw / folder / f"{case}.nii.gz"
            file.unlink(missing_ok=True)
            file.mkdir(parents=True)
    prepared = prepare(dataset)
    labeled = Path(str(prepared.folder).removesuffix("_unlabeled"))
    for file in labeled.glob("tr_00*"):
        file.unlink()
        file.mkdir()
    opened = []
    real = open
    monkeypatch.setattr("builtins.open", lambda file, *a, **k: opened.append(os.fspath(file)) or real(file, *a, **k)
                        if not isinstance(file, int) else real(file, *a, **k))  # fmt: skip
    assert warps(dataset, ("tr_01",), ("tr_00",), each=1).cases
    assert not any("labelsUn" in file or "labelsTs" in file or "/tr_00" in file for file in opened)


def test_validation_cases_are_struck_from_what_others_have_made(dataset):
    """One manifest serves all folds: reading is what tells them apart."""
    everybody = tuple(dataset.cases("imagesTr"))
    warps(dataset, everybody, each=2)
    found = WarpManifest.read(str(dataset.preprocessed / "nnUNetPlans_3d_fullres_warped"))
    for val in everybody:
        train = tuple(case for case in everybody if case != val)
        this = Wish(dataset.name, dataset.plans, "3d_fullres", dataset.dataset_json, train, (val,), prepare(dataset))
        assert val not in found.of(this).moving.values()


def test_groups_are_read_from_the_raw_or_the_preprocessed_dataset(dataset):
    assert groups_of_dataset(dataset.name) == PATIENTS
    shutil.move(dataset.raw / GROUPS, dataset.preprocessed / GROUPS)
    assert groups_of_dataset(dataset.name) == PATIENTS
    (dataset.preprocessed / GROUPS).unlink()
    assert groups_of_dataset(dataset.name) == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [('{"tr_00": 3}', "gives 'tr_00' the patient 3, not a text"), ("[]", "holds a list"), ("{", "is not JSON")],
)
def test_groups_that_are_none_are_refused(tmp_path, text, told):
    (tmp_path / "groups.json").write_text(text)
    with pytest.raises(UserError, match=f"groups.json {told}") as refused:
        read_groups(str(tmp_path / "groups.json"))
    assert "Write one JSON object" in str(refused.value)
