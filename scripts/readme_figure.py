"""The figure of the README, from the measurements in ``docs/results``.

python scripts/readme_figure.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from nnunet_ssl.figures.page import class_colors, new_figure, paper_style

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
PANELS = {
    "Hippocampus, 5 of 160 cases labeled,\n9 minutes": "hippocampus_shapes_9_minutes.json",
    "Heart (ACDC), 3 of 60 patients labeled,\n12 minutes": "acdc_shapes_12_minutes.json",
}
ROWS = {"Labels only": "labels only", "Warps": "labels, warped into the\nshapes of unlabeled images"}


def dice(file: str, row: str) -> dict[int, float]:
    """Test Dice in percent by labeled set."""
    runs = json.loads((RESULTS / file).read_text())["runs"]
    return {run["seed"]: 100 * run["mean_dice"] for run in runs if run["row"] == row}


def main() -> None:
    """Draw it: a line per labeled set."""
    with paper_style():
        figure = new_figure(6.4, 2.5)
        set_color, mean_color, all_color = class_colors(3)
        for axes, (title, file) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
            before, after = (dice(file, row) for row in ROWS)
            assert before.keys() == after.keys()
            for labeled_set in before:
                axes.plot([0, 1], [before[labeled_set], after[labeled_set]], "-o", color=set_color, alpha=0.4, ms=3)
            means = [statistics.mean(values.values()) for values in (before, after)]
            axes.plot([0, 1], means, "-o", color=mean_color, lw=2, ms=5)
            for x, mean in enumerate(means):
                axes.annotate(f"{mean:.1f}", (x, mean), (12 * (2 * x - 1), 0), textcoords="offset points",
                              color=mean_color, ha="center", va="center")  # fmt: skip
            full = statistics.mean(dice(file, "All labels").values())
            axes.axhline(full, color=all_color, ls="--", lw=1)
            axes.annotate(f"all labels: {full:.1f}", (0.5, full), (0, -8), textcoords="offset points",
                          color=all_color, ha="center", va="center")  # fmt: skip
            axes.set(title=title, xlim=(-0.35, 1.35), xticks=[0, 1], xticklabels=ROWS.values(), ylabel="test Dice (%)")
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(RESULTS / "figures" / "readme.png", dpi=200)


if __name__ == "__main__":
    main()
