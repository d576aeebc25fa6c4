"""``nnUNetv2_ssl_pseudolabel`` with a trained model: the real commands, resuming, what it refuses."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from multiprocessing.context import ForkContext
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.damage import JSON_DAMAGE
from helpers.datasets import TinyDataset

from nnunet_ssl.commands.pseudolabel import main
from nnunet_ssl.errors import UserError
from nnunet_ssl.locks import holding
from nnunet_ssl.self_training.teachers import Teachers

TRAINER = "nnUNetTrainerLabeledOnly_1epochs"
OTHER = "nnUNetTrainerCPS_1epochs"  # of students


@pytest.fixture
def trained(tiny_copy: Callable, make_trainer: Callable) -> Callable[..., tuple[TinyDataset, Path, list[str]]]:
    """``trained(kind)``: a dataset, the model of its fold 0, and the command's arguments but for the new id."""

    def train(kind: str = "3d") -> tuple[TinyDataset, Path, list[str]]:
        dataset = tiny_copy(kind)
        splits = [{"train": ["tr_00", "tr_01", "tr_02"], "val": ["tr_03", "tr_04"]}]
        (dataset.preprocessed / "splits_final.json").write_text(json.dumps(splits))
        for case in dataset.cases("imagesUn"):  # labels that nobody can open without waiting for ever
            os.mkfifo(dataset.raw / "labelsTr" / f"{case}{dataset.recipe.file_ending}")
        trainer = make_trainer(TRAINER, dataset, settings={"num_iterations_per_epoch": 30})
        trainer.run_training()
        where = [
            "-d",
            str(dataset.id),
            "-c",
            dataset.configuration,
            "-f",
            "0",
            "-tr",
            TRAINER,
            "-p",
            dataset.plans_name,
        ]
        return dataset, Path(trainer.output_folder).parent, [*where, "-device", "cpu", "-np", "1", "--disable_tta"]

    return train


class ThreadsForWorkers(ForkContext):
    """Pools of threads; what is not a pool is forked."""

    def Pool(self, *args: object, **kwargs: object) -> ThreadPool:  # noqa: N802
        return ThreadPool(*args, **kwargs)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's real commands, but in this process, and with threads for workers: a new process imports for seconds.

    A forked one would be as quick, but blosc2's threads do not come along: compressing there can wait for ever.
    """
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: ThreadsForWorkers())
    monkeypatch.setattr(multiprocessing, "cpu_count", lambda: 1)  # what nnUNetv2_train takes for threads
    commands = {entry.name: entry for entry in metadata.entry_points(group="console_scripts")}

    @contextmanager
    def running(words: list[str], **options: object) -> Iterator[SimpleNamespace]:
        monkeypatch.setattr(sys, "argv", words)
        commands[words[0]].load()()
        yield SimpleNamespace(wait=lambda: 0)

    def as_typed(words: list[str], device: str) -> list[str]:
        assert device == "cpu"  # by which the threads go
        return words

    monkeypatch.setattr("nnunet_ssl.steps.of_this_python", as_typed)
    monkeypatch.setattr("nnunet_ssl.steps.running", running)


def commands_in(output: str) -> list[str]:
    """nnU-Net's commands that it ran, or would run, by name."""
    return re.findall(r"^  \$ (\w+)", output, re.M)


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-f", "one"], "-f: 'one'"),
        (["--rounds", "-1"], "--rounds: '-1'"),
        (["--min-confidence", "1.5"], r"--min-confidence: '1\.5'"),
        (["--keep", "0"], "--keep: '0'"),
        (["--parts", "0"], "--parts: '0'"),
        (["-np", "0"], "-np: '0'"),
        (["--teachers", "nobody"], "--teachers.*'nobody'"),
        (["--min-agreement", "0.5"], "--min-agreement: one teacher"),
        (["--teachers", "atlas", "--rounds", "2"], "gives the same labels in every round"),
        (["--teachers", "atlas", "--warm"], "--warm: an atlas has no weights"),
        (["--finish", "5"], "--finish .* Give --rounds too"),
        (["--student", "nnUNetTrainerCPS"], "--student .* Give --rounds too"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        main(["-d", "1", "-c", "3d_fullres", "-tr", TRAINER, "-o", "2", *arguments])


def test_refuses_what_it_cannot_do(trained, tmp_path):
    dataset, model, arguments = trained()

    def refused(*words: str, arguments: list[str] = arguments, target: str = "960") -> None:
        before = tree(tmp_path)
        with pytest.raises(UserError) as error:
            main([*arguments, "-o", target])
        assert all(word in str(error.value) for word in words), str(error.value)
        assert tree(tmp_path) == before

    refused("no trained model", "-tr", arguments=[*arguments, "-tr", "nnUNetTrainerCPS"])
    refused("no checkpoint", "fold_1", arguments=[*arguments, "-f", "1"])
    refused("checkpoint_best", arguments=[*arguments, "-chk", "checkpoint_best_of_all.pth"])
    refused("-o 901", "exists already", target="901")
    refused("-o", "1000", target="1000")
    refused("-o 901", "exists already", arguments=[*arguments, "--rounds", "2"], target="900")
    shutil.copy(model / "fold_0" / "checkpoint_final.pth", model / "fold_0" / "checkpoint_epoch1.pth")
    for more in (("--rounds", "2"), ("--rounds", "1", "--finish", "2")):
        refused("checkpoint_epoch1.pth", "later rounds", arguments=[*arguments, "-chk", "checkpoint_epoch1.pth", *more])
    (model / "fold_0" / "checkpoint_epoch1.pth").unlink()
    plans = dataset.plans_file.rename(dataset.preprocessed / "moved.json")
    refused(dataset.plans_file.name, "students", arguments=[*arguments, "--rounds", "1"])
    plans.rename(dataset.plans_file)

    plans = json.loads((model / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    (model / "plans.json").write_text(json.dumps(plans))
    refused("previous stage", "3d_fullres")
    del plans["configurations"]["3d_fullres"]["previous_stage"]
    (model / "plans.json").write_text(json.dumps(plans))

    (dataset.raw / "imagesUn").rename(tmp_path / "elsewhere")
    refused("imagesUn does not exist")


def test_dry_run_prints_every_command_and_writes_nothing(trained, tmp_path, capsys):
    dataset, model, arguments = trained()
    before = tree(tmp_path)
    capsys.readouterr()
    main([*arguments, "-o", "960", "--rounds", "2", "--parts", "2", "--dry-run"])
    output = capsys.readouterr().out
    steps = ["nnUNetv2_predict"] * 2 + [
        "nnUNetv2_move_plans_between_datasets", "nnUNetv2_preprocess", "nnUNetv2_train",
    ]  # fmt: skip
    assert commands_in(output) == steps * 2
    assert "--save_probabilities" in output
    assert "-s Dataset901_Tiny -t Dataset961_Tiny_pseudo2" in output
    assert f"nnUNetv2_train Dataset961_Tiny_pseudo2 3d_fullres 0 -tr {TRAINER}" in output
    assert "Dataset960_Tiny_pseudo1, fold 0" in output  # the second teacher
    assert "of confidence 0.9 or more" in output
    assert tree(tmp_path) == before
    main([*arguments, "-o", "960", "--keep", "0.5", "--dry-run"])
    output = capsys.readouterr().out
    assert commands_in(output) == ["nnUNetv2_predict"]
    assert (
        f"-i {dataset.raw / 'imagesUn'} -o {model / 'unlabeled_fold_0_without_mirroring'} -d {dataset.name}" in output
    )
    assert "of the best 0.5 of all cases" in output
    (model / "fold_0" / "checkpoint_best.pth").touch()
    main([*arguments, "-o", "960", "-chk", "checkpoint_best.pth", "--disable_tta", "--dry-run"])
    assert f"-o {model / 'unlabeled_fold_0_checkpoint_best_without_mirroring'} -d" in capsys.readouterr().out


def test_two_commands_on_one_model_predict_one_after_the_other(trained, monkeypatch):
    """They would delete each other's files."""
    _, _, arguments = trained()

    def beside_another(self: Teachers, *_: object) -> None:
        with pytest.raises(UserError, match="taken"), holding(f"{self.folder}.lock", "taken"):
            pass
        raise UserError("it was asked")

    monkeypatch.setattr(Teachers, "_complete", beside_another)
    with pytest.raises(UserError, match="it was asked"):
        main([*arguments, "-o", "960"])


@pytest.mark.timeout(600)
def test_predictions_of_nnunet_become_labels_and_are_used_again(trained, in_process, capsys):
    dataset, model, arguments = trained()
    predictions = model / "unlabeled_fold_0_without_mirroring"

    def run(*options: str) -> str:
        capsys.readouterr()
        main([*arguments, *options])
        return capsys.readouterr().out

    output = run("-o", "960", "--keep", "0.5")
    assert commands_in(output) == ["nnUNetv2_predict"]
    folder = dataset.folders.raw / "Dataset960_Tiny_pseudo1"
    record = json.loads((folder / "ssl_pseudolabel.json").read_text())
    assert len(record["pseudo_labeled"]) == len(record["unlabeled"]) == 2
    for case in record["pseudo_labeled"]:
        label = folder / "labelsTr" / f"{case}.nii.gz"
        assert label.read_bytes() == (predictions / label.name).read_bytes()
        values = np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(label))))
        assert {0} < set(values) <= {0, 1, 2}
    assert not list(predictions.glob("*.np[yz]"))
    assert f"{folder.name}: 3 labeled, 2 pseudo-labeled, 2 unlabeled and 2 validation cases" in output
    assert f"nnUNetv2_train {folder.name} 3d_fullres 0" in output

    output = run("-o", "960", "--keep", "0.5")
    assert commands_in(output) == []
    assert f"{folder.name} is there" in output
    with pytest.raises(UserError, match=r"by another model: keep was 0\.5, now 0\.25\. Go back") as error:
        run("-o", "960", "--keep", "0.25")
    assert "remove" not in str(error.value)
    for file in [*dataset.raw.rglob("*.nii.gz"), *model.rglob("*")]:  # as ``cp -r`` and ``tar`` do
        if file.is_file():
            os.utime(file, ns=(1, 1))
    assert commands_in(run("-o", "960", "--keep", "0.5")) == []
    assert "the predictions in" in run("-o", "961", "--keep", "0.25")  # are there
    shutil.rmtree(dataset.folders.raw / "Dataset961_Tiny_pseudo1")
    shutil.rmtree(dataset.folders.preprocessed / "Dataset961_Tiny_pseudo1")
    checkpoint = model / "fold_0" / "checkpoint_final.pth"
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[::-1])
    with pytest.raises(UserError, match=r"by another model: teacher's checkpoint_final\.pth was another file"):
        run("-o", "960", "--keep", "0.5")
    checkpoint.write_bytes(content)
    os.utime(checkpoint, ns=(1, 1))
    whole = (folder / "ssl_pseudolabel.json").read_bytes()
    for damaged in JSON_DAMAGE.values():
        damaged(folder / "ssl_pseudolabel.json")
        with pytest.raises(UserError, match=r"ssl_pseudolabel\.json|exists already|by another model"):
            run("-o", "960", "--keep", "0.5")
        if (folder / "ssl_pseudolabel.json").is_dir():
            (folder / "ssl_pseudolabel.json").rmdir()
        (folder / "ssl_pseudolabel.json").write_bytes(whole)

    (predictions / "un_02.nii.gz").unlink()  # one prediction is lost: only this one is made again
    before = (predictions / "un_01.nii.gz").stat().st_mtime_ns
    output = run("-o", "961", "--keep", "1")
    assert f"-i {predictions / 'to_predict'}" in output
    assert (predictions / "un_02.nii.gz").is_file()
    assert (predictions / "un_01.nii.gz").stat().st_mtime_ns == before
    assert not (predictions / "to_predict").exists()
    assert "No unlabeled image is left" in output


@pytest.mark.timeout(600)
def test_a_network_and_an_atlas_teach_a_student_that_is_warm_and_finished(
    trained, in_process, capsys, quick_registration
):
    dataset, model, arguments = trained()
    options = ["-o", "960", "--teachers", "network,atlas", "--keep", "0.5", "--rounds", "1", "--warm", "--finish", "1"]
    options += ["--student", OTHER]

    def run(*more: str) -> str:
        capsys.readouterr()
        main([*arguments, *options, *more])
        return capsys.readouterr().out

    dry = run("--dry-run")
    output = run()
    steps = ["nnUNetv2_predict", "nnUNetv2_move_plans_between_datasets", "nnUNetv2_preprocess"]
    assert commands_in(output) == commands_in(dry) == [*steps, "nnUNetv2_train", "nnUNetv2_train"]
    assert "12 registrations of 3 labeled images onto 4 unlabeled ones" in output
    assert "of the best 0.5 of all cases" in dry
    name = "Dataset960_Tiny_pseudo1"
    student = model.parent.parent / name / model.name.replace(TRAINER, OTHER)
    weights = [re.search(rf"nnUNetv2_train {name} 3d_fullres {f} .*-pretrained_weights (\S+)", output) for f in (0, 1)]
    assert [found[1] for found in weights] == [
        str(folder / "fold_0" / "checkpoint_final.pth") for folder in (model, student)
    ]
    summary = json.loads((student / "fold_1" / "validation" / "summary.json").read_text())
    assert {Path(c["prediction_file"]).name for c in summary["metric_per_case"]} == {"tr_03.nii.gz", "tr_04.nii.gz"}

    record = json.loads((dataset.folders.raw / name / "ssl_pseudolabel.json").read_text())
    made_with = record["made_with"]
    assert made_with["teacher"]["atlas"].startswith("3 cases (")
    assert (made_with["warm"], made_with["finish"], made_with["keep"]) == (True, 1, 0.5)
    assert (made_with["teacher"]["trainer"], made_with["student"]) == (TRAINER, OTHER)
    assert len(record["pseudo_labeled"]) == 2
    report = (dataset.folders.raw / name / "pseudolabels.csv").read_text().splitlines()
    assert report[0].startswith("case,confidence,agreement,kept")
    predictions = model / "unlabeled_fold_0_without_mirroring_with_atlas"
    assert not list(predictions.glob("*.np[yz]"))
    for case in record["pseudo_labeled"]:
        label = dataset.folders.raw / name / "labelsTr" / f"{case}.nii.gz"
        assert label.read_bytes() == (predictions / label.name).read_bytes()

    assert commands_in(run()) == []
    folder = dataset.preprocessed / f"{dataset.plans_name}_3d_fullres"
    shutil.copyfile(folder / "tr_00_seg.b2nd", folder / "tr_01_seg.b2nd")  # a label is mended
    with pytest.raises(UserError, match=r"made with other options.*: teacher's atlas was 3 cases \("):
        run()


@pytest.mark.timeout(300)
def test_an_atlas_needs_no_model(tiny_copy, in_process, capsys, quick_registration):
    dataset = tiny_copy("3d")
    splits = [{"train": ["tr_00", "tr_01"], "val": ["tr_03", "tr_04"]}]
    (dataset.preprocessed / "splits_final.json").write_text(json.dumps(splits))
    for case in dataset.cases("imagesUn"):
        os.mkfifo(dataset.raw / "labelsTr" / f"{case}.nii.gz")
    arguments = ["-d", str(dataset.id), "-c", "3d_fullres", "-tr", TRAINER, "-device", "cpu", "-np", "1", "-o", "960"]
    arguments += ["-p", dataset.plans_name, "--teachers", "atlas", "--keep", "1"]
    main(arguments)
    output = capsys.readouterr().out
    assert commands_in(output) == []
    assert "by the labeled cases of Dataset901_Tiny, fold 0" in output
    record = json.loads((dataset.folders.raw / "Dataset960_Tiny_pseudo1" / "ssl_pseudolabel.json").read_text())
    assert record["pseudo_labeled"] == dataset.cases("imagesUn")
    assert (dataset.folders.preprocessed / "Dataset960_Tiny_pseudo1" / "dataset_fingerprint.json").is_file()
    main(arguments)
    assert "Dataset960_Tiny_pseudo1 is there" in capsys.readouterr().out

    # what it was made from has changed since, and with it who may be learned from
    (dataset.raw / "groups.json").write_text(json.dumps({"tr_03": "p1", "un_02": "p1"}))
    with pytest.raises(UserError, match=r"unlabeled was 4 cases \(\w+\), now 3 cases .* choose another -o"):
        main(arguments)
    (dataset.raw / "groups.json").unlink()
    splits = [{"train": ["tr_00", "tr_01"], "val": ["tr_02"]}]
    (dataset.preprocessed / "splits_final.json").write_text(json.dumps(splits))
    with pytest.raises(UserError, match=r"validation was 2 cases \(\w+\), now 1 cases"):
        main(arguments)


def test_the_mean_of_several_folds_predicts(trained, capsys):
    dataset, model, arguments = trained()
    splits = dataset.preprocessed / "splits_final.json"
    folds = [*json.loads(splits.read_text()), {"train": ["tr_00", "tr_03"], "val": ["tr_04"]}]
    splits.write_text(json.dumps(folds))
    arguments = [*arguments, "-o", "960", "-f", "0", "1", "--dry-run"]
    with pytest.raises(UserError, match=r"no checkpoint .*fold_1"):
        main(arguments)
    shutil.copytree(model / "fold_0", model / "fold_1")
    capsys.readouterr()
    main(arguments)
    folder = model / "unlabeled_fold_0_1_without_mirroring"
    assert f"-o {folder} -d {dataset.name} -c 3d_fullres -f 0 1 -tr" in capsys.readouterr().out


@pytest.mark.timeout(600)
def test_two_rounds_and_going_on(trained, in_process, capsys):
    dataset, model, arguments = trained()
    arguments = [*arguments, "-o", "960", "--rounds", "2", "--keep", "0.5"]
    capsys.readouterr()
    main(arguments)
    steps = ["nnUNetv2_predict", "nnUNetv2_move_plans_between_datasets", "nnUNetv2_preprocess", "nnUNetv2_train"]
    assert commands_in(capsys.readouterr().out) == steps * 2

    results = model.parent.parent
    teacher = dataset.name
    for name in ("Dataset960_Tiny_pseudo1", "Dataset961_Tiny_pseudo2"):
        record = json.loads((dataset.folders.raw / name / "ssl_pseudolabel.json").read_text())
        assert record["source"] == dataset.name
        assert record["made_with"]["teacher"]["dataset"] == teacher
        teacher = name
        student = results / name / model.name
        assert json.loads((student / "plans.json").read_text()) == {**dataset.plans, "dataset_name": name}
        prepared = dataset.folders.preprocessed / name / f"{dataset.plans_name}_3d_fullres"
        cases = {*record["labeled"], *record["pseudo_labeled"], "tr_03", "tr_04"}
        assert {file.stem for file in prepared.glob("*.pkl")} == cases
        summary = json.loads((student / "fold_0" / "validation" / "summary.json").read_text())
        validated = {Path(case["prediction_file"]).name for case in summary["metric_per_case"]}
        assert validated == {"tr_03.nii.gz", "tr_04.nii.gz"}

    main(arguments)
    assert commands_in(capsys.readouterr().out) == []
    # a student that was stopped while it was validating goes on
    fold = results / "Dataset961_Tiny_pseudo2" / model.name / "fold_0"
    (fold / "validation" / "summary.json").unlink()
    main(arguments)
    output = capsys.readouterr().out
    assert commands_in(output) == ["nnUNetv2_train"]
    assert re.search(r"nnUNetv2_train .* --c$", output, re.M)
    assert (fold / "validation" / "summary.json").is_file()


def test_other_plans_than_the_teachers_are_refused(trained):
    """The students' network, spacing and normalization would be others."""
    dataset, model, arguments = trained()
    file = dataset.preprocessed / f"{dataset.plans_name}.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["patch_size"] = [8, 8, 8]
    file.write_text(json.dumps(plans))
    with pytest.raises(UserError, match=f"{file} is not what the teacher was trained with .{model}"):
        main([*arguments, "-o", "960", "--rounds", "1", "--keep", "0.5"])


def test_hidden_files_are_not_predicted(trained, capsys):
    """macOS leaves them, and nnU-Net would take them for images."""
    dataset, model, arguments = trained()
    (dataset.raw / "imagesUn" / "._un_00_0000.nii.gz").write_bytes(b"resource fork")
    main([*arguments, "-o", "960", "--keep", "0.5", "--dry-run"])
    [predict] = [line for line in capsys.readouterr().out.splitlines() if "nnUNetv2_predict" in line]
    assert f"-i {model / 'unlabeled_fold_0_without_mirroring' / 'to_predict'} " in predict
