"""Figure 4: every token is in one flow, flows are as wide as there are tokens, and the caption has the numbers."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from real_runs import Maker, counted, options_of, some_cases, train, train_and_keep

from nnunet_ssl.figures.options import FigureOptions, NotApplicable
from nnunet_ssl.figures.shta.assignment import (
    NOT_CHOSEN,
    assignment_figure,
    draw_assignment,
    draw_flows,
    node_bottoms,
    ribbon,
)
from nnunet_ssl.figures.shta.branch import BACKGROUND

COUNTS = np.array([[0, 0, 0, 0], [3, 50, 0, 7], [0, 4, 20, 0], [0, 0, 0, 0]])  # rows by truth; nothing is truly 3
NAMES = {0: "background", 1: "one", 2: "two", 3: "three"}
COLORS = {0: "gray", 1: "red", 2: "blue", 3: "green"}


def drawn_flows(axes) -> dict[tuple[int, int], PathPatch]:
    patches = [p for p in axes.patches if isinstance(p, PathPatch)]
    return {tuple(int(i) for i in p.get_label().split("->")): p for p in patches}


def test_flows_are_as_wide_as_there_are_tokens_and_fill_their_nodes() -> None:
    axes = Figure().subplots()
    draw_flows(axes, COUNTS, NAMES, COLORS, 0.05)
    found = drawn_flows(axes)
    assert set(found) == {(a, t) for t, a in zip(*np.nonzero(COUNTS), strict=True)}
    ends: dict[tuple[str, int], list] = {}
    for (assigned, truth), patch in found.items():
        x, y = patch.get_path().vertices[:-1].T
        for side, at, node in (("left", x.min(), assigned), ("right", x.max(), truth)):
            low, high = y[x == at].min(), y[x == at].max()
            assert high - low == pytest.approx(COUNTS[truth, assigned])
            ends.setdefault((side, node), []).append((low, high))
        assert (patch.get_alpha() < 0.5) == (assigned == truth)  # what is wrong stands out
    nodes = [p for p in axes.patches if isinstance(p, Rectangle)]
    assert sorted(p.get_height() for p in nodes) == sorted([3, 54, 20, 7, 60, 24])
    for (_, _), parts in ends.items():  # side by side, without gap or overlap
        parts.sort()
        assert all(a[1] == pytest.approx(b[0]) for a, b in itertools.pairwise(parts))
        assert any(
            p.get_y() == pytest.approx(parts[0][0]) and p.get_y() + p.get_height() == pytest.approx(parts[-1][1])
            for p in nodes
        )
    texts = {text.get_text() for text in axes.texts}
    assert {"background 3", "one 54", "two 20", "three 7", "one 60", "two 24"} < texts


def test_nodes_do_not_overlap_and_the_lowest_label_is_on_top() -> None:
    sums = np.array([5, 0, 10, 1, 1])
    bottoms = node_bottoms(sums, 2)
    assert list(bottoms) == [4, 3, 2, 0]
    assert bottoms[4] == 0
    ends = [(bottoms[label], bottoms[label] + sums[label]) for label in bottoms]
    assert all(below[1] < above[0] for below, above in itertools.pairwise(ends))
    middles = [(low + high) / 2 for low, high in ends]
    assert np.diff(middles)[0] == pytest.approx(2)  # small ones are as far apart as their labels need
    assert np.diff(middles).min() >= 2 - 1e-9


def test_labels_have_a_line_each_however_small_their_nodes_are() -> None:
    rng = np.random.default_rng(0)
    for num_classes, line in ((4, 0.05), (14, 0.035)):
        counts = rng.integers(0, 3, (num_classes, num_classes)) * (rng.random((num_classes, 1)) < 0.8)
        counts[-1, -1] = 500
        axes = Figure().subplots()
        draw_flows(axes, counts, dict.fromkeys(range(num_classes), ""), dict.fromkeys(range(num_classes), "red"), line)
        low, high = axes.get_ylim()
        for side in ("right", "left"):
            places = [text.get_position()[1] for text in axes.texts if text.get_ha() == side]
            assert np.diff(np.sort(places)).min() >= line * (high - low) * (1 - 1e-9)
            assert min(places) - line / 2 * (high - low) >= low - 1e-9


def test_a_ribbon_is_of_one_height_all_along() -> None:
    path = ribbon(0, 1, 2, 5, 3)
    inside = [path.contains_points(np.stack([np.full(2000, x), np.linspace(-1, 10, 2000)], 1)) for x in (0.1, 0.5, 0.8)]
    heights = [mask.mean() * 11 for mask in inside]
    assert heights == pytest.approx([3, 3, 3], abs=0.05)


def test_panels_say_how_many_are_wrong() -> None:
    options = FigureOptions({}, {"one": 1, "two": 2, "three": 3}, [1, 2, 3])
    figure = assignment_figure(["A", "B", "C"], [COUNTS, np.zeros((4, 4), int), COUNTS.T], options)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "A\n84 tokens, 14 misassigned"
    assert titles[1] == "B\n0 tokens, 0 misassigned"
    assert titles[2] == "C\n84 tokens, 14 misassigned"


def test_a_class_that_was_not_chosen_is_pale() -> None:
    options = FigureOptions({}, {"one": 1, "two": 2, "three": 3}, [1, 2])
    figure = assignment_figure(["A"], [COUNTS], options)
    left = {p.get_facecolor() for p in figure.axes[0].patches if isinstance(p, Rectangle)}
    assert left == {to_rgba(color) for color in (BACKGROUND, NOT_CHOSEN, *options.colors.values())}


def test_real_runs(tiny, make_trainer: Maker, tmp_path: Path) -> None:
    dataset = tiny("3d")
    host = train(make_trainer("nnUNetTrainerLabeledOnly", dataset))
    run, early = train_and_keep(make_trainer("nnUNetTrainerSHTA_LabeledOnly", dataset))
    cases, options = some_cases(dataset), options_of(dataset)
    out = tmp_path / "out"
    draw_assignment([run], cases, out, options)
    assert sorted(file.name for file in out.iterdir()) == ["assignment.md", "assignment.pdf", "assignment.png"]
    caption = (out / "assignment.md").read_text(encoding="utf-8")
    tables = {}
    for checkpoint, text in ((early, f"{run.name}, epoch 3 of 1000 (0%), `"), (run, f"{run.name}, `")):
        wanted = counted(checkpoint, cases)
        assert wanted.sum() > 20
        after = caption.split(f"{text}{checkpoint.checkpoint_file}`:\n\n")[1].split("\n\n")[0]
        for truth, name in ((1, "shell"), (2, "core")):
            cells = [str(n) for n, of_all in zip(wanted[truth], wanted.sum(0), strict=True) if of_all]
            assert f"| {name} | {' | '.join(cells)} | {wanted[truth].sum()} |" in after
        tables[checkpoint] = after
    assert tables[early] != tables[run]  # the panels are of different weights
    with pytest.raises(NotApplicable, match="none of the trainers has SHTA"):
        draw_assignment([host], cases, out, options)
