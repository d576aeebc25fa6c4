"""Runs, cases, classes, and predictions that are kept as long as they are current."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from helpers.damage import JSON_DAMAGE, RunsCode, with_byte_order_mark
from helpers.figure_folders import TRAINERS, MadeUp, make_folders, set_environment, write

from nnunet_ssl.errors import UserError
from nnunet_ssl.figures import runs as module
from nnunet_ssl.figures.runs import (
    Case,
    FigureOptions,
    TrainedRun,
    cases_in_words,
    class_mask,
    find_classes,
    find_models,
    find_runs,
    models_in_words,
    predict,
    refuse_other_labels,
    settings_of,
    short_names,
    test_cases,
    with_given_predictions,
    with_predictions,
)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    set_environment(monkeypatch, tmp_path)
    return make_folders(tmp_path)


def find(trainers: tuple[str, ...] = TRAINERS, **options: object) -> list[TrainedRun]:
    return find_runs(990, trainers, "nnUNetPlans", "3d_fullres", "0", **options)


# ------------------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("damage", JSON_DAMAGE)
def test_damaged_files_are_named(made: MadeUp, damage: str) -> None:
    """Files of the model, of the raw dataset, and of the run."""
    run = find()[0]
    raw = json.loads((made.raw / "dataset.json").read_text())
    splits = made.raw.parent.parent / "preprocessed" / made.raw.name / "splits_final.json"
    settings = run.fold_folder / "ssl_settings.json"
    settings.write_text('{"settings": {"cps_weight": 0.5}}')
    reads = {
        run.folder / "plans.json": lambda: run.reader,
        run.folder / "dataset.json": lambda: refuse_other_labels([run], raw),
        made.raw / "dataset.json": lambda: test_cases(990, "0"),
        splits: lambda: test_cases(990, "0"),
        settings: lambda: settings_of(run),
    }
    for file, read in reads.items():
        whole = file.read_text()
        with_byte_order_mark(file)
        read()
        JSON_DAMAGE[damage](file)
        with pytest.raises(UserError, match=str(file)):
            read()
        if file.is_dir():
            file.rmdir()
        file.write_text(whole)


def test_runs_are_found_with_short_names(made: MadeUp) -> None:
    first, second = find()
    assert (first.name, second.name) == ("LabeledOnly", "SHTA_CPS")
    assert second.checkpoint_file == made.fold(TRAINERS[1]) / "checkpoint_final.pth"
    assert [run.name for run in find(names=["A", "B"])] == ["A", "B"]


def test_short_names_never_coincide() -> None:
    assert short_names(["nnUNetTrainer", "nnUNetTrainerCPS_250epochs"]) == ["nnU-Net", "CPS"]
    both = ["nnUNetTrainerCPS_250epochs", "nnUNetTrainerCPS_50epochs"]
    assert short_names(both) == both


def test_a_missing_model_is_named_with_the_command_that_makes_it(made: MadeUp) -> None:
    with pytest.raises(UserError, match=r"nnUNetTrainerCPS__.*nnUNetv2_train 990 3d_fullres 0 -tr nnUNetTrainerCPS "):
        find((TRAINERS[0], "nnUNetTrainerCPS"))
    with pytest.raises(UserError, match=r"fold_0/checkpoint_best.pth does not exist"):
        find(checkpoint="checkpoint_best.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["A"]}, "1 name.s. for 2 model"),
        ({"names": ["A", "A"]}, "--names gives A twice"),
        ({"trainers": TRAINERS[:1] * 2, "names": ["A", "B"]}, f"-tr gives {TRAINERS[0]} twice"),
    ],
)
def test_names_that_cannot_be_told_apart(made: MadeUp, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find(**options)


def test_models_have_folders_of_their_own_for_predictions(made: MadeUp, tmp_path: Path) -> None:
    """Whatever they are called, and on disks that know no capitals; a link keeps its name."""
    model = made.fold(TRAINERS[0]).parent
    others = [tmp_path / "x" / model.name, tmp_path / "X" / model.name]
    for other in others:
        other.parent.mkdir()
        other.symlink_to(model)
    names = ["GA-CPS + SHTA", "GA-CPS SHTA", ".."]
    runs = find_models([model, *others], "0", names=names)
    assert [run.folder for run in runs] == [model, *others]
    assert [run.name for run in runs] == names
    folders = [module.prediction_folder(run, made.out) for run in runs]
    assert {folder.parent for folder in folders} == {made.out / "predictions"}
    assert len({folder.name.lower() for folder in folders}) == 3
    assert all(TRAINERS[0] in folder.name for folder in folders)


# ----------------------------------------------------------------------------------------------------------- cases


def test_validation_cases_where_there_is_no_test_set(made: MadeUp) -> None:
    cases = test_cases(990, "0")
    assert [case.name for case in cases] == ["a", "b", "c"]
    assert all(case.kind == "validation" and case.label.is_file() and case.images[0].is_file() for case in cases)
    with pytest.raises(UserError, match=r"has 1 fold\(s\), but not -f 3. It must name the validation cases"):
        test_cases(990, "3")
    cases = test_cases(990, "all")
    assert len(cases) == 3
    assert cases_in_words(cases) == f"3 training cases, truth from `{made.raw / 'labelsTr'}`"


def test_test_cases_with_a_truth_come_first(made: MadeUp, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("t1", "t2"):
        write(np.zeros((3, 4, 5), np.float32), made.raw / f"imagesTs/{name}_0000.nii.gz")
    assert test_cases(990, "0")[0].kind == "validation", "no labelsTs"
    write(np.zeros((3, 4, 5), np.uint8), made.raw / "labelsTs/t2.nii.gz")
    (case,) = test_cases(990, "0")
    assert (case.name, case.kind) == ("t2", "test")
    assert capsys.readouterr().out.rstrip().endswith(": t1")


def test_a_validation_case_without_image(made: MadeUp) -> None:
    (made.raw / "imagesTr/b_0000.nii.gz").unlink()
    with pytest.raises(UserError, match="validation case b"):
        test_cases(990, "0")


# --------------------------------------------------------------------------------------------------------- classes

REGIONS = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}


def test_classes_by_label_and_name_in_the_datasets_order() -> None:
    content = {"labels": {"background": 0, "liver": 1, "spleen": 2, "aorta": 5}}
    assert find_classes(content) == ({"liver": 1, "spleen": 2, "aorta": 5}, [1, 2, 5])
    assert find_classes(content, ["aorta", "1"])[1] == [1, 5]
    assert find_classes({"labels": {"background": 0, "liver": [1]}}) == ({"liver": 1}, [1])  # no region to nnU-Net
    with pytest.raises(UserError, match=r"--classes 3 .*1 \(liver\), 2 \(spleen\), 5 \(aorta\)"):
        find_classes(content, ["3"])


def test_regions_are_classes_too() -> None:
    labels, classes = find_classes({"labels": REGIONS, "regions_class_order": [1, 2]}, ["whole"])
    assert (labels, classes) == ({"whole": (1, 2), "core": 2}, [(1, 2)])
    array = np.array([0, 1, 2, 3])
    assert class_mask(array, (1, 2)).tolist() == [False, True, True, False]
    assert class_mask(array, 2).tolist() == [False, False, True, False]


# ----------------------------------------------------------------------------------------------------- predictions


def options_of(case_dataset: dict, **changes: object) -> FigureOptions:
    labels, classes = find_classes(case_dataset)
    return FigureOptions(case_dataset, labels, classes, **changes)


def test_nnunets_own_validation_is_used_only_if_this_model_made_it(
    made: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(module, "predict", lambda *arguments: asked.append(arguments))
    run, cases = find()[0], test_cases(990, "0")
    validation, final = made.fold(run.trainer) / "validation", run.checkpoint_file
    options = options_of(json.loads((made.raw / "dataset.json").read_text()), dataset=made.raw.name)

    def found(run: TrainedRun = run, **changes: object) -> TrainedRun:
        return with_predictions([run], cases, made.out, replace(options, **changes))[0]

    assert found().predicted == validation
    assert models_in_words([found()]) == [
        f"- LabeledOnly: `{validation}` (nnU-Net's validation, with mirroring), `{final}`"
    ]
    assert found(found(), tta=False).predicted == validation, "once resolved it stays"
    assert not asked

    own = made.out / "predictions" / run.trainer
    assert found(tta=False).predicted == own
    assert found(tta=False).how == "predicted for the figures, without mirroring"
    assert found(dataset="Dataset991_Other").predicted == own
    assert found(replace(run, checkpoint="checkpoint_best.pth")).predicted == own
    now = final.stat().st_mtime_ns
    os.utime(final, ns=(now, (validation / "b.nii.gz").stat().st_mtime_ns + 10**9))  # it was trained again
    assert found().predicted == own
    os.utime(final, ns=(now, now))
    assert found().predicted == validation
    (validation / "b.nii.gz").unlink()
    assert found().predicted == own
    assert found().how == "predicted for the figures, with mirroring"
    assert len(asked) == 7


def test_given_predictions_must_be_whole(made: MadeUp) -> None:
    runs, cases = find(), test_cases(990, "0")
    options = options_of(json.loads((made.raw / "dataset.json").read_text()))
    folders = [made.fold(trainer) / "validation" for trainer in TRAINERS]
    given = with_given_predictions(runs, folders, cases, options)
    assert [run.predicted for run in with_predictions(given, cases, made.out, options)] == folders
    assert models_in_words(given)[1] == f"- SHTA_CPS: `{folders[1]}` (given with -pred), `{runs[1].checkpoint_file}`"
    with pytest.raises(UserError, match=r"-pred gives 1 folder.s. for 2 model"):
        with_given_predictions(runs, folders[:1], cases, options)
    (folders[1] / "b.nii.gz").unlink()
    with pytest.raises(UserError, match=f"{folders[1]}/b.nii.gz does not exist"):
        with_given_predictions(runs, folders, cases, options)


@pytest.fixture
def model(tiny: object, make_trainer: object) -> tuple[TrainedRun, list[Case], object]:
    """An untrained model of nnU-Net's, its test cases, and a function that writes other weights."""
    dataset = tiny("3d")
    trainer = make_trainer("nnUNetTrainer", dataset)
    folder = Path(trainer.output_folder_base)
    (folder / "plans.json").write_text(json.dumps(dataset.plans))
    (folder / "dataset.json").write_text(json.dumps(dataset.dataset_json))

    def save() -> None:
        with torch.no_grad():
            next(trainer.network.parameters()).add_(0.01)
        trainer.save_checkpoint(str(folder / "fold_0/checkpoint_final.pth"))

    save()
    run = find_runs(dataset.id, ["nnUNetTrainer"], dataset.plans_name, dataset.configuration, "0")[0]
    return run, test_cases(dataset.id, "0"), save


def states(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir() if file.name != module.RECORD}


def test_predictions_are_nnunets_and_are_kept_while_they_are_current(
    model: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, cases, save = model
    folder = tmp_path / "predicted"
    predict(run, cases, folder, False, "cpu", False)
    assert sorted(states(folder)) == sorted(f"{case.name}.nii.gz" for case in cases)

    predictor = module.load_predictor(run, "cpu", False)
    array, properties = run.reader.read_images(list(map(str, cases[0].images)))
    wanted = predictor.predict_single_npy_array(array, properties)
    assert np.array_equal(run.reader.read_seg(str(folder / f"{cases[0].name}.nii.gz"))[0][0], wanted)

    before = states(folder)
    predict(run, cases, folder, False, "cpu", False)
    assert states(folder) == before

    (folder / f"{cases[1].name}.nii.gz").unlink()  # only what is missing is made
    predict(run, cases, folder, False, "cpu", False)
    after = states(folder)
    assert after[f"{cases[0].name}.nii.gz"] == before[f"{cases[0].name}.nii.gz"]
    assert sorted(after) == sorted(before)

    save()  # another checkpoint
    predict(run, cases, folder, False, "cpu", False)
    assert all(states(folder)[name] > after[name] for name in after)

    before = states(folder)
    predict(run, cases, folder, False, "cpu", True)  # other settings
    assert all(states(folder)[name] > before[name] for name in before)

    before = states(folder)
    image = cases[0].images[0]
    other = tmp_path / image.name
    voxels = sitk.ReadImage(str(image))
    sitk.WriteImage(voxels + 1, str(other))
    with_other = [replace(cases[0], images=(other,)), *cases[1:]]
    predict(run, with_other, folder, False, "cpu", True)
    changed = [name for name in before if states(folder)[name] != before[name]]
    assert changed == [f"{cases[0].name}.nii.gz"]

    # copies are the same, and each is read once
    before = states(folder)
    for file in (run.checkpoint_file, other):
        os.utime(file, ns=(1, 1))
    moved = run.folder.with_name("moved")
    run.folder.rename(moved)
    copied = replace(run, folder=moved)
    predict(copied, with_other, folder, False, "cpu", True)
    assert states(folder) == before
    record = (folder / module.RECORD).stat().st_mtime_ns
    monkeypatch.setattr("nnunet_ssl.files.open", lambda *_: pytest.fail("read again"), raising=False)
    predict(copied, with_other, folder, False, "cpu", True)
    assert (folder / module.RECORD).stat().st_mtime_ns == record


def test_a_foreign_record_removes_nothing_elsewhere(model: tuple, tmp_path: Path) -> None:
    """Its cases are names of files that are removed when the model is another."""
    run, cases, save = model
    folder = tmp_path / "predicted"
    predict(run, cases[:1], folder, False, "cpu", False)
    (tmp_path / "mine.nii.gz").write_text("mine")
    content = json.loads((folder / module.RECORD).read_text())
    content["images"]["../mine"] = next(iter(content["images"].values()))
    (folder / module.RECORD).write_text(json.dumps(content))
    save()
    predict(run, cases[:1], folder, False, "cpu", False)
    assert (tmp_path / "mine.nii.gz").is_file()


@pytest.mark.parametrize("damage", [name for name in JSON_DAMAGE if name != "unreadable"])
def test_a_damaged_record_means_that_predictions_are_made_again(model: tuple, tmp_path: Path, damage: str) -> None:
    run, cases, _ = model
    folder = tmp_path / "predicted"
    predict(run, cases[:1], folder, False, "cpu", False)
    before = states(folder)
    JSON_DAMAGE[damage](folder / module.RECORD)
    predict(run, cases[:1], folder, False, "cpu", False)
    assert list(states(folder)) == list(before)
    assert states(folder) != before


def test_probabilities_are_added_where_they_are_missing(model: tuple, tmp_path: Path) -> None:
    run, cases, _ = model
    folder = tmp_path / "predicted"
    predict(run, cases[:1], folder, False, "cpu", False)
    labels = run.reader.read_seg(str(folder / f"{cases[0].name}.nii.gz"))[0][0]
    (folder / "unfinished").mkdir()  # a killed run's
    (folder / "unfinished/x.npz").touch()
    predict(run, cases[:1], folder, True, "cpu", False)
    probabilities = np.load(folder / f"{cases[0].name}.npz")["probabilities"]
    assert np.array_equal(probabilities.argmax(0), labels)
    assert np.allclose(probabilities.sum(0), 1, atol=1e-3)
    assert not (folder / "unfinished").exists()


@pytest.mark.slow
def test_nnunets_workers_predict_the_same(model: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, cases, _ = model
    predict(run, cases, tmp_path / "here", False, "cpu", False)
    monkeypatch.setattr(module, "WORKERS_PAY_FROM", 0)
    predict(run, cases, tmp_path / "there", False, "cpu", False, num_processes=8)
    for case in cases:
        here, there = (run.reader.read_seg(str(tmp_path / f / f"{case.name}.nii.gz"))[0] for f in ("here", "there"))
        assert np.array_equal(here, there)


def test_what_cannot_be_predicted_is_named_and_the_rest_is_kept(model: tuple, tmp_path: Path) -> None:
    run, cases, _ = model
    damaged = tmp_path / "b_0000.nii.gz"
    damaged.write_bytes(b"nothing")
    with pytest.raises(UserError, match=rf"nnU-Net cannot predict b \(.*\). Check {tmp_path}"):
        predict(run, [cases[0], Case("b", (damaged,), damaged)], tmp_path / "predicted", False, "cpu", False)
    assert list(states(tmp_path / "predicted")) == [f"{cases[0].name}.nii.gz"]
    run.checkpoint_file.write_bytes(b"nothing")
    with pytest.raises(UserError, match=f"{run.checkpoint_file} is cut off, damaged or no checkpoint"):
        predict(run, cases, tmp_path / "other", False, "cpu", False)


def test_a_checkpoint_from_a_stranger_runs_nothing(model: tuple, tmp_path: Path) -> None:
    run, cases, _ = model
    content = torch.load(run.checkpoint_file, weights_only=False)
    torch.save(content | {"further": RunsCode(tmp_path / "ran")}, run.checkpoint_file)
    with pytest.raises(UserError, match=f"{run.checkpoint_file} calls .*exec"):
        predict(run, cases, tmp_path / "predicted", False, "cpu", False)
    assert not (tmp_path / "ran").exists()
