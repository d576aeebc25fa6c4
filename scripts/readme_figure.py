"""The figure of the README, from the measurements in ``docs/results``.

python scripts/readme_figure.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from nnunet_ssl.figures.page import class_colors, new_figure, paper_style

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
TITLES = {
    "Labels only": "5 labels only",
    "Warps": "5 labels, warped into the\nshapes of unlabeled images",
    "All labels": "all 160 labels",
}
FILES = {3.5: "hippocampus_shapes_first.json", 9: "hippocampus_shapes_9_minutes.json"}  # by minutes of training
STEPS = {5360, 4560, 11400, 11160}  # of these minutes, registering taken off; the first file has longer runs too
SETS = range(5)  # labeled sets with which all three were trained for both times


def measured() -> dict[tuple[str, float], list[float]]:
    """Test Dice in percent of each labeled set, by row and minutes."""
    dice: dict[tuple[str, float], list[float]] = {}
    for minutes, file in FILES.items():
        for run in json.loads((RESULTS / file).read_text())["runs"]:
            if run["row"] in TITLES and run["seed"] in SETS and run["steps"] in STEPS:
                dice.setdefault((run["row"], minutes), []).append(100 * run["mean_dice"])
    return dice


def main() -> None:
    """Draw it."""
    dice, times = measured(), sorted(FILES)
    with paper_style():
        figure = new_figure(5.0, 2.2)
        axes = figure.subplots()
        for (row, title), color in zip(TITLES.items(), class_colors(len(TITLES)), strict=True):
            means = [statistics.mean(dice[row, minutes]) for minutes in times]
            axes.plot(times, means, "-o", color=color, markersize=5)
            for minutes in times:
                axes.plot([minutes] * len(SETS), dice[row, minutes], "o", color=color, alpha=0.35, markersize=3)
            axes.annotate(title, (times[-1], means[-1]), (8, 0), textcoords="offset points",
                          color=color, va="center")  # fmt: skip
        axes.set(xlim=(3, 13.5), xticks=times, xticklabels=[f"{minutes:g} minutes" for minutes in times])
        axes.set(xlabel="training on one CPU thread", ylabel="test Dice (%)")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(RESULTS / "figures" / "readme.png", dpi=200)


if __name__ == "__main__":
    main()
