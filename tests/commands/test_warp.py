"""``nnUNetv2_ssl_warp``: what it refuses, what it says, and the whole way to a prediction by stock commands."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from nnunet_ssl.commands.warp import main
from nnunet_ssl.errors import UserError


def warp(dataset, *more: object) -> None:
    arguments = ["-d", dataset.id, "-c", dataset.configuration, "-p", dataset.plans_name, "-np", 1, *more]
    main([str(argument) for argument in arguments])


def folder_of(dataset) -> Path:
    return dataset.preprocessed / f"{dataset.plans_name}_{dataset.configuration}_warped"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pairs", 0), "--pairs: '0' must be a whole number from 1"),
        (("--channel", 1), "--channel 1: the channels of Dataset901_Tiny are 0 to 0"),
        (("--channel", -1), "--channel"),
        (("--channel", "each"), "--channel: 'each'"),
        (("--groups", "nowhere.json"), "nowhere.json cannot be read"),
        (("-np", "all"), "-np: 'all'"),
        (("-c", "3d_lowres"), "3d_lowres"),
        (("-d", 950), "dataset 950: there is not exactly one dataset"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence_and_makes_nothing(tiny_copy, arguments, message):
    dataset = tiny_copy()
    with pytest.raises(UserError, match=message):
        warp(dataset, *arguments)
    assert not folder_of(dataset).exists()
    assert not Path(str(folder_of(dataset)).replace("_warped", "_unlabeled")).exists()


@pytest.mark.usefixtures("quick_registration")
def test_a_picture_that_cannot_be_written_is_not_a_crash(tiny_copy, monkeypatch):
    dataset = tiny_copy()

    def read_only(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder_of(dataset) / "warps.png"))

    monkeypatch.setattr("nnunet_ssl.figures.warps.save_figure", read_only)
    with pytest.raises(UserError, match=r"warps\.png cannot be written \(Permission denied\)\. The warps are complete"):
        warp(dataset, "--pairs", 1)


@pytest.mark.usefixtures("quick_registration")
def test_it_warps_the_training_cases_of_all_folds_and_draws_them(tiny_copy, capsys):
    dataset = tiny_copy()
    groups = dataset.folders.raw / "patients.json"
    groups.write_text(json.dumps({"un_00": "tr_04"}))
    folds = [{"train": ["tr_00", "tr_01"], "val": ["tr_04"]}, {"train": ["tr_01", "tr_02"], "val": ["tr_04"]}]
    (dataset.preprocessed / "splits_final.json").write_text(json.dumps(folds))
    warp(dataset, "--pairs", 1, "--groups", groups)
    assert "3d_fullres: 3 warps are ready in" in (told := capsys.readouterr().out)
    assert f"look at {folder_of(dataset) / 'warps.png'}" in told
    manifest = json.loads((folder_of(dataset) / "manifest.json").read_text())
    assert sorted(entry["moving"] for entry in manifest["cases"].values()) == ["tr_00", "tr_01", "tr_02"]
    assert json.loads(Path(f"{folder_of(dataset)}_groups.json").read_text()) == {"un_00": "tr_04"}
    assert (folder_of(dataset) / "warps.png").stat().st_size > 10_000
    before = sorted(folder_of(dataset).rglob("*"))
    warp(dataset, "--pairs", 1)
    warp(dataset, "--pairs", 1, "--channel", 0)  # the one that there is
    assert "registering" not in capsys.readouterr().out
    assert sorted(folder_of(dataset).rglob("*")) == before


def test_help_names_every_argument(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    arguments = set(re.findall(r"^  (--?[a-z]+)", told, re.MULTILINE))
    assert arguments >= {"-d", "-c", "-p", "--pairs", "--groups", "--channel", "-np"}


@pytest.mark.slow
def test_the_real_commands_from_warping_to_predicting(tiny_copy, run_nnunet, tmp_path):
    dataset = tiny_copy()
    done = run_nnunet("nnUNetv2_ssl_warp", "-d", dataset.id, "-c", "3d_fullres", "--pairs", 1)
    assert "5 warps are ready in" in done.stdout
    name = "nnUNetTrainerWarps_1epochs"
    trained = run_nnunet("nnUNetv2_train", dataset.id, "3d_fullres", 0, "-tr", name, "-device", "cpu", settings={})
    assert "registering" not in trained.stdout
    assert "Learning from 4 warps in" in trained.stdout
    fold = dataset.folders.results / dataset.name / f"{name}__nnUNetPlans__3d_fullres" / "fold_0"
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    run_nnunet(
        "nnUNetv2_predict", "-d", dataset.id, "-c", "3d_fullres", "-f", 0, "-tr", name, "-device", "cpu",
        "-i", dataset.raw / "imagesTs", "-o", tmp_path / "predictions", "-npp", 1, "-nps", 1,
    )  # fmt: skip
    assert sorted(file.name for file in (tmp_path / "predictions").glob("*.nii.gz")) == ["ts_00.nii.gz", "ts_01.nii.gz"]


@pytest.mark.usefixtures("quick_registration")
def test_where_only_prepared_data_are(tiny_copy, capsys):
    """As on a cluster, before a first training has written the split."""
    dataset = tiny_copy()
    warp(dataset, "--pairs", 1)
    shutil.rmtree(folder_of(dataset))
    shutil.rmtree(dataset.raw)
    warp(dataset, "--pairs", 1)
    assert "5 warps are ready" in capsys.readouterr().out.splitlines()[-1]


def test_a_split_of_other_cases(tiny_copy):
    dataset = tiny_copy()
    split = [{"train": ["tr_00", "gone"], "val": ["tr_01"]}]
    (dataset.preprocessed / "splits_final.json").write_text(json.dumps(split))
    with pytest.raises(UserError, match=r"splits_final\.json names gone, but .* Run nnUNetv2_preprocess"):
        warp(dataset)
