"""``warps.png``: the best, the median and the worst of the warps that are kept, by how alike they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from nnunet_ssl.figures.outlines import draw_outline
from nnunet_ssl.figures.page import column_width, new_figure, paper_style, save_figure, wrapped
from nnunet_ssl.figures.planes import Plane, slice_axis
from nnunet_ssl.shapes.case import load, spacing_of, structures_of
from nnunet_ssl.shapes.wish import WarpManifest, Wish


def draw_warps(wish: Wish) -> Path:
    """Draw a labeled image, another one, and the first warped onto the second, with outlines of the classes.

    The slice is the one with the most of the structures; images are prepared ones, the first channel. The picture is
    ``warps.png`` in the folder of the warps.
    """
    manifest = WarpManifest.read(wish.folder)
    kept = sorted(manifest.of(wish).cases, key=lambda case: -manifest.cases[case]["after"])
    rows = {"best": kept[0], "median": kept[len(kept) // 2], "worst": kept[-1]}
    lines = []
    with paper_style():
        width = column_width(2)
        figure = new_figure(width, width)
        all_axes = figure.subplots(3, 3)
        for axes, (which, case) in zip(all_axes, rows.items(), strict=True):
            entry = manifest.cases[case]
            moving, fixed = entry["moving"], entry["fixed"]
            image, labels, properties = load(wish.labeled_folder, moving)
            structures = structures_of(properties)
            labels = np.where(np.isin(labels, structures), labels, 0)
            _draw(axes[0], image[0], labels[0], labels[0], spacing_of(wish, properties))
            image, _, properties = load(wish.onto.places[fixed], fixed)
            warped, labels, _ = load(manifest.place(case), case)
            labels = np.where(np.isin(labels, structures), labels, 0)
            spacing = spacing_of(wish, properties)
            _draw(axes[1], image[0], labels[0], None, spacing)
            _draw(axes[2], warped[0], labels[0], labels[0], spacing)
            for axis, title in zip(axes, (moving, fixed, "warped"), strict=True):
                axis.set_title(wrapped(title, width / 3))
            axes[0].set_ylabel(f"{which}: {entry['after']:.2f}")
            lines.append(
                f"{which}: {moving} onto {fixed}, correlation {entry['before']:.2f}, then {entry['after']:.2f}"
            )
        other = "another labeled one" if wish.onto_each_other else "an unlabeled one"
        caption = (
            f"A labeled image, {other}, and the first warped onto it, with outlines of its classes. "
            f"From the {len(kept)} kept warps, by correlation around the labeled structures: " + "; ".join(lines)
        )
        save_figure(figure, Path(wish.folder), "warps", f"{caption}.")
    return Path(wish.folder, "warps.png")


def _draw(
    axes: Axes, image: np.ndarray, where: np.ndarray, labels: np.ndarray | None, spacing: tuple[float, ...]
) -> None:
    """The slice in which ``where`` has the most foreground."""
    along = slice_axis(spacing, image.shape)
    index = int((where > 0).sum(axis=tuple(axis for axis in range(3) if axis != along)).argmax())
    size = tuple(s for axis, s in enumerate(spacing) if axis != along)
    plane = Plane(image.take(index, along), where.take(index, along), (), size)
    low, high = np.percentile(plane.image, (1, 99))
    plane.draw(axes, plane.image, plane.whole, cmap="gray", vmin=low, vmax=high)
    if labels is not None:
        classes = labels.take(index, along)
        for label in np.unique(classes[classes > 0]):
            draw_outline(axes, classes == label, size, 0.7)
