"""Figure 3: a picture of the tokens that were drawn."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from real_runs import Maker, options_of, some_cases, train

from nnunet_ssl.errors import UserError
from nnunet_ssl.figures.options import FigureOptions, NotApplicable
from nnunet_ssl.figures.page import class_colors, paper_style
from nnunet_ssl.figures.shta import survey as module
from nnunet_ssl.figures.shta import tokens
from nnunet_ssl.figures.shta.branch import BACKGROUND
from nnunet_ssl.figures.shta.tokens import (
    Space,
    draw_tokens,
    in_two_dimensions,
    silhouettes,
    tokens_figure,
)

LABELS = {"shell": 1, "core": 2, "rim": 3}


def options(**changes) -> FigureOptions:
    return FigureOptions({"labels": {"background": 0, **LABELS}}, LABELS, [1, 3], **changes)


def test_pca_shows_proxies_where_they_are() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(40, 6)) * [9, 4, 1, 1, 1, 1]
    space = Space("z", points, proxies=points[:3])
    flat, proxies = in_two_dimensions(space, "pca", 0)
    np.testing.assert_allclose(proxies, flat[:3], atol=1e-9)
    _, _, axes = np.linalg.svd(points - points.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(flat), np.abs((points - points.mean(0)) @ axes[:2].T), atol=1e-9)


def test_tsne_is_repeatable_and_keeps_groups_apart() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(30, 6)).astype(np.float32)
    points[:15] += 20
    first, proxies = in_two_dimensions(Space("z", points, points[:2]), "tsne", 3)
    assert proxies is None
    assert np.array_equal(first, in_two_dimensions(Space("z", points), "tsne", 3)[0])
    between = np.linalg.norm(first[:15].mean(0) - first[15:].mean(0))
    within = max(first[:15].std(), first[15:].std())
    assert between > 2 * within
    assert in_two_dimensions(Space("z", points[12:16]), "tsne", 0)[0].shape == (4, 2)  # the fewest there can be


def test_silhouette_of_two_pairs() -> None:
    points, classes = np.array([[0.0], [1.0], [10.0], [12.0]]), np.array([1, 1, 3, 3])
    found = silhouettes(points, classes, [1, 3])
    # to the own class 1 and 2, to the other one 11, 10, 9.5 ... on average
    assert found[0] == pytest.approx(((11 - 1) / 11 + (10 - 1) / 10) / 2)
    assert found[1] == pytest.approx(((9.5 - 2) / 9.5 + (11.5 - 2) / 11.5) / 2)


def test_what_is_drawn_is_every_token_in_the_color_of_its_class() -> None:
    rng = np.random.default_rng(0)
    classes = np.array([1] * 9 + [3] * 6)
    spaces = [Space("a", rng.normal(size=(15, 4))), Space("b", rng.normal(size=(15, 3)), rng.normal(size=(2, 3)))]
    with paper_style():
        figure = tokens_figure(spaces, classes, [1, 3], options(embedding=("pca",)))
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    colors = class_colors(2)
    for axes, space in zip(figure.axes, spaces, strict=True):
        flat, proxies = in_two_dimensions(space, "pca", 0)
        drawn = {tuple(np.round(p, 6)): c for s in axes.collections for p, c in zip_points(s)}
        stars = {} if proxies is None else {tuple(np.round(p, 6)): k for p, k in zip(proxies, (0, 1), strict=True)}
        assert len(drawn) == 15 + len(stars)
        for place, label in zip(flat, classes, strict=True):
            assert drawn[tuple(np.round(place, 6))] == pytest.approx(to_rgb(colors[0 if label == 1 else 1]))
        for place, k in stars.items():
            assert drawn[place] == pytest.approx(to_rgb(colors[k]))
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["shell", "rim", "class proxy"]


def test_the_background_beside_one_class_is_gray() -> None:
    classes = np.array([3] * 5 + [0] * 5)
    with paper_style():
        figure = tokens_figure(
            [Space("a", np.random.default_rng(0).normal(size=(10, 4)))], classes, [3, 0], options(embedding=("pca",))
        )
    drawn = [color for s in figure.axes[0].collections for _, color in zip_points(s)]
    assert sum(color == pytest.approx(to_rgb(BACKGROUND)) for color in drawn) == 5
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["rim", "background", "class proxy"]


def zip_points(scatter) -> list[tuple[np.ndarray, tuple]]:
    faces = scatter.get_facecolors()[:, :3]
    points = np.asarray(scatter.get_offsets())
    return list(zip(points, np.broadcast_to(faces, (len(points), 3)), strict=True))


def test_without_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'scikit-learn.* pip install "nnunet-ssl\[figures\]"'):
        draw_tokens([], [], tmp_path, options())


def test_real_runs(tiny, make_trainer: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = tiny("3d")
    runs = [train(make_trainer(f"nnUNetTrainer{name}", dataset), name) for name in ("LabeledOnly", "SHTA_LabeledOnly")]
    monkeypatch.setattr(module, "TOKENS_PER_CLASS", 20)
    out = tmp_path / "out"
    chosen = options_of(dataset, embedding=("pca",))
    draw_tokens(runs, some_cases(dataset), out, chosen)
    assert sorted(file.name for file in out.iterdir()) == ["tokens.md", "tokens.pdf", "tokens.png"]
    caption = (out / "tokens.md").read_text(encoding="utf-8")
    for run in runs:
        assert f"- {run.name}: `{run.checkpoint_file}`" in caption
    assert "LabeledOnly: decoder feature" in caption
    assert "SHTA_LabeledOnly: embedding" in caption
    assert "2 test cases" in caption
    assert "| shell | 20 |" in caption
    assert "without overlap" in caption
    assert "padded with zeros" in caption
    with pytest.raises(NotApplicable, match="none of the trainers has SHTA"):
        draw_tokens(runs[:1], some_cases(dataset), out, chosen)
    chosen.labels["spleen"] = 9
    with pytest.raises(NotApplicable, match="fewer than two of the classes"):
        draw_tokens(runs, some_cases(dataset), out, dataclasses.replace(chosen, classes=[9]))
