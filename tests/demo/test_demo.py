"""The demo as a user runs it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from helpers.damage import JSON_DAMAGE, with_byte_order_mark
from matplotlib.image import imread

from nnunet_ssl.commands.demo import main
from nnunet_ssl.demo.dataset import write_dataset
from nnunet_ssl.demo.run import Demo, dice_table, draw_figure, figure_slice, read_dice
from nnunet_ssl.errors import UserError


def test_table_puts_both_trainers_side_by_side():
    results = {
        "trainers": {
            "nnUNetTrainerLabeledOnly": {"test_dice": {"liver": 0.5, "mean": 0.4}},
            "nnUNetTrainerWarps": {"test_dice": {"liver": 0.625, "mean": 0.35}},
        }
    }
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in dice_table(results).splitlines()]
    assert rows[0][1:] == ["nnUNetTrainerLabeledOnly", "nnUNetTrainerWarps", "difference"]
    assert rows[2] == ["liver", "0.500", "0.625", "+0.125"]
    assert rows[3] == ["mean", "0.400", "0.350", "-0.050"]


def test_figure_shows_the_slice_with_most_organs():
    labels = np.zeros((4, 5, 5), int)
    labels[1] = 1  # much of one organ
    labels[2, 0, :2] = [1, 2]
    labels[3, 0, :3] = [1, 2, 2]  # as many organs, more of them
    assert figure_slice(labels) == 3


def test_figure_is_drawn(tmp_path):
    raw = write_dataset(tmp_path, 0, labeled=1, unlabeled=1, test=2)
    predictions = {"nnUNetTrainerLabeledOnly": raw / "labelsTs", "nnUNetTrainerWarps": raw / "labelsTs"}
    draw_figure(raw, predictions, tmp_path / "figure.png")
    height, width, _ = imread(tmp_path / "figure.png").shape
    assert width > 1.5 * height  # four panels for each of two cases


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--epochs", "0"], "--epochs: '0'"), (["--seed", "-1"], "--seed: '-1'")],
)
def test_impossible_arguments_are_refused(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main(["-o", str(tmp_path / "demo"), *arguments])
    assert not (tmp_path / "demo").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="choose another -o"):
        main(["-o", str(tmp_path), "-device", "cpu"])
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_dry_run_prints_the_commands_and_does_nothing(tmp_path, capsys):
    folder = tmp_path / "demo"
    main(["--dir", str(folder), "--device", "cpu", "--epochs", "3", "--dry-run"])  # the old spellings
    commands = re.findall(r"^  \$ (\S+)", capsys.readouterr().out, re.M)
    train_and_test = ["nnUNetv2_train", "nnUNetv2_predict", "nnUNetv2_evaluate_folder"]
    assert commands == ["nnUNetv2_plan_and_preprocess", "python", "nnUNetv2_ssl_warp", *train_and_test, *train_and_test]
    assert not folder.exists()
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="is not a demo; choose another -o"):
        main(["-o", str(tmp_path), "-device", "cpu", "--dry-run"])


def test_another_seed_needs_another_folder(tmp_path):
    (tmp_path / "demo.json").write_text('{"seed": 0}')
    with pytest.raises(UserError, match="seed 0"):
        Demo(tmp_path, 1, "cpu", 1).run()


def test_damaged_files_are_named(tmp_path):
    demo, note = Demo(tmp_path, 1, "cpu", 0), tmp_path / "demo.json"
    summary = tmp_path / "predictions" / "nnUNetTrainerCPS_1epochs" / "summary.json"
    summary.parent.mkdir(parents=True)
    dice = {"Dice": 0.5}
    contents = {
        note: ({"seed": 0}, demo._refuse_other),
        summary: (
            {"mean": {str(label): dice for label in range(1, 6)}, "foreground_mean": dice},
            lambda: read_dice(summary),
        ),
    }
    for file, (content, read) in contents.items():
        for name, damage in JSON_DAMAGE.items():
            file.write_text(json.dumps(content))
            with_byte_order_mark(file)
            read()
            damage(file)
            if name == "unreadable":  # as if it were not there
                file.rmdir()
                continue
            with pytest.raises(UserError, match=str(file)):
                read()
        file.write_text(json.dumps(content))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whole_demo(tmp_path, run_nnunet):
    folder = tmp_path / "demo"
    arguments = ("-o", folder, "--epochs", 1, "-device", "cpu")
    output = run_nnunet("nnUNetv2_ssl_demo", *arguments, timeout=1700).stdout
    results = json.loads((folder / "results_1epochs.json").read_text())
    for dice in (trainer["test_dice"] for trainer in results["trainers"].values()):
        assert set(dice) == {"liver", "spleen", "kidney", "nodule", "vessel", "mean"}
        assert all(0 <= value <= 1 for value in dice.values())
        assert f"{dice['mean']:.3f}" in output
    assert (folder / "demo_1epochs.png").stat().st_size > 10_000

    again = run_nnunet("nnUNetv2_ssl_demo", *arguments).stdout
    assert "Training" not in again  # everything is there already
