"""Figure 2: entropies, the rule that chooses, and windows that show the voxels that the caption names."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.figure_folders import MadeUp, everything, make_folders, set_environment
from real_runs import Maker, options_of, some_cases, train

from nnunet_ssl.errors import UserError
from nnunet_ssl.figures.runs import NotApplicable, prediction_folder
from nnunet_ssl.figures.shta import entropy as module
from nnunet_ssl.figures.shta.entropy import (
    best_window,
    choose_cases,
    draw_entropy,
    entropy_figure,
    normalized_entropy,
    predict_entropy,
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
    counts, size = {}, {}
    for label, case in itertools.product((1, 2), cases):
        truth = made.truth(case.name)
        one, other = (made.prediction(run.trainer, case.name) == label for run in runs)
        counts[label, case.name] = ((one ^ other) & (truth != 3)).sum()
        size[label] = size.get(label, 0) + (truth == label).sum()
    found = choose_cases(runs, cases, made.out, options)
    assert {label: case.name for label, case in found.items()} == {
        label: max("abc", key=lambda name: counts[label, name]) for label in (1, 2)
    }
    assert choose_cases(runs[::-1], cases[::-1], made.out, options) == found  # whoever comes first
    assert choose_cases([runs[0], runs[0]], cases, made.out, options) == {}
    monkeypatch.setattr(module, "MAX_ROWS", 1)
    share = {label: sum(counts[label, name] for name in "abc") / size[label] for label in (1, 2)}
    assert list(choose_cases(runs, cases, made.out, options)) == [max(share, key=share.get)]


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
    monkeypatch.setattr(module, "predict", lambda *_: None)  # all that follows was predicted before
    for case in cases:
        with_probabilities(made, runs, case.name)
    draw_entropy(runs, cases, made.out, options)
    assert "| organ |" in (made.out / "entropy.md").read_text(encoding="utf-8")


def with_probabilities(made: MadeUp, runs: list, case: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Write made-up probabilities where nnU-Net does; gives them back by trainer."""
    rng = np.random.default_rng(seed)
    stored = {}
    for run in runs:
        folder = prediction_folder(run, made.out)
        folder.mkdir(parents=True, exist_ok=True)
        p = rng.dirichlet([0.3] * 3, made.truth(case).shape)
        p = np.moveaxis(p, -1, 0).astype(np.float32)
        np.savez(folder / f"{case}.npz", probabilities=p)
        image = sitk.GetImageFromArray(p.argmax(0).astype(np.uint8))
        image.CopyInformation(sitk.ReadImage(str(made.raw / f"labelsTr/{case}.nii.gz")))
        sitk.WriteImage(image, str(folder / f"{case}.nii.gz"))
        stored[run.trainer] = p
    return stored


@pytest.mark.parametrize("turned", [False, True])
def test_the_window_shows_what_the_caption_names(made: MadeUp, monkeypatch: pytest.MonkeyPatch, turned: bool) -> None:
    monkeypatch.setattr(module, "MIN_WINDOW", 4)
    if turned:  # the patient's head is at the other end of the array's axes, front at the back, left on the right
        for file in made.raw.glob("*/*.nii.gz"):
            image = sitk.ReadImage(str(file))
            image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
            sitk.WriteImage(image, str(file))
    runs, cases, options = everything(made)
    stored = with_probabilities(made, runs, "b")
    monkeypatch.setattr(module, "predict", lambda *_: None)
    for run in runs:
        predict_entropy(run, cases[1:2], made.out, options)
    row = read_row(2, cases[1], runs, made.out, options)
    zoom, truth = row.zoom, made.truth("b")
    maps = [stored[run.trainer].argmax(0) for run in runs]
    entropies = [normalized_entropy(stored[run.trainer]) for run in runs]
    concerned = ((truth == 2) | (maps[0] == 2) | (maps[1] == 2)) & (truth != 3)
    difference = np.abs(entropies[0] - entropies[1]) * concerned
    assert zoom.axis == 0  # the largest spacing
    assert zoom.side == (5, 2)  # 5 mm of 20 are 5 rows of 1 and 2 columns of 2
    (r, c), (rows, columns) = zoom.start, zoom.side
    box = (zoom.index, slice(r, r + rows), slice(c, c + columns))
    every = itertools.product(range(7), range(12 - rows + 1), range(10 - columns + 1))
    best = max(difference[z, i : i + rows, j : j + columns].sum() for z, i, j in every)
    assert difference[box].sum() == pytest.approx(best, rel=1e-3)  # what is kept has half the digits

    figure = entropy_figure([row], [run.name for run in runs], options)
    axes = figure.axes[:6]
    turn = (slice(None, None, -1),) * 2 if turned else (slice(None),) * 2
    for panel, wanted in zip(axes[4:], entropies, strict=True):
        np.testing.assert_allclose(panel.images[0].get_array(), wanted[box][turn], rtol=1e-3)
    for panel, wanted in zip(axes[1:4], (truth, *maps), strict=True):
        colored = panel.images[1].get_array()[..., 3] > 0
        assert np.array_equal(colored, np.isin(wanted[box][turn], (1, 2)))
    (frame,) = axes[0].patches
    x, y = (round(v / s) for v, s in zip(frame.get_xy(), (2, 1), strict=True))
    assert (frame.get_width(), frame.get_height()) == (2 * columns, rows)
    assert [panel.images[0].get_extent() for panel in axes[1:]] == [[2 * x, 2 * (x + columns), y + rows, y]] * 5
    whole = entropies[0][zoom.index][turn]
    np.testing.assert_allclose(whole[y : y + rows, x : x + columns], entropies[0][box][turn])


def test_only_the_entropy_is_kept(made: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, cases, options = everything(made)
    stored = with_probabilities(made, runs, "a")[runs[0].trainer]
    monkeypatch.setattr(module, "predict", lambda *_: None)
    folder = prediction_folder(runs[0], made.out)
    (folder / "a.pkl").touch()
    predict_entropy(runs[0], cases[:1], made.out, options)
    assert sorted(file.name for file in folder.iterdir()) == ["a.nii.gz", "a.npz"]
    kept = (folder / "a.npz").read_bytes()
    with np.load(folder / "a.npz") as arrays:
        assert list(arrays) == ["entropy"]
        assert arrays["entropy"].dtype == np.float16
        np.testing.assert_allclose(arrays["entropy"], normalized_entropy(stored), atol=1e-3)
    predict_entropy(runs[0], cases[:1], made.out, options)
    assert (folder / "a.npz").read_bytes() == kept


def test_damaged_files_are_named(made: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, cases, options = everything(made)
    with_probabilities(made, runs, "a")
    monkeypatch.setattr(module, "predict", lambda *_: None)
    file = prediction_folder(runs[1], made.out) / "a.npz"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match=r"a\.npz cannot be read"):
        predict_entropy(runs[1], cases[:1], made.out, options)


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
        assert f"- {run.name}: `{prediction_folder(run, out)}`, `{run.checkpoint_file}`" in caption
        kept = list(prediction_folder(run, out).glob("*.npz"))
        assert 1 <= len(kept) <= 2  # of the chosen cases alone
        entropy = np.load(kept[0])["entropy"]
        assert 0 <= entropy.min() < entropy.max() <= 1.001
    before = {file: file.stat().st_mtime_ns for file in (out / "predictions").rglob("*.n*")}
    draw_entropy(runs, some_cases(dataset), out, options_of(dataset))
    assert {file: file.stat().st_mtime_ns for file in (out / "predictions").rglob("*.n*")} == before  # not made again
