"""Outlines run along the voxels' edges, all of them and no others; colors lie where the classes are."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from nnunet_ssl.figures.outlines import draw_outline, edges, overlay
from nnunet_ssl.figures.page import paper_style

SIZE = (3.0, 0.5)  # mm of a row and of a column


def edges_one_by_one(mask: np.ndarray) -> set[tuple]:
    """Every side of every voxel inside, if the voxel beyond it is not."""
    found = set()
    for r, c in itertools.product(*map(range, mask.shape)):
        sides = {
            (-1, 0): ((c, r), (c + 1, r)),
            (1, 0): ((c, r + 1), (c + 1, r + 1)),
            (0, -1): ((c, r), (c, r + 1)),
            (0, 1): ((c + 1, r), (c + 1, r + 1)),
        }
        for (dr, dc), side in sides.items():
            within = 0 <= r + dr < mask.shape[0] and 0 <= c + dc < mask.shape[1]
            if mask[r, c] and not (within and mask[r + dr, c + dc]):
                found.add(side)
    return found


@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
def test_edges_are_those_of_looking_at_each_voxel(density: float) -> None:
    mask = np.random.default_rng(0).random((7, 9)) < density
    found = [tuple(map(tuple, segment)) for segment in edges(mask).tolist()]
    assert len(found) == len(set(found))
    assert set(found) == edges_one_by_one(mask)


def drawn(mask: np.ndarray, window: tuple[float, float, float, float]) -> tuple[np.ndarray, list]:
    """The picture of an outline alone, and what was drawn."""
    picture = io.BytesIO()
    with paper_style():  # nnU-Net's own pictures change the settings of the process
        figure = Figure((2, 2))
        axes = figure.add_axes((0, 0, 1, 1), facecolor="gray")
        axes.set(xlim=window[:2], ylim=window[2:], xticks=[], yticks=[])
        draw_outline(axes, mask, SIZE, 1.0)
        figure.savefig(picture, format="raw", dpi=100)
    return np.frombuffer(picture.getvalue(), np.uint8).reshape(200, 200, 4)[..., 0], axes.patches


def test_the_outline_is_drawn_to_scale_and_closed_at_the_images_edge() -> None:
    mask = np.zeros((10, 20), bool)
    mask[6:, 4:12] = True  # to the last row
    picture, (patch,) = drawn(mask, (-2, 12, 42, 0))  # 14 by 42 mm in 200 by 200 pixels
    segments = patch.get_path().vertices.reshape(-1, 2, 2)
    assert {tuple(map(tuple, s)) for s in (segments / SIZE[::-1]).tolist()} == edges_one_by_one(mask)
    ys, xs = np.nonzero(picture > 240)  # white; the ground is gray
    left, right, top, bottom = (2 + 2) / 14, (6 + 2) / 14, 18 / 42, 30 / 42
    assert (xs.min(), xs.max()) == pytest.approx((200 * left, 200 * right), abs=2)
    assert (ys.min(), ys.max()) == pytest.approx((200 * top, 200 * bottom), abs=2)
    inner = picture[ys.min() + 4 : ys.max() - 3, xs.min() + 4 : xs.max() - 3]
    assert len(np.unique(inner)) == 1  # nothing but the outline
    white = picture[ys.max() - 1 : ys.max() + 1, xs.min() : xs.max() + 1].max(0)
    assert (white > 200).all()  # the shadow of one voxel's edge does not lie upon the next


def test_only_what_lies_in_the_window_is_drawn() -> None:
    mask = np.indices((40, 40)).sum(0) % 2 == 0
    _, (patch,) = drawn(mask, (5, 10, 60, 30))
    segments = patch.get_path().vertices.reshape(-1, 2, 2) / SIZE[::-1]
    rows, columns = segments[..., 1], segments[..., 0]
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (9, 21, 9, 21)  # what touches it included
    inside = [s for s in edges_one_by_one(mask) if all(10 < x < 20 and 10 < y < 20 for x, y in s)]
    assert set(inside) <= {tuple(map(tuple, s)) for s in segments.tolist()}
    assert not drawn(np.zeros((3, 3), bool), (0, 1, 1, 0))[1]
    assert not drawn(np.eye(40, dtype=bool)[:20], (15, 20, 60, 30))[1]  # all of it is elsewhere


def test_colors_lie_where_the_classes_are_and_the_last_on_top() -> None:
    labels = np.array([[0, 1, 2], [3, 2, 1]])
    found = overlay(labels, {2: ("red", 0.3), (1, 3): ("#0072B2", 0.6), 3: ("lime", 1.0)})
    wanted = {0: (0, 0, 0, 0), 1: (*to_rgb("#0072B2"), 0.6), 2: (1, 0, 0, 0.3), 3: (0, 1, 0, 1)}
    for place, label in np.ndenumerate(labels):
        assert found[place] / 255 == pytest.approx(wanted[label], abs=2e-3)
