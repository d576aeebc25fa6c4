"""Figure 2: entropies, the rule that chooses, and windows that show the voxels that the caption names."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.figure_folders import MadeUp, everything, make_folders, set_environment, write
from real_runs import Maker, options_of, some_cases, train

from nnunet_ssl.errors import UserError
from nnunet_ssl.figures.options import FigureOptions, NotApplicable
from nnunet_ssl.figures.predictions import (
    current_folder,
    prediction_folder,
    with_given_predictions,
    with_predictions,
)
from nnunet_ssl.figures.runs import load_predictor
from nnunet_ssl.figures.shta import entropy as module
from nnunet_ssl.figures.shta.entropy import (
    best_window,
    choose_cases,
    draw_entropy,
    entropy_figure,
    normalized_entropy,
    read_row,
    window_side,
)


def test_entropy_of_known_distributions() -> None:
    columns = np.array([[1, 0, 0], [1 / 3] * 3, [0.5, 0.5, 0], [0.7, 0.2, 0.1]])
    found = normalized_entropy(columns.T.reshape(3, 2, 2).astype(np.float16)).ravel()
    wanted = [-sum(p * math.log(p) for p in column if p) / math.log(3) for column in columns]
    assert found == pytest.approx(wanted, abs=1e-3)
    assert found[:2] == pytest.approx([0, 1], abs=1e-3)


@pytest.mark.parametrize("side", [(3, 4), (2, 2), (5, 1), (6, 7)])
def test_the_best_window_is_that_of_trying_all(side: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for density in (0.02, 0.3, 1.0):
        values = rng.random((3, 6, 7)) * (rng.random((3, 6, 7)) < density)
        (rows, columns), best = side, -1.0
        for z, r, c in itertools.product(range(3), range(7 - rows), range(8 - columns)):
            best = max(best, values[z, r : r + rows, c : c + columns].sum())
        z, (r, c) = best_window(values, side)
        window = values[z, r : r + rows, c : c + columns]
        assert window.shape == side
        assert window.sum() == pytest.approx(best)


def test_windows_are_square_in_millimetres_and_within_the_slice() -> None:
    assert window_side((200, 200), (1, 1)) == (50, 50)
    assert window_side((200, 100), (1, 2)) == (50, 25)
    assert window_side((50, 40), (1, 1)) == (24, 24)
    assert window_side((10, 200), (1, 1)) == (10, 50)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    set_environment(monkeypatch, tmp_path)
    return make_folders(tmp_path, ignore=True)


def test_cases_are_those_in_which_the_runs_disagree_most(made: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, cases, options = everything(made)
    runs = with_predictions(runs, cases, made.out, options)
    counts, size = {}, {}
    for label, case in itertools.product((1, 2), cases):
        truth = made.truth(case.name)
        one, other = (made.prediction(run.trainer, case.name) == label for run in runs)
        counts[label, case.name] = ((one ^ other) & (truth != 3)).sum()
        size[label] = size.get(label, 0) + (truth == label).sum()
    found = choose_cases(runs, cases, options)
    assert {label: case.name for label, case in found.items()} == {
        label: max("abc", key=lambda name: counts[label, name]) for label in (1, 2)
    }
    assert choose_cases(runs[::-1], cases[::-1], options) == found  # whoever comes first
    assert choose_cases([runs[0], runs[0]], cases, options) == {}
    monkeypatch.setattr(module, "MAX_ROWS", 1)
    share = {label: sum(counts[label, name] for name in "abc") / size[label] for label in (1, 2)}
    assert list(choose_cases(runs, cases, options)) == [max(share, key=share.get)]


def test_a_class_that_no_truth_has_is_not_shown(made: MadeUp) -> None:
    runs, cases, options = everything(made)
    runs = with_predictions(runs, cases, made.out, options)
    for case in cases:
        truth = made.truth(case.name)
        write(np.where(truth == 2, 0, truth).astype(np.uint8), case.label)
    assert list(choose_cases(runs, cases, options)) == [1]


def test_the_caption_names_the_folder_of_the_predictions(made: MadeUp, tmp_path: Path) -> None:
    """Given ones are not where the entropies are."""
    runs, cases, options = everything(made)
    for run in runs:
        shutil.copytree(run.fold_folder / "validation", tmp_path / f"given_{run.name}")
    given = with_given_predictions(runs, [tmp_path / f"given_{run.name}" for run in runs], cases, options)
    with_entropies(made, given, cases, options)
    draw_entropy(given, cases, made.out, options)
    told = (made.out / "entropy.md").read_text(encoding="utf-8")
    for run in given:
        assert f"`{run.predicted}` (given with -pred)" in told
        assert f"- {run.name}: `{prediction_folder(run, made.out)}`" in told


def test_what_this_figure_cannot_show(made: MadeUp, tmp_path: Path) -> None:
    runs, cases, options = everything(made)
    with pytest.raises(NotApplicable, match="two runs"):
        draw_entropy(runs[:1], cases, made.out, options)
    regions = dataclasses.replace(options, labels={"whole": (1, 2), "core": (2,)})
    with pytest.raises(NotApplicable, match="regions"):
        draw_entropy(runs, cases, made.out, regions)
    same = [runs[0], dataclasses.replace(runs[0], name="B")]
    with pytest.raises(NotApplicable, match="predict the same"):
        draw_entropy(same, cases, made.out, options)


def test_with_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, tmp_path)
    made = make_folders(tmp_path, labels={"background": 0, "organ": 1})
    runs, cases, options = everything(made)
    with_entropies(made, runs, cases, options)
    draw_entropy(runs, cases, made.out, options)
    assert "| organ |" in (made.out / "entropy.md").read_text(encoding="utf-8")


def with_entropies(made: MadeUp, runs: list, cases: list, options: FigureOptions) -> dict[str, np.ndarray]:
    """Write made-up entropies where those of predictions lie; gives back the last case's by trainer."""
    rng = np.random.default_rng(0)
    stored = {}
    for run, case in itertools.product(runs, cases):
        stored[run.trainer] = rng.random(made.truth(case.name).shape).astype(np.float16)
        folder = current_folder(run, cases, made.out, options)
        np.savez(folder / f"{case.name}.npz", entropy=stored[run.trainer])
    return stored


DIRECTIONS = {
    "upright": (1, 0, 0, 0, 1, 0, 0, 0, 1),
    "upside down": (-1, 0, 0, 0, -1, 0, 0, 0, 1),
    "on its side": (0, 1, 0, 1, 0, 0, 0, 0, -1),  # the array's rows go from side to side
}


@pytest.mark.parametrize("lies", DIRECTIONS)
def test_the_window_shows_what_the_caption_names(made: MadeUp, monkeypatch: pytest.MonkeyPatch, lies: str) -> None:
    monkeypatch.setattr(module, "MIN_WINDOW", 4)
    for file in (*made.raw.rglob("*.nii.gz"), *made.results.rglob("*.nii.gz")):
        image = sitk.ReadImage(str(file))
        image.SetDirection(DIRECTIONS[lies])
        sitk.WriteImage(image, str(file))
    runs, cases, options = everything(made)
    runs = with_predictions(runs, cases, made.out, options)
    stored = with_entropies(made, runs, cases[1:2], options)
    row = read_row(2, cases[1], runs, made.out, options)
    truth = made.truth("b")
    maps = [made.prediction(run.trainer, "b") for run in runs]
    entropies = [stored[run.trainer].astype(np.float32) for run in runs]
    concerned = ((truth == 2) | (maps[0] == 2) | (maps[1] == 2)) & (truth != 3)
    difference = np.abs(entropies[0] - entropies[1]) * concerned
    assert (row.place[0], row.place[1][-3:], row.place[3]) == ("b", "(0)", "5 x 2")
    # 0 is the axis with the largest spacing; 5 mm of 20 are 5 rows of 1 and 2 columns of 2
    index, (r, c), (rows, columns) = int(row.place[1][:-4]), map(int, row.place[2].split(", ")), (5, 2)
    box = (index, slice(r, r + rows), slice(c, c + columns))
    every = itertools.product(range(7), range(12 - rows + 1), range(10 - columns + 1))
    best = max(difference[z, i : i + rows, j : j + columns].sum() for z, i, j in every)
    assert difference[box].sum() == pytest.approx(best, rel=1e-3)  # what is kept has half the digits

    figure = entropy_figure([row], [run.name for run in runs], options)
    axes = figure.axes[:6]
    turn = {"upright": lambda a: a, "upside down": lambda a: a[::-1, ::-1], "on its side": np.transpose}[lies]
    height, width = size = (2, 1) if lies == "on its side" else (1, 2)  # mm of a row and a column, as shown
    rows, columns = turn(truth[box]).shape
    x, y = (round(v / s) for v, s in zip(axes[0].patches[0].get_xy(), size[::-1], strict=True))
    window = (slice(y, y + rows), slice(x, x + columns))
    assert np.array_equal(turn(truth[index])[window], turn(truth[box]))
    for panel, wanted in zip(axes[4:], entropies, strict=True):
        np.testing.assert_allclose(panel.images[0].get_array()[window], turn(wanted[box]), rtol=1e-3)
    for panel, wanted in zip(axes[1:4], (truth, *maps), strict=True):
        colored = panel.images[1].get_array()[..., 3] > 0
        assert np.array_equal(colored[window], np.isin(turn(wanted[box]), (1, 2)))
    (frame,) = axes[0].patches
    assert (frame.get_width(), frame.get_height()) == (width * columns, height * rows)
    limits = [(*panel.get_xlim(), *panel.get_ylim()) for panel in axes[1:]]
    assert limits == [(width * x, width * (x + columns), height * (y + rows), height * y)] * 5


def test_damaged_files_are_named(made: MadeUp) -> None:
    runs, cases, options = everything(made)
    runs = with_predictions(runs, cases, made.out, options)
    with_entropies(made, runs, cases[:1], options)
    file = prediction_folder(runs[1], made.out) / "a.npz"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match=r"a\.npz cannot be read"):
        read_row(1, cases[0], runs, made.out, options)


@pytest.mark.parametrize("kind", ["3d", "png"])
def test_real_runs(tiny, make_trainer: Maker, tmp_path: Path, kind: str) -> None:
    dataset = tiny(kind)
    names = ("SHTA_LabeledOnly", "LabeledOnly")
    runs = [
        train(make_trainer(f"nnUNetTrainer{name}", dataset, settings={"seed": 3 + i}), name)
        for i, name in enumerate(names)
    ]
    out = tmp_path / "out"
    draw_entropy(runs, some_cases(dataset), out, options_of(dataset))
    assert {f"entropy.{kind}" for kind in ("md", "pdf", "png")} <= {file.name for file in out.iterdir()}
    caption = (out / "entropy.md").read_text(encoding="utf-8")
    assert caption.startswith("**Entropy of LabeledOnly and SHTA_LabeledOnly")  # the host first, in whatever order
    assert "2 test cases" in caption
    assert "without mirroring" in caption
    for run in runs:
        folder = prediction_folder(run, out)
        made = f"- {run.name}: `{folder}` (predicted for the figures, without mirroring), `{run.checkpoint_file}`"
        assert made in caption
        assert f"- {run.name}: `{folder}`\n" in caption
        kept = list(prediction_folder(run, out).glob("*.npz"))
        assert 1 <= len(kept) <= 2  # of the chosen cases alone
        others = {file.name for file in prediction_folder(run, out).iterdir()} - {file.name for file in kept}
        assert all(name.endswith((dataset.recipe.file_ending, ".json")) for name in others)
        with np.load(kept[0]) as stored:
            assert list(stored) == ["entropy"]
            entropy = stored["entropy"]
        assert entropy.dtype == np.float16
        (case,) = (case for case in some_cases(dataset) if case.name == kept[0].stem)
        image, properties = run.reader.read_images(list(map(str, case.images)))
        predictor = load_predictor(run, "cpu", False)
        _, probabilities = predictor.predict_single_npy_array(image, properties, None, None, True)
        np.testing.assert_allclose(entropy, normalized_entropy(probabilities), atol=1e-3)
        assert 0 <= entropy.min() < entropy.max() <= 1.001
    before = {file: file.stat().st_mtime_ns for file in (out / "predictions").rglob("*.n*")}
    draw_entropy(runs, some_cases(dataset), out, options_of(dataset))
    assert {file: file.stat().st_mtime_ns for file in (out / "predictions").rglob("*.n*")} == before  # not made again
