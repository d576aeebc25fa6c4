"""Classes drawn over a slice, to the voxel: outlines along the voxels' edges, and see-through colours."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from nnunet_ssl.evaluation.metrics import Label

TRUTH = "white"  # of outlines


def shadow(line: float) -> list[patheffects.AbstractPathEffect]:
    """Black around white lines and letters, which are seen on any ground then.

    Args:
        line: width of the white line, in points.
    """
    return [patheffects.withStroke(linewidth=2 * line, foreground="black")]


def edges(mask: np.ndarray) -> np.ndarray:
    """The edges between voxels inside and outside a mask; beyond the image is outside.

    Args:
        mask: bool ``[rows, columns]``.

    Returns:
        int ``[S, 2, 2]``: both ends of each edge, as (column, row); voxel ``[r, c]`` reaches from (c, r) to
        (c + 1, r + 1).
    """
    padded = np.pad(mask, 1)
    level = np.argwhere(np.diff(padded, axis=0)[:, 1:-1])[:, None, ::-1]
    upright = np.argwhere(np.diff(padded, axis=1)[1:-1])[:, None, ::-1]
    return np.concatenate([level + np.array([(0, 0), (1, 0)]), upright + np.array([(0, 0), (0, 1)])])


def draw_outline(axes: Axes, mask: np.ndarray, size: tuple[float, float], line: float) -> None:
    """Draw the edges of a mask that lie within the axes' limits; nothing where there are none.

    Args:
        axes: on which voxel ``[r, c]`` begins at (c * width, r * height).
        mask: bool ``[rows, columns]``, of the whole slice.
        size: height and width of a voxel, on the axes.
        line: its width in points.
    """
    segments = edges(mask) * size[::-1]
    (left, right), (top, bottom) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    inside = (segments.max(1) >= (left, top)) & (segments.min(1) <= (right, bottom))
    segments = segments[inside.all(1)]
    if len(segments):
        # one path, not many: the shadow of one edge would lie upon the next
        path = Path(segments.reshape(-1, 2), np.tile([Path.MOVETO, Path.LINETO], len(segments)))
        axes.add_patch(
            PathPatch(path, fill=False, edgecolor=TRUTH, linewidth=line, capstyle="projecting",
                      path_effects=shadow(line))
        )  # fmt: skip


def overlay(label_map: np.ndarray, colors: Mapping[Label, tuple[str, float]]) -> np.ndarray:
    """Colour and opacity of each voxel.

    Args:
        label_map: ``[rows, columns]``.
        colors: label or labels of a region -> colour and opacity; the last one lies on top.

    Returns:
        uint8 ``[rows, columns, 4]``; voxels of no such class are clear.
    """
    drawn = np.zeros((*label_map.shape, 4), np.uint8)
    for label, color in colors.items():
        drawn[np.isin(label_map, label)] = np.round(255 * np.array(to_rgba(color)))
    return drawn
