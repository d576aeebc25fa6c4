"""Figure 5 shows the numbers of the logs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.damage import RunsCode

from nnunet_ssl.errors import UserError
from nnunet_ssl.figures.curves import PANELS, curves_figure, draw_curves, read_curves
from nnunet_ssl.figures.options import FigureOptions
from nnunet_ssl.figures.runs import TrainedRun

OPTIONS = FigureOptions({}, {}, [])
LOG = {
    "mean_fg_dice": [0.1, 0.5, 0.6],
    "ema_fg_dice": [np.float64(0.1), 0.14, 0.186],
    "train_losses": [np.float32(1.0), 0.5, 0.25],
    "val_losses": [1.1, 0.6, 0.4],
    "lrs": [1.0, 0.5, 0.1],
}
SSL = """epoch,shta_token_accuracy,loss_sup,loss_cps,loss_shta,loss_sup_second,weight_cps,weight_shta
0,0.8,0.9,2,3,0.8,0.5,0.1
1,,0.7,4,1,0.6,1.0,0.1
2,0.95,0.5,6,2,0.4,1.0,0.2
"""


def make_run(folder: Path, name: str, csv: str | None, log: dict | None = LOG) -> TrainedRun:
    run = TrainedRun(name, f"nnUNetTrainer{name}", folder / name, "0", "checkpoint_final.pth")
    run.fold_folder.mkdir(parents=True)
    content = {"network_weights": {"w": torch.zeros(3)}} | ({"logging": log} if log else {})
    torch.save(content, run.checkpoint_file)
    if csv:
        (run.fold_folder / "ssl_log.csv").write_text(csv)
    return run


def test_a_run_of_this_package(tmp_path: Path) -> None:
    curves = read_curves(make_run(tmp_path, "A", SSL))
    assert set(curves) == {"dice", "labeled", "validation", "further", "shta_token_accuracy"}
    assert curves["dice"].values.tolist() == LOG["ema_fg_dice"]
    assert curves["dice"].raw.tolist() == LOG["mean_fg_dice"]
    assert curves["labeled"].values.tolist() == [0.9, 0.7, 0.5]
    assert curves["further"].values == pytest.approx([2 * 0.5 + 3 * 0.1, 4 + 1 * 0.1, 6 + 2 * 0.2])
    # an epoch without a value has no point
    assert curves["shta_token_accuracy"].epochs.tolist() == [0, 2]


def test_terms_may_come_and_go_during_a_training(tmp_path: Path) -> None:
    """As those of BCP, AUSS and ABD."""
    csv = "epoch,loss_sup,loss_early,loss_late,weight_late\n0,1,5,,\n1,1,4,3,0.5\n2,1,,2,1\n3,1,,,\n"
    further = read_curves(make_run(tmp_path, "A", csv))["further"]
    assert further.epochs.tolist() == [0, 1, 2]
    assert further.values.tolist() == [5, 4 + 3 * 0.5, 2]


def test_a_model_that_does_not_segment_has_no_dice(tmp_path: Path) -> None:
    run = make_run(tmp_path, "A", "epoch,loss_masked,loss_masked_validation\n0,1,1.1\n")
    torch.save(torch.load(run.checkpoint_file, weights_only=False) | {"trainer_name": "nnUNetTrainerMAE"},
               run.checkpoint_file)  # fmt: skip
    with pytest.raises(UserError, match=f"{run.checkpoint_file} is of nnUNetTrainerMAE, .* progress.png"):
        draw_curves([run], [], tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_trainer_of_nnunets_has_nnunets_log(tmp_path: Path) -> None:
    curves = read_curves(make_run(tmp_path, "A", None))
    assert set(curves) == {"dice", "labeled", "validation"}
    assert curves["labeled"].values.tolist() == [1.0, 0.5, 0.25]


def test_losses_of_both_branches_of_sasnet_are_of_labels(tmp_path: Path) -> None:
    csv = "epoch,loss_seg_high,loss_seg_low,loss_plc,weight_seg_high,weight_plc\n0,1,2,3,0.5,0.25\n"
    curves = read_curves(make_run(tmp_path, "A", csv))
    assert curves["labeled"].values.tolist() == [1]
    assert curves["further"].values.tolist() == [0.75]


def test_lines_are_the_curves_and_the_caption_names_the_files(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "A", None), make_run(tmp_path, "B", SSL)]
    (runs[1].fold_folder / "ssl_settings.json").write_text('{"settings": {"num_iterations_per_epoch": 64}}')
    curves = {run.name: read_curves(run) for run in runs}
    figure = curves_figure(curves)
    shown = {axes.get_ylabel(): axes for axes in figure.axes}
    assert list(shown) == [PANELS[name].heading for name in PANELS if name != "shta_hard_share"]
    dice = [line.get_ydata() for line in shown[PANELS["dice"].heading].lines if line.get_label() == "B"]
    assert dice[0] == pytest.approx(100 * np.array(LOG["ema_fg_dice"], float))
    assert [line.get_label() for line in shown[PANELS["further"].heading].lines] == ["B"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["A", "B"]

    draw_curves(runs, [], tmp_path / "out", OPTIONS)
    caption = (tmp_path / "out/curves.md").read_text(encoding="utf-8")
    assert f"| A | 3 | not recorded | `{runs[0].checkpoint_file}` |" in caption
    assert f"| B | 3 | 64 | `{runs[1].checkpoint_file}`, `{runs[1].fold_folder / 'ssl_log.csv'}` |" in caption
    assert PANELS["shta_hard_share"].heading not in caption


def test_a_model_without_a_log_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, "A", None, log=None)
    with pytest.raises(UserError, match=f"{run.checkpoint_file} .* it has no 'logging'.*--which"):
        draw_curves([run], [], tmp_path, OPTIONS)
    run.checkpoint_file.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=f"{run.checkpoint_file} is cut off, damaged or no checkpoint.*--which"):
        read_curves(run)


def test_a_log_that_lacks_what_is_drawn_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, "A", None, log=LOG | {"val_losses": 3})
    with pytest.raises(UserError, match=f"{run.checkpoint_file} has another log than nnU-Net's .*--which"):
        read_curves(run)


def test_a_checkpoint_from_a_stranger_runs_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, "A", None, log=LOG | {"lrs": [RunsCode(tmp_path / "ran")]})
    with pytest.raises(UserError, match=f"{run.checkpoint_file} calls .*exec"):
        read_curves(run)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, "A", "epoch,loss_sup\n0,abc\n")
    with pytest.raises(UserError, match=r"ssl_log.csv is not the log of a training"):
        read_curves(run)
