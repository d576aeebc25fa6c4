"""Trained runs: found, named, and refused where something is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.damage import JSON_DAMAGE, with_byte_order_mark
from helpers.figure_folders import TRAINERS, MadeUp, make_folders, set_environment

from nnunet_ssl.errors import UserError
from nnunet_ssl.figures.predictions import prediction_folder
from nnunet_ssl.figures.runs import TrainedRun, find_runs, refuse_other_labels, settings_of, short_names
from nnunet_ssl.figures.test_set import find_cases


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    set_environment(monkeypatch, tmp_path)
    return make_folders(tmp_path)


def find(made: MadeUp, trainers: tuple[str, ...] = TRAINERS, **options: object) -> list[TrainedRun]:
    return find_runs([made.fold(trainer).parent for trainer in trainers], "0", **options)


@pytest.mark.parametrize("damage", JSON_DAMAGE)
def test_damaged_files_are_named(made: MadeUp, damage: str) -> None:
    """Files of the model, of the raw dataset, and of the run."""
    run = find(made)[0]
    raw = json.loads((made.raw / "dataset.json").read_text())
    splits = made.raw.parent.parent / "preprocessed" / made.raw.name / "splits_final.json"
    settings = run.fold_folder / "ssl_settings.json"
    settings.write_text('{"settings": {"cps_weight": 0.5}}')
    reads = {
        run.folder / "plans.json": lambda: run.reader,
        run.folder / "dataset.json": lambda: refuse_other_labels([run], raw),
        made.raw / "dataset.json": lambda: find_cases(990, "0"),
        splits: lambda: find_cases(990, "0"),
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
    first, second = find(made)
    assert (first.name, second.name) == ("LabeledOnly", "SHTA_CPS")
    assert second.checkpoint_file == made.fold(TRAINERS[1]) / "checkpoint_final.pth"
    assert [run.name for run in find(made, names=["A", "B"])] == ["A", "B"]


def test_short_names_never_coincide() -> None:
    assert short_names(["nnUNetTrainer", "nnUNetTrainerCPS_250epochs"]) == ["nnU-Net", "CPS"]
    both = ["nnUNetTrainerCPS_250epochs", "nnUNetTrainerCPS_50epochs"]
    assert short_names(both) == both


def test_a_missing_model_is_named(made: MadeUp) -> None:
    with pytest.raises(UserError, match=r"nnUNetTrainerCPS__.* does not exist: .*train it"):
        find(made, (TRAINERS[0], "nnUNetTrainerCPS"))
    with pytest.raises(UserError, match=r"fold_0/checkpoint_best.pth does not exist"):
        find(made, checkpoint="checkpoint_best.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["A"]}, "1 name.s. for 2 model"),
        ({"names": ["A", "A"]}, "--names gives A twice"),
        ({"trainers": TRAINERS[:1] * 2, "names": ["A", "B"]}, f"-tr gives .*{TRAINERS[0]}.* twice"),
    ],
)
def test_names_that_cannot_be_told_apart(made: MadeUp, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find(made, **options)


def test_models_have_folders_of_their_own_for_predictions(made: MadeUp, tmp_path: Path) -> None:
    """Whatever they are called, and on disks that know no capitals; a link keeps its name."""
    model = made.fold(TRAINERS[0]).parent
    others = [tmp_path / "x" / model.name, tmp_path / "X" / model.name]
    for other in others:
        other.parent.mkdir()
        other.symlink_to(model)
    names = ["GA-CPS + SHTA", "GA-CPS SHTA", ".."]
    runs = find_runs([model, *others], "0", names=names, option="-m")
    assert [run.folder for run in runs] == [model, *others]
    assert [run.name for run in runs] == names
    folders = [prediction_folder(run, made.out) for run in runs]
    assert {folder.parent for folder in folders} == {made.out / "predictions"}
    assert len({folder.name.lower() for folder in folders}) == 3
    assert all(TRAINERS[0] in folder.name for folder in folders)
