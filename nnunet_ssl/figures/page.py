"""How the figures look in print, and how they are written: ``NAME.png``, ``NAME.pdf`` and the caption, ``NAME.md``."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib import colormaps, style
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from nnunet_ssl.files import replacing, write_text

DPI = 300
CHARACTER = 0.062  # inches, about the widest that a letter is on average
WIDTHS = {1: 3.5, 2: 7.16}  # inches, of IEEE's columns
# Okabe and Ito's colors, which the color-blind tell apart; black is left to outlines and text
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
HERE = Path(__file__).parent


@contextmanager
def paper_style() -> Iterator[None]:
    """Matplotlib's settings while a figure is drawn; the process's own, which nnU-Net changes, come back after."""
    with style.context(["default", HERE / "paper.mplstyle"]):
        yield


def column_width(num_columns: int) -> float:
    """Width in inches of a figure over 1 or 2 columns of a page."""
    return WIDTHS[num_columns]


def new_figure(width: float, height: float) -> Figure:
    """A figure, in inches, that pyplot knows nothing of: nothing to close, and no window system."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def wrapped(text: str, width: float) -> str:
    """Break text, at the size of titles or ticks, into lines of at most so many inches."""
    return textwrap.fill(text, max(4, int(width / CHARACTER)))


def legend_columns(labels: Sequence[str], width: float) -> int:
    """How many columns of a legend with these entries fit side by side into so many inches."""
    return max(1, min(len(labels), int(width / (max(map(len, labels)) * CHARACTER + 0.42))))


def add_legend(figure: Figure, where: str, handles: Sequence[Artist]) -> None:
    """A legend outside the panels, ``upper`` or ``lower``, in the columns that fit; the handles have the labels."""
    columns = legend_columns([str(handle.get_label()) for handle in handles], figure.get_figwidth())
    figure.legend(handles=handles, loc=f"outside {where} center", ncols=columns)


def panel_grid(
    num_rows: int, titles: Sequence[str], width: float, panel: float, handles: Sequence[Artist]
) -> tuple[Figure, np.ndarray]:
    """Square panels in rows and columns, with titles above the columns and a legend below; inches.

    Returns:
        The figure, and its axes ``[rows, columns]``.
    """
    titles = ["\n".join(wrapped(line, panel) for line in title.split("\n")) for title in titles]
    in_legend = legend_columns([str(handle.get_label()) for handle in handles], width)
    lines_of_text = max(title.count("\n") for title in titles) + -(-len(handles) // in_legend)
    figure = new_figure(width, 0.35 + 0.14 * lines_of_text + panel * num_rows)
    # at the top of their cells, or the layout reckons with titles that are lower than they end up
    grid = figure.subplots(num_rows, len(titles), squeeze=False, subplot_kw={"anchor": "N"})
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title)
    add_legend(figure, "lower", handles)
    return figure, grid


def class_colors(num: int) -> list[str]:
    """So many colors, as ``#rrggbb``.

    Up to seven are safe for the color-blind. More cannot all be, and are spread over a map of even brightness steps.
    """
    if num <= len(PALETTE):
        return list(PALETTE[:num])
    return [to_hex(color) for color in colormaps["turbo"](np.linspace(0.05, 0.95, num))]


def caption(name: str, /, **told: object) -> str:
    """The Markdown of ``captions/<name>.md``, with what is told where it has braces."""
    text = (HERE / "captions" / f"{name}.md").read_text(encoding="utf-8")
    return text.format(**told)


def save_figure(figure: Figure, folder: Path, name: str, caption: str) -> None:
    """Write ``name.png``, ``name.pdf`` and ``name.md``, each whole or not at all, and empty the figure.

    It was made by ``new_figure`` within ``paper_style``. The caption is Markdown: what the figure shows, from which
    files, with which settings, by which rule. The folder is made where it does not exist.
    """
    os.makedirs(folder, exist_ok=True)
    with paper_style():
        for kind in ("png", "pdf"):
            # no date: the same figure is the same file
            metadata = {"CreationDate": None} if kind == "pdf" else None
            with replacing(str(folder / f"{name}.{kind}")) as temporary:
                figure.savefig(temporary, format=kind, dpi=DPI, metadata=metadata)
    write_text(str(folder / f"{name}.md"), caption.rstrip() + "\n")
    figure.clear()
