"""How figures are written."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import pytest

from nnunet_ssl.figures.page import (
    DPI,
    class_colors,
    column_width,
    legend_columns,
    new_figure,
    paper_style,
    save_figure,
    wrapped,
)


def draw(width: float = 2.0, height: float = 1.0) -> object:
    with paper_style():
        figure = new_figure(width, height)
        figure.subplots().set_title("Wörter")
    return figure


def test_picture_document_and_caption_are_written(tmp_path: Path) -> None:
    save_figure(draw(), tmp_path / "new", "curves", "What it shows.\n\n")
    assert sorted(f.name for f in (tmp_path / "new").iterdir()) == ["curves.md", "curves.pdf", "curves.png"]
    assert (tmp_path / "new/curves.md").read_text(encoding="utf-8") == "What it shows.\n"
    png = (tmp_path / "new/curves.png").read_bytes()
    assert [int.from_bytes(png[i : i + 4], "big") for i in (16, 20)] == [2 * DPI, 1 * DPI]
    pdf = (tmp_path / "new/curves.pdf").read_bytes()
    assert b"/Type0" in pdf, "TrueType fonts: text stays text"
    assert b"/Type3" not in pdf


def test_the_same_figure_is_the_same_file(tmp_path: Path) -> None:
    for folder in ("1", "2"):
        save_figure(draw(), tmp_path / folder, "x", "")
    for name in ("x.png", "x.pdf"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_failure_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_figure(draw(), tmp_path, "x", "old")
    before = (tmp_path / "x.png").read_bytes()
    figure = draw()

    def fail(file: str, **options: object) -> None:
        Path(file).write_text("half")
        raise RuntimeError("disk")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(RuntimeError, match="disk"):
        save_figure(figure, tmp_path, "x", "new")
    assert (tmp_path / "x.png").read_bytes() == before
    assert (tmp_path / "x.md").read_text(encoding="utf-8") == "old\n"
    assert len(list(tmp_path.iterdir())) == 3


def test_style_is_ours_inside_and_the_processs_own_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    with matplotlib.rc_context({"font.size": 30.0, "axes.grid": True}):  # as nnU-Net's own plots leave it
        with paper_style():
            assert matplotlib.rcParams["font.size"] == 8
            assert not matplotlib.rcParams["axes.grid"]
            assert matplotlib.rcParams["pdf.fonttype"] == 42
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.parametrize("num", [1, 2, 7, 8, 15, 40])
def test_colors_are_as_many_as_asked_for_and_differ(num: int) -> None:
    colors = class_colors(num)
    assert len(set(colors)) == num
    assert all(re.fullmatch("#[0-9a-fA-F]{6}", color) for color in colors)


def test_columns() -> None:
    assert 3 < column_width(1) < 4 < 2 * column_width(1) < column_width(2) < 7.5


def test_text_is_broken_to_fit() -> None:
    with paper_style():
        figure = new_figure(7, 3)
        for width in (0.7, 1.5, 3.0):
            for text in ("MagicNet + SHTA", "portal and splenic veins", "nnUNetTrainerSHTA_MagicNet_1000epochs"):
                title = figure.text(0, 0, wrapped(text, width), fontsize=8)
                assert title.get_window_extent().width / figure.dpi < width * 1.1
                assert "".join(title.get_text().split()) == "".join(text.split())


@pytest.mark.parametrize("labels", [["CPS", "CPS + SHTA", "URPC"], ["right adrenal gland"] * 9, ["a" * 80, "b"]])
def test_legends_stay_within_the_figure(labels: list[str]) -> None:
    for columns in (1, 2):
        width = column_width(columns)
        with paper_style():
            figure = new_figure(width, 4)
            axes = figure.subplots()
            for label in labels:
                axes.plot([0, 1], label=label)
            legend = figure.legend(loc="outside lower center", ncols=legend_columns(labels, width))
            figure.canvas.draw()
        if max(map(len, labels)) < 40:  # a longer one does not fit in a column at all
            assert legend.get_window_extent().width / figure.dpi < width
        assert legend_columns(labels, width) >= 1
