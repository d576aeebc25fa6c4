"""Predictions are nnU-Net's, and are kept as long as they are current."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from helpers.damage import JSON_DAMAGE, RunsCode
from helpers.figure_folders import TRAINERS, MadeUp, everything, make_folders, set_environment

from nnunet_ssl.errors import UserError
from nnunet_ssl.figures import predictions as module
from nnunet_ssl.figures.options import FigureOptions
from nnunet_ssl.figures.predictions import models_in_words, predict, with_given_predictions, with_predictions
from nnunet_ssl.figures.runs import TrainedRun, find_runs, load_predictor
from nnunet_ssl.figures.test_set import Case, find_cases


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    set_environment(monkeypatch, tmp_path)
    return make_folders(tmp_path)


def test_nnunets_own_validation_is_used_only_if_this_model_made_it(
    made: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    own = made.out / "predictions" / TRAINERS[0]
    monkeypatch.setattr(module, "predict", lambda *arguments: asked.append(arguments) or own)
    runs, cases, options = everything(made)
    run = runs[0]
    validation, final = made.fold(run.trainer) / "validation", run.checkpoint_file

    def found(run: TrainedRun = run, **changes: object) -> TrainedRun:
        return with_predictions([run], cases, made.out, replace(options, **changes))[0]

    assert found().predicted == validation
    assert models_in_words([found()]) == (
        f"- LabeledOnly: `{validation}` (nnU-Net's validation, with mirroring), `{final}`"
    )
    assert found(found(), tta=False).predicted == validation, "once resolved it stays"
    assert not asked

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
    runs, cases, options = everything(made)
    folders = [made.fold(trainer) / "validation" for trainer in TRAINERS]
    given = with_given_predictions(runs, folders, cases, options)
    assert [run.predicted for run in with_predictions(given, cases, made.out, options)] == folders
    second = models_in_words(given).splitlines()[1]
    assert second == f"- SHTA_CPS: `{folders[1]}` (given with -pred), `{runs[1].checkpoint_file}`"
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
    (run,) = find_runs([folder], "0")
    return run, find_cases(dataset.id, "0"), save


def predicted(run: TrainedRun, cases: list[Case], out: Path, tta: bool = False, **changes: object) -> Path:
    content = json.loads((run.folder / "dataset.json").read_text())
    return predict(run, cases, out, FigureOptions(content, {}, [], tta=tta, **changes))


def states(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir() if file.name != module.RECORD}


def test_predictions_are_nnunets_and_are_kept_while_they_are_current(
    model: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, cases, save = model
    folder = predicted(run, cases, tmp_path)
    assert sorted(states(folder)) == sorted(f"{case.name}.nii.gz" for case in cases)

    predictor = load_predictor(run, "cpu", False)
    array, properties = run.reader.read_images(list(map(str, cases[0].images)))
    wanted = predictor.predict_single_npy_array(array, properties)
    assert np.array_equal(run.reader.read_seg(str(folder / f"{cases[0].name}.nii.gz"))[0][0], wanted)

    before = states(folder)
    predicted(run, cases, tmp_path)
    assert states(folder) == before

    (folder / f"{cases[1].name}.nii.gz").unlink()  # only what is missing is made
    predicted(run, cases, tmp_path)
    after = states(folder)
    assert after[f"{cases[0].name}.nii.gz"] == before[f"{cases[0].name}.nii.gz"]
    assert sorted(after) == sorted(before)

    save()  # another checkpoint
    predicted(run, cases, tmp_path)
    assert all(states(folder)[name] > after[name] for name in after)

    before = states(folder)
    predicted(run, cases, tmp_path, True)  # other settings
    assert all(states(folder)[name] > before[name] for name in before)

    before = states(folder)
    image = cases[0].images[0]
    other = tmp_path / image.name
    voxels = sitk.ReadImage(str(image))
    sitk.WriteImage(voxels + 1, str(other))
    with_other = [replace(cases[0], images=(other,)), *cases[1:]]
    predicted(run, with_other, tmp_path, True)
    changed = [name for name in before if states(folder)[name] != before[name]]
    assert changed == [f"{cases[0].name}.nii.gz"]

    # copies are the same, and each is read once
    before = states(folder)
    for file in (run.checkpoint_file, other):
        os.utime(file, ns=(1, 1))
    moved = run.folder.with_name("moved")
    run.folder.rename(moved)
    copied = replace(run, folder=moved)
    predicted(copied, with_other, tmp_path, True)
    assert states(folder) == before
    record = (folder / module.RECORD).stat().st_mtime_ns
    monkeypatch.setattr("nnunet_ssl.files.open", lambda *_: pytest.fail("read again"), raising=False)
    predicted(copied, with_other, tmp_path, True)
    assert (folder / module.RECORD).stat().st_mtime_ns == record


def test_a_foreign_record_removes_nothing_elsewhere(model: tuple, tmp_path: Path) -> None:
    """Its cases are names of files that are removed when the model is another."""
    run, cases, save = model
    folder = predicted(run, cases[:1], tmp_path)
    mine = folder.parent / "mine.nii.gz"
    mine.write_text("mine")
    content = json.loads((folder / module.RECORD).read_text())
    content["images"]["../mine"] = next(iter(content["images"].values()))
    (folder / module.RECORD).write_text(json.dumps(content))
    save()
    predicted(run, cases[:1], tmp_path)
    assert mine.is_file()


@pytest.mark.parametrize("damage", [name for name in JSON_DAMAGE if name != "unreadable"])
def test_a_damaged_record_means_that_predictions_are_made_again(model: tuple, tmp_path: Path, damage: str) -> None:
    run, cases, _ = model
    folder = predicted(run, cases[:1], tmp_path)
    before = states(folder)
    JSON_DAMAGE[damage](folder / module.RECORD)
    predicted(run, cases[:1], tmp_path)
    assert list(states(folder)) == list(before)
    assert states(folder) != before


def test_what_a_killed_run_left_is_removed(model: tuple, tmp_path: Path) -> None:
    run, cases, _ = model
    left = module.prediction_folder(run, tmp_path) / "unfinished"
    left.mkdir(parents=True)
    (left / f"{cases[0].name}.nii.gz").write_bytes(b"half of it")
    folder = predicted(run, cases[:1], tmp_path)
    assert list(states(folder)) == [f"{cases[0].name}.nii.gz"]
    run.reader.read_seg(str(folder / f"{cases[0].name}.nii.gz"))  # whole


@pytest.mark.slow
def test_nnunets_workers_predict_the_same(model: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, cases, _ = model
    folders = [predicted(run, cases, tmp_path / "here")]
    monkeypatch.setattr(module, "WORKERS_PAY_FROM", 0)
    folders.append(predicted(run, cases, tmp_path / "there", num_processes=8))
    for case in cases:
        here, there = (run.reader.read_seg(str(folder / f"{case.name}.nii.gz"))[0] for folder in folders)
        assert np.array_equal(here, there)


def test_what_cannot_be_predicted_is_named_and_the_rest_is_kept(model: tuple, tmp_path: Path) -> None:
    run, cases, _ = model
    damaged = tmp_path / "b_0000.nii.gz"
    damaged.write_bytes(b"nothing")
    with pytest.raises(UserError, match=rf"nnU-Net cannot predict b \(.*\). Check {tmp_path}"):
        predicted(run, [cases[0], Case("b", (damaged,), damaged)], tmp_path)
    assert list(states(module.prediction_folder(run, tmp_path))) == [f"{cases[0].name}.nii.gz"]
    run.checkpoint_file.write_bytes(b"nothing")
    with pytest.raises(UserError, match=f"{run.checkpoint_file} is cut off, damaged or no checkpoint"):
        predicted(run, cases, tmp_path / "other")


def test_a_checkpoint_from_a_stranger_runs_nothing(model: tuple, tmp_path: Path) -> None:
    run, cases, _ = model
    content = torch.load(run.checkpoint_file, weights_only=False)
    torch.save(content | {"further": RunsCode(tmp_path / "ran")}, run.checkpoint_file)
    with pytest.raises(UserError, match=f"{run.checkpoint_file} calls .*exec"):
        predicted(run, cases, tmp_path)
    assert not (tmp_path / "ran").exists()
