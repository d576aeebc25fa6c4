"""``nnUNetv2_ssl_figures``: what it refuses, what it skips, and the whole way from two trainings to all figures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.figure_folders import TRAINERS, MadeUp, make_folders, set_environment

from nnunet_ssl.commands.figures import FIGURES, main
from nnunet_ssl.errors import UserError


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    set_environment(monkeypatch, tmp_path)
    return make_folders(tmp_path)


def figures(made: MadeUp, *arguments: str, trainers: tuple[str, ...] = TRAINERS) -> None:
    main(["-d", "990", "-c", "3d_fullres", "-tr", *trainers, "-o", str(made.out), "-device", "cpu", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-f", "first"), "-f: 'first' is not a fold"),
        (("-np", "0"), "-np: '0' must be"),
        (("--classes", "spleen"), "--classes spleen is not a class"),
        (("--names", "A"), "--names gives 1 name"),
        (("-p", "nnUNetPlans_other"), "there is no such trained model"),
    ],
)
def test_wrong_arguments(made: MadeUp, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        figures(made, *arguments)
    assert not made.out.exists()


def test_what_cannot_be_made_is_skipped_and_a_failure_loses_no_other(
    made: MadeUp, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run without SHTA, whose checkpoint is empty: no pair, no tokens, no log; cases and boxes need none."""
    with pytest.raises(UserError, match=r"^nnunet_ssl: 1 figure.s. could not be drawn.\n  curves: .*is empty"):
        figures(made, trainers=TRAINERS[:1])
    written = {file.stem.split("_")[0] for file in made.out.glob("*.pdf")}
    assert written == {"cases", "boxes"}
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines() if line.startswith("Skipped")] == [
        "Skipped entropy",
        "Skipped tokens",
        "Skipped assignment",
    ]


def test_what_was_asked_for_is_refused_after_the_others_are_drawn(made: MadeUp) -> None:
    with pytest.raises(UserError, match="tokens: none of the trainers has SHTA"):
        figures(made, "--which", "tokens", "boxes", "--names", "Mine", trainers=TRAINERS[:1])
    assert sorted(file.name for file in made.out.iterdir()) == ["boxes.md", "boxes.pdf", "boxes.png"]
    assert "- Mine: `" in (made.out / "boxes.md").read_text(encoding="utf-8")


def test_what_an_earlier_call_drew_is_removed(made: MadeUp) -> None:
    """Also of a figure that is skipped now; never of one that was not asked for."""
    made.out.mkdir()
    mine = [made.out / name for name in ("cases_of_mine.md", "curves.png", "notes.md")]
    old = [made.out / name for name in ("cases_9_old.png", "entropy.pdf", "tokens.md", "boxes.png")]
    for file in (*mine, *old):
        file.write_text("old")
    with pytest.raises(UserError, match="tokens: none of the trainers has SHTA"):
        figures(made, "--which", "cases", "boxes", "tokens", "--classes", "core", trainers=TRAINERS[:1])
    assert (made.out / "entropy.pdf").exists()
    with pytest.raises(UserError, match=r"curves: .*is empty.*no nnU-Net log"):
        figures(made, "--classes", "core", trainers=TRAINERS[:1])
    drawn = [f"{name}.{kind}" for name in ("boxes", "cases_2_core") for kind in ("md", "pdf", "png")]
    assert sorted(file.name for file in made.out.iterdir()) == sorted([*drawn, "cases_of_mine.md", "notes.md"])
    assert (made.out / "boxes.png").read_bytes() != b"old"


def test_what_cannot_be_predicted_is_one_sentence(made: MadeUp, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoints are empty, and without mirroring the validation cases must be predicted."""
    with pytest.raises(UserError) as raised:
        figures(made, "--disable_tta", "--which", "cases", "boxes", "entropy", "curves")
    lines = str(raised.value).splitlines()
    assert lines[0] == "nnunet_ssl: 4 figure(s) could not be drawn."
    assert lines[1].startswith("  cases, entropy, boxes: ")
    assert "checkpoint_final.pth is empty" in lines[1]
    assert lines[2].startswith("  curves: ")
    assert len(lines) == 3
    assert "Traceback" not in capsys.readouterr().err


def test_finished_predictions_are_taken_as_they_are(made: MadeUp, tmp_path: Path) -> None:
    folders = [tmp_path / f"predicted_{i}" for i in range(2)]
    for trainer, folder in zip(TRAINERS, folders, strict=True):
        shutil.move(made.fold(trainer) / "validation", folder)
    command = ["--which", "boxes", "cases", "--disable_tta", "-pred"]
    figures(made, *command, *map(str, folders))
    for name in ("boxes", "cases_1_shell"):
        caption = (made.out / f"{name}.md").read_text(encoding="utf-8")
        assert all(f"`{folder}` (given with -pred)" in caption for folder in folders)
    assert not (made.out / "predictions").exists()
    with pytest.raises(UserError, match="-pred gives 1 folder"):
        figures(made, *command, str(folders[0]))


def test_models_of_several_results_folders(made: MadeUp, tmp_path: Path) -> None:
    """Two of the same trainer, one of them elsewhere: the names tell them apart, in files too."""
    elsewhere = tmp_path / "elsewhere" / made.raw.name / made.fold(TRAINERS[0]).parent.name
    shutil.copytree(made.fold(TRAINERS[0]).parent, elsewhere)
    models = ["-m", str(made.fold(TRAINERS[0]).parent), str(elsewhere)]
    command = ["-d", "990", "-o", str(made.out), "-device", "cpu", "--which", "boxes"]
    with pytest.raises(UserError, match=r"-m gives several models of the same trainer. Tell them apart with --names"):
        main([*command, *models])
    main([*command, *models, "--names", "Here", "Over there"])
    caption = (made.out / "boxes.md").read_text(encoding="utf-8")
    assert f"`{elsewhere}" in caption
    assert "Over there" in caption
    with pytest.raises(UserError, match=r"is no such trained model. Name folders <trainer>"):
        main([*command, "-m", str(tmp_path)])
    content = json.loads((elsewhere / "dataset.json").read_text()) | {"labels": {"background": 0, "spleen": 1}}
    (elsewhere / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"has the labels .*spleen.*Name the dataset of the models with -d"):
        main([*command, "-m", str(elsewhere)])


def test_trainers_need_a_configuration(made: MadeUp) -> None:
    with pytest.raises(UserError, match="-tr needs -c"):
        main(["-d", "990", "-tr", TRAINERS[0], "-o", str(made.out)])


def test_only_the_chosen_classes_are_drawn(made: MadeUp) -> None:
    figures(made, "--which", "cases", "--classes", "core")
    assert [file.stem for file in made.out.glob("*.png")] == ["cases_2_core"]


@pytest.mark.slow
def test_from_two_trainings_to_all_figures(
    tiny: Callable, own_results: Path, run_nnunet: Callable, tmp_path: Path
) -> None:
    dataset = tiny("3d")
    trainers = ["nnUNetTrainerLabeledOnly_1epochs", "nnUNetTrainerSHTA_CPS_1epochs"]
    for trainer in trainers:
        run_nnunet(
            "nnUNetv2_train", dataset.id, dataset.configuration, 0, "-tr", trainer, "-p", dataset.plans_name,
            "-device", "cpu", settings={"num_iterations_per_epoch": 10},
        )  # fmt: skip
    out = tmp_path / "figures"
    command = [
        "nnUNetv2_ssl_figures", "-d", dataset.id, "-c", dataset.configuration, "-p", dataset.plans_name, "-o", out,
        "-tr", *trainers, "-device", "cpu", "-np", 1,
    ]  # fmt: skip
    printed = run_nnunet(*command)
    assert printed.stdout.count("Wrote ") + printed.stdout.count("Skipped ") == len(FIGURES)
    for name in ("cases_1_shell", "cases_2_core", "curves", "boxes"):
        for kind in ("png", "pdf", "md"):
            assert (out / f"{name}.{kind}").stat().st_size > 200
    for figure in ("tokens", "assignment"):
        assert f"Wrote {figure}" in printed.stdout, "a run with SHTA has them"
        assert list(out.glob(f"{figure}*.pdf"))
    assert "Predicting, SHTA_CPS: 100%" in printed.stderr

    # the second time nothing is predicted, and the pictures are the same
    before = {file.name: file.read_bytes() for file in out.glob("*.png")}
    printed = run_nnunet(*command)
    assert "Predicting" not in printed.stderr
    assert {file.name: file.read_bytes() for file in out.glob("*.png")} == before


def test_full_disk(made: MadeUp) -> None:
    """The limit of a file's size stands for it: one sentence a figure, and nothing half-drawn."""
    code = (
        "import resource, sys; from nnunet_ssl.commands.figures import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); main(sys.argv[1:])"
    )
    arguments = ["-d", "990", "-c", "3d_fullres", "-tr", *TRAINERS, "-o", str(made.out), "-device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--which", "boxes"], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"boxes: {made.out}/boxes.png cannot be written (File too large). Make room" in done.stderr
    assert not list(made.out.iterdir())


def test_a_folder_that_cannot_be_made(made: MadeUp) -> None:
    made.out.write_text("in the way")
    with pytest.raises(UserError, match=f"{made.out} cannot be written .*name another folder with -o"):
        figures(made, "--which", "boxes")
