"""Figure 5: the training curves of several runs in one picture, from the logs that the runs have left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from nnunet_ssl.checkpoints import read_checkpoint
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.summary import table
from nnunet_ssl.figures import page
from nnunet_ssl.figures.options import FigureOptions
from nnunet_ssl.figures.runs import FINAL, TrainedRun, settings_of
from nnunet_ssl.figures.test_set import Case
from nnunet_ssl.trainers.log import read_rows

LINES = ("-", "--", "-.", ":")
SUPERVISED = ("loss_sup", "loss_seg_high")  # the first that a run has: SASNet has no loss_sup
OF_LABELS = ("loss_sup", "loss_seg")  # how the names of losses against labels begin


class Panel(NamedTuple):
    """What a panel shows: a heading for its axis, and an explanation for the caption."""

    heading: str
    explanation: str


PANELS = {
    "dice": Panel(
        "Pseudo Dice (%)",
        "nnU-Net's mean foreground Dice on patches of validation cases (thin) and its moving average (thick)",
    ),
    "labeled": Panel(
        "Loss, labeled images",
        "nnU-Net's loss of the (first) network on labeled patches: `loss_sup` (SASNet: `loss_seg_high`) of "
        "`ssl_log.csv`; for trainers without one, nnU-Net's training loss",
    ),
    "validation": Panel("Loss, validation", "nnU-Net's validation loss"),
    "further": Panel(
        "Further terms, weighted",
        "the weighted sum of all other loss terms that an epoch has, except losses of a second network or branch on "
        "labeled patches; epochs and trainers without such terms have no point",
    ),
    "shta_token_accuracy": Panel("Token accuracy (%)", "SHTA: tokens whose nearest proxy is their most frequent class"),
    "shta_hard_share": Panel("Hard tokens (%)", "SHTA: share of labeled tokens that are selected as hard"),
}
IN_PERCENT = ("dice", "shta_token_accuracy", "shta_hard_share")


@dataclass(frozen=True)
class Curve:
    """One run in one panel: ``[points]`` each; ``raw`` is what ``values`` smooths, if anything."""

    epochs: np.ndarray
    values: np.ndarray
    raw: np.ndarray | None = None


def draw_curves(runs: Sequence[TrainedRun], cases: Sequence[Case], out: Path, options: FigureOptions) -> None:
    """Write ``curves``. Cases are not needed.

    Raises:
        UserError: a checkpoint holds no log, or a log cannot be read.
    """
    curves = {run.name: read_curves(run) for run in runs}
    with page.paper_style():
        page.save_figure(curves_figure(curves), out, "curves", _caption(runs, curves))


def read_curves(run: TrainedRun) -> dict[str, Curve]:
    """The curves of a run by panel, those that it has."""
    log = nnunet_log(run)
    rows = ssl_log(run)
    curves = {
        "dice": Curve(*_of_list(log["ema_fg_dice"]), raw=np.array(log["mean_fg_dice"], float)),
        "validation": Curve(*_of_list(log["val_losses"])),
    }
    logged = list(dict.fromkeys(name for row in rows for name in row))
    own = next((name for name in SUPERVISED if name in logged), None)
    curves["labeled"] = _of_rows(rows, own) if own else Curve(*_of_list(log["train_losses"]))
    terms = [name for name in logged if name.startswith("loss_") and not name.startswith(OF_LABELS)]
    for row in rows:
        if there := [name for name in terms if name in row]:  # some methods change their terms on the way
            row["further"] = sum(row[name] * row.get(name.replace("loss_", "weight_", 1), 1.0) for name in there)
    for name in ("further", "shta_token_accuracy", "shta_hard_share"):
        if len((curve := _of_rows(rows, name)).epochs):
            curves[name] = curve
    return curves


def nnunet_log(run: TrainedRun) -> dict[str, list]:
    """What nnU-Net logged an epoch each, from the final checkpoint; from the run's own if there is none."""
    file = _log_file(run)
    remedy = "Leave out the curves with --which: exported models have no nnU-Net log."
    checkpoint = read_checkpoint(file, remedy, {"logging": dict})
    log = checkpoint["logging"]
    if checkpoint.get("trainer_name") == "nnUNetTrainerMAE":
        raise UserError(
            f"{file} is of nnUNetTrainerMAE, which logs errors of hidden voxels and no Dice. Leave the model out; its "
            "curves are in progress.png and progress_ssl.png."
        )
    names = ("mean_fg_dice", "ema_fg_dice", "train_losses", "val_losses")
    try:
        return {name: list(map(float, log[name])) for name in names}
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{file} has another log than nnU-Net's ({error!r}). {remedy}") from error


def _log_file(run: TrainedRun) -> Path:
    final = run.fold_folder / FINAL
    return final if final.is_file() else run.checkpoint_file


def ssl_log(run: TrainedRun) -> list[dict[str, float]]:
    """The rows of ``ssl_log.csv``; none for a trainer that is not of this package."""
    file = run.fold_folder / "ssl_log.csv"
    return read_rows(str(file), "Fix it or remove it: nnU-Net's log remains.") if file.exists() else []


def _of_list(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(values)), np.array(values, float)


def _of_rows(rows: Sequence[Mapping[str, float]], name: str) -> Curve:
    points = [(row["epoch"], row[name]) for row in rows if name in row]
    return Curve(*np.array(points, float).reshape(-1, 2).T)


def curves_figure(curves: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """A panel for each quantity that a run has; ``curves``: run -> panel -> curve."""
    panels = [name for name in PANELS if any(name in of_run for of_run in curves.values())]
    num_columns = 3 if len(panels) > 4 else 2
    num_rows = -(-len(panels) // num_columns)
    figure = page.new_figure(page.column_width(2), 0.4 + 1.9 * num_rows)
    grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    lines = dict(zip(curves, page.class_colors(len(curves)), strict=True))
    for axes, name in zip(grid, panels, strict=False):
        scale = 100 if name in IN_PERCENT else 1
        for i, (run, of_run) in enumerate(curves.items()):
            if name in of_run:
                curve, color = of_run[name], lines[run]
                if curve.raw is not None:
                    axes.plot(curve.epochs, scale * curve.raw, color=color, linewidth=0.5, alpha=0.4)
                single = {"marker": "o", "markersize": 2} if len(curve.epochs) == 1 else {}
                line = LINES[i % len(LINES)]
                axes.plot(curve.epochs, scale * curve.values, line, color=color, label=run, **single)
        axes.set(xlabel="Epoch", ylabel=PANELS[name].heading)
        axes.grid(alpha=0.4)
    for axes in grid[len(panels) :]:
        axes.remove()
    page.add_legend(figure, "upper", figure.axes[0].get_legend_handles_labels()[0])  # every run has a Dice
    return figure


def _caption(runs: Sequence[TrainedRun], curves: Mapping[str, Mapping[str, Curve]]) -> str:
    shown = [panel for name, panel in PANELS.items() if any(name in of_run for of_run in curves.values())]
    rows = [["Run", "Epochs", "Steps an epoch", "Files"]]
    for run in runs:
        files = [_log_file(run), *run.fold_folder.glob("ssl_log.csv")]
        epochs = len(curves[run.name]["dice"].epochs)
        # nnU-Net's trainers do not write it down
        steps = settings_of(run).get("num_iterations_per_epoch", "not recorded")
        rows.append([run.name, str(epochs), str(steps), ", ".join(f"`{file}`" for file in files)])
    panels = "\n".join(f"- {panel.heading}: {panel.explanation}." for panel in shown)
    return page.caption("curves", panels=panels, table="\n".join(table(rows)))
