"""Figure 6 shows the Dice of each case as plain counting gives it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.figure_folders import TRAINERS, MadeUp, everything, make_folders, set_environment

from nnunet_ssl.errors import UserError
from nnunet_ssl.figures.boxes import boxes_figure, draw_boxes, evaluate
from nnunet_ssl.figures.predictions import with_predictions


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    set_environment(monkeypatch, tmp_path)
    return make_folders(tmp_path)


def counted(made: MadeUp, trainer: str) -> np.ndarray:
    """Dice in %, ``[classes and their mean, cases]``."""
    rows = []
    for label in (1, 2):
        pairs = [(made.truth(case) == label, made.prediction(trainer, case) == label) for case in "abc"]
        rows.append([200 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs])
    return np.array([*rows, np.mean(rows, 0)])


def test_points_and_boxes_are_the_dice_of_the_files(made: MadeUp) -> None:
    runs, cases, options = everything(made)
    figure = boxes_figure(evaluate(with_predictions(runs, cases, made.out, options), cases, options))
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["shell", "core", "Mean"]
    points = [line.get_ydata() for line in axes.lines if line.get_marker() == "."]
    wanted = np.stack([counted(made, trainer) for trainer in TRAINERS], 1).reshape(6, 3)  # by class, then run
    assert np.allclose(points, wanted)
    joined = [line for line in axes.lines if line.get_color() == "0.5"]
    assert len(joined) == 9, "a line a class and case"
    assert np.allclose(joined[0].get_ydata(), wanted[:2, 0])
    medians = [line.get_ydata()[0] for line in axes.lines if line.get_color() == "black" and line.get_linewidth() > 1]
    assert np.allclose(medians, np.median(wanted, 1))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [run.name for run in runs]


def test_caption_has_files_and_the_paired_comparison(made: MadeUp) -> None:
    runs, cases, options = everything(made)
    draw_boxes(runs, cases, made.out, options)
    assert sorted(f.name for f in made.out.iterdir()) == ["boxes.md", "boxes.pdf", "boxes.png"]
    caption = (made.out / "boxes.md").read_text(encoding="utf-8")
    means = [counted(made, trainer)[2].mean() for trainer in TRAINERS]
    assert f"({means[1] - means[0]:+.2f})" in caption
    assert "Wilcoxon" in caption
    assert not [line for line in caption.splitlines() if line.startswith("# ")], "a caption has no title of a page"
    for run in runs:
        assert f"`{run.checkpoint_file}`" in caption
        assert f"`{run.fold_folder / 'validation'}` (nnU-Net's validation, with mirroring)" in caption


def test_one_run_is_enough(made: MadeUp) -> None:
    runs, cases, options = everything(made, ["core"])
    draw_boxes(runs[:1], cases, made.out, options)
    mean = counted(made, TRAINERS[0])[1].mean()
    assert f"| core | {mean:.2f}" in (made.out / "boxes.md").read_text(encoding="utf-8")


def test_what_is_undefined_is_left_out(made: MadeUp) -> None:
    runs, cases, options = everything(made)
    evaluations = evaluate(with_predictions(runs, cases, made.out, options), cases, options)
    evaluations[0].cases[1].metrics["LabeledOnly"][1]["Dice"] = np.nan
    (axes,) = boxes_figure(evaluations).axes
    points = [line.get_ydata() for line in axes.lines if line.get_marker() == "."]
    assert np.isnan(points[0]).tolist() == [False, True, False]
    assert not np.isnan(points[1]).any()
    # the mean of that case is over the class that both have
    second = counted(made, TRAINERS[1])
    assert points[5] == pytest.approx([second[2, 0], second[1, 1], second[2, 2]])


def test_many_classes_take_several_rows(made: MadeUp) -> None:
    runs, cases, options = everything(made)
    for label in range(3, 20):
        options.labels[f"class {label}"] = label
        options.classes.append(label)
    figure = boxes_figure(evaluate(with_predictions(runs, cases, made.out, options), cases, options))
    ticks = [[label.get_text() for label in axes.get_xticklabels()] for axes in figure.axes]
    assert [len(row) for row in ticks] == [10, 10]
    assert ticks[1][-1] == "Mean"


def test_a_damaged_prediction_is_named(made: MadeUp) -> None:
    file = made.fold(TRAINERS[0]) / "validation/c.nii.gz"
    file.write_bytes(file.read_bytes()[:60])
    runs, cases, options = everything(made)
    with pytest.raises(UserError, match=f"{file} cannot be read"):
        draw_boxes(runs, cases, made.out, options)
