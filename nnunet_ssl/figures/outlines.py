"""Classes drawn over a slice, to the voxel: outlines along the voxels' edges, and see-through colors."""

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
    """Black around white letters, and around lines of so many points: they are seen on any ground then."""
    return [patheffects.withStroke(linewidth=2 * line, foreground="black")]


def edges(mask: np.ndarray) -> np.ndarray:
    """The edges between voxels inside and outside a mask, bool ``[rows, columns]``; beyond the image is outside.

    Returns:
        int ``[S, 2, 2]``: both ends of each edge, as (column, row); voxel ``[r, c]`` reaches from (c, r) to
        (c + 1, r + 1).
    """
    padded = np.pad(mask, 1)
    level = np.argwhere(np.diff(padded, axis=0)[:, 1:-1])[:, None, ::-1]
    upright = np.argwhere(np.diff(padded, axis=1)[1:-1])[:, None, ::-1]
    return np.concatenate([level + np.array([(0, 0), (1, 0)]), upright + np.array([(0, 0), (0, 1)])])


def draw_outline(axes: Axes, mask: np.ndarray, size: tuple[float, float], line: float) -> None:
    """Draw the edges of a mask that lie within the axes' limits, ``line`` points wide; nothing where there are none.

    The mask, bool ``[rows, columns]``, is of the whole slice; ``size`` is a voxel's height and width on the axes, where
    voxel ``[r, c]`` begins at (c * width, r * height).
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
    """Color and opacity of each voxel of a label map ``[rows, columns]``; of ``colors`` the last one lies on top.

    Returns:
        uint8 ``[rows, columns, 4]``; voxels of no such class are clear.
    """
    drawn = np.zeros((*label_map.shape, 4), np.uint8)
    for label, color in colors.items():
        drawn[np.isin(label_map, label)] = np.round(255 * np.array(to_rgba(color)))
    return drawn
