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
    "Warps": "5 labels, warped into the\nshapes of unlabelled images",
    "All labels": "all 160 labels",
}
MINUTES = {5360: 3.5, 4560: 3.5, 10720: 7, 9960: 7}  # steps -> minutes of training, registering included
SETS = (0, 1, 2)  # labelled sets with which all three were trained for both times


def measured() -> dict[tuple[str, float], list[float]]:
    """Test Dice in percent of each labelled set, by row and minutes."""
    shapes = json.loads((RESULTS / "hippocampus_shapes_first.json").read_text())["runs"]
    longer = json.loads((RESULTS / "hippocampus_equal_time.json").read_text())["tables"][0]["runs"]
    dice: dict[tuple[str, float], list[float]] = {}
    for run in [*shapes, *longer]:
        if run["row"] in TITLES and run["seed"] in SETS:
            mean = run["mean_dice"] if "mean_dice" in run else run["metrics"]["Dice"]
            dice.setdefault((run["row"], MINUTES[run["steps"]]), []).append(100 * mean)
    return dice


def main() -> None:
    """Draw it."""
    dice, times = measured(), sorted(set(MINUTES.values()))
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
        axes.set(xlim=(3, 10.5), xticks=times, xticklabels=[f"{minutes:g} minutes" for minutes in times])
        axes.set(xlabel="training on one CPU thread", ylabel="test Dice (%)")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(RESULTS / "figures" / "readme.png", dpi=200)


if __name__ == "__main__":
    main()
