"""What a run says of itself once an epoch: ``ssl_log.csv``, ``progress_ssl.png``, and nnU-Net's other loggers."""

from __future__ import annotations

import csv
import math
import os

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import replacing


def read_rows(file: str, remedy: str) -> list[dict[str, float]]:
    """The rows of a ``ssl_log.csv``, each with its epoch; what a row does not say is not in it.

    Raises:
        UserError: it is unreadable or no such table; ``remedy`` says what to do.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(stream)]
        if not all(math.isfinite(row["epoch"]) for row in rows):
            raise ValueError("an epoch is not a number")
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}). {remedy}") from None
    except (ValueError, TypeError, LookupError, csv.Error) as error:
        raise UserError(f"{file} is not the log of a training ({error!r}). {remedy}") from error
    return rows


class SSLLog:
    """A table with a row an epoch, kept as a file in the fold's folder and drawn as a picture.

    Rows of ``first_epoch`` and later ones, left by a run that is now repeated, are dropped.
    """

    def __init__(self, folder: str, first_epoch: int = 0) -> None:
        self.csv_file = os.path.join(folder, "ssl_log.csv")
        self.png_file = os.path.join(folder, "progress_ssl.png")
        self.rows: list[dict[str, float]] = []
        if first_epoch and os.path.exists(self.csv_file):
            rows = read_rows(self.csv_file, "Fix it, or remove it: the log then begins with the next epoch.")
            self.rows = [row | {"epoch": int(row["epoch"])} for row in rows if row["epoch"] < first_epoch]

    def add(self, epoch: int, values: dict[str, float]) -> None:
        """Add the row of ``epoch`` and write both files."""
        self.rows.append({"epoch": epoch} | {name: float(f"{value:.6g}") for name, value in values.items()})
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with replacing(self.csv_file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)
        self._draw(names[1:])

    @style.context("default")  # nnU-Net's own plot sets fonts of poster size for the whole process
    def _draw(self, names: list[str]) -> None:
        """One panel for each group of names: what stands before the first underscore."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(name.split("_")[0], []).append(name)
        figure = Figure(figsize=(7, 2.4 * len(groups)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(groups), squeeze=False)[:, 0]
        for axes, (group, members) in zip(panels, groups.items(), strict=True):
            for name in members:
                points = [(row["epoch"], row[name]) for row in self.rows if name in row]
                axes.plot(*zip(*points, strict=True), label=name.removeprefix(f"{group}_"))
            axes.set_title(group, loc="left", fontsize=9)
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
            axes.grid(alpha=0.3)
        axes.set_xlabel("epoch")
        with replacing(self.png_file) as temporary:
            figure.savefig(temporary, format="png", dpi=90)
