"""Tiny runs that are really trained, for the tests of the figures that read networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import TinyDataset

from nnunet_ssl.figures.runs import Case, FigureOptions, TrainedRun, find_classes


def train(trainer: Any, name: str = "") -> TrainedRun:
    """Two steps of a trainer of the fixture ``make_trainer``, and its final checkpoint."""
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    for _ in range(2):
        trainer.train_step(next(trainer.dataloader_train))
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    cls = type(trainer).__name__
    return TrainedRun(name or cls, cls, Path(trainer.output_folder_base), "0", "checkpoint_final.pth")


def some_cases(dataset: TinyDataset, folder: str = "Ts") -> list[Case]:
    """The test cases, or those of another folder."""
    ending = dataset.recipe.file_ending
    return [
        Case(
            name,
            tuple(sorted((dataset.raw / f"images{folder}").glob(f"{name}_*"))),
            dataset.raw / f"labels{folder}" / f"{name}{ending}",
        )
        for name in dataset.cases(f"images{folder}")
    ]


def options_of(dataset: TinyDataset, **changes: Any) -> FigureOptions:
    """All foreground classes, on the CPU, without mirroring."""
    labels, classes = find_classes(dataset.dataset_json, None)
    return FigureOptions(dataset.dataset_json, labels, classes, **{"tta": False, **changes})


Maker = Callable[..., Any]
