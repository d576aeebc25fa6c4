"""Which slices are shown, against a search that looks at every slice of every file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.figure_folders import SHAPE, TRAINERS, MadeUp, everything, make_folders, set_environment, write

from nnunet_ssl.errors import UserError
from nnunet_ssl.figures.planes import slice_axis
from nnunet_ssl.figures.predictions import with_predictions
from nnunet_ssl.figures.slices import Measured, choose_slices, measure_all_slices
from nnunet_ssl.figures.test_set import Case


@pytest.mark.parametrize(
    ("spacing", "shape", "axis"),
    [
        ((5, 1, 1), (9, 9, 9), 0),
        ((1, 1, 3), (9, 9, 9), 2),
        ((1, 1, 1), (9, 9, 9), 0),
        ((1.0, 1.0004, 1.0), (9, 9, 9), 0),  # a header that rounds
        ((999, 1, 1), (1, 9, 9), 0),
        ((1, 1, 1), (9, 1, 9), 1),
    ],
)
def test_axis(spacing: tuple, shape: tuple, axis: int) -> None:
    assert slice_axis(spacing, shape) == axis


def search(made: MadeUp, label: int | tuple, ignore: bool) -> list[tuple[float, int, str, int]]:
    """All candidates in order, by the rule's words."""
    found = []
    for case in "abc":
        truth = made.truth(case)
        counted = (truth != 3) if ignore else np.ones(truth.shape, bool)
        areas = [int((np.isin(truth[z], label) & counted[z]).sum()) for z in range(SHAPE[0])]
        for z in range(SHAPE[0]):
            if areas[z] == 0 or areas[z] < max(areas) / 4:
                continue
            dices = []
            for trainer in TRAINERS:
                a = np.isin(truth[z], label) & counted[z]
                b = np.isin(made.prediction(trainer, case)[z], label) & counted[z]
                dices.append(2 * (a & b).sum() / (a.sum() + b.sum()))
            found.append((float(np.mean(dices)), -areas[z], case, z))
    return sorted(found)


@pytest.mark.parametrize("kind", ["plain", "ignore", "regions"])
def test_slices_are_those_of_a_search_through_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    set_environment(monkeypatch, tmp_path)
    regions = {"background": 0, "whole": [1, 2], "core": 2}
    made = make_folders(tmp_path, labels=regions if kind == "regions" else None, ignore=kind == "ignore")
    runs, cases, options = everything(made)
    measured = measure_all_slices(with_predictions(runs, cases, made.out, options), cases, options)
    for i, label in enumerate(options.classes):
        wanted = search(made, label, kind == "ignore")
        last = len(wanted) - 1
        slices = choose_slices(measured, i)
        assert [s.rank for s in slices] == ["worst", "median", "best"]
        for s, place in zip(slices, (0, last // 2, last), strict=True):
            assert (s.case.name, s.index) == wanted[place][2:]
            assert np.mean(s.dice) == pytest.approx(wanted[place][0])


def measured_of(areas: list[list[int]], dice: list[list[float]]) -> list[Measured]:
    """One class, one run; a case a list."""
    return [
        Measured(Case(chr(97 + i), (), Path()), np.array([a]), np.array([[d]], float))
        for i, (a, d) in enumerate(zip(areas, dice, strict=True))
    ]


def chosen(*arguments: list) -> list[tuple[str, str, int]]:
    return [(s.rank, s.case.name, s.index) for s in choose_slices(measured_of(*arguments), 0)]


def test_of_equal_scores_the_larger_truth_then_the_first_case_and_slice() -> None:
    assert chosen([[5, 9, 9], [9, 9, 9]], [[0, 0, 0], [0, 0, 0]]) == [
        ("worst", "a", 1),
        ("median", "b", 1),
        ("best", "a", 2),
    ]
    assert chosen([[5, 9, 7], [8, 6, 9]], [[1, 0, 1], [1, 0.5, 0]]) == [
        ("worst", "a", 1),
        ("median", "b", 1),
        ("best", "b", 0),
    ]
    assert chosen([[4, 9]], [[0.5, 0.5]]) == [("worst", "a", 1), ("best", "a", 0)]


def test_tips_of_an_organ_are_no_candidates() -> None:
    assert chosen([[2, 8, 1, 0, 4]], [[0.5, 0.8, 0.0, np.nan, 0.9]]) == [
        ("worst", "a", 0),
        ("median", "a", 1),
        ("best", "a", 4),
    ]


def test_no_slice_is_shown_twice() -> None:
    assert chosen([[4, 4]], [[0.5, 0.4]]) == [("worst", "a", 1), ("best", "a", 0)]
    assert [s[1:] for s in chosen([[4]], [[0.5]])] == [("a", 0)]
    assert chosen([[0, 0]], [[np.nan, 0.0]]) == []


def test_a_prediction_on_another_grid_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, tmp_path)
    made = make_folders(tmp_path)
    file = made.fold(TRAINERS[1]) / "validation/b.nii.gz"
    write(np.zeros((3, 4, 5), np.uint8), file)
    runs, cases, options = everything(made)
    with pytest.raises(UserError, match=rf"{file} has the shape \(3, 4, 5\), the truth \(7, 12, 10\)"):
        measure_all_slices(with_predictions(runs, cases, made.out, options), cases, options)
    truth = made.fold(TRAINERS[0]) / "validation/b.nii.gz"
    image = sitk.ReadImage(truth)
    image.SetOrigin((20, 0, 0))
    sitk.WriteImage(image, file)
    with pytest.raises(UserError, match=rf"{file} has the origin .*, the truth "):
        measure_all_slices(with_predictions(runs, cases, made.out, options), cases, options)
    whole = truth.read_bytes()
    for content in (b"nothing", whole[: len(whole) - 12]):  # SimpleITK takes the second for a whole file
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"{file} cannot be read \(.*(is not a gzip|ended before the end).*\)"):
            measure_all_slices(with_predictions(runs, cases, made.out, options), cases, options)
