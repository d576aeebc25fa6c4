"""Tiny runs that are really trained, for the tests of the figures that read networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from helpers.datasets import TinyDataset

from nnunet_ssl.figures.options import FigureOptions, find_classes
from nnunet_ssl.figures.runs import TrainedRun
from nnunet_ssl.figures.shta.branch import cut_patches, load_branch, load_model, read_tokens
from nnunet_ssl.figures.test_set import Case


def train(trainer: Any, name: str = "") -> TrainedRun:
    """Two steps of a trainer of the fixture ``make_trainer``, and its final checkpoint."""
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    for _ in range(2):
        trainer.train_step(next(trainer.dataloader_train))
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    cls = type(trainer).__name__
    return TrainedRun(name or cls, cls, Path(trainer.output_folder_base), "0", "checkpoint_final.pth")


def train_and_keep(trainer: Any) -> tuple[TrainedRun, TrainedRun]:
    """As ``train``, but a checkpoint of epoch 3 is kept, and the branch assigns other classes afterwards.

    Returns:
        The run, and the same of the checkpoint that was kept.
    """
    run = train(trainer)
    kept = "checkpoint_epoch3.pth"
    trainer.save_checkpoint(str(run.fold_folder / kept))
    trainer.train_step(next(trainer.dataloader_train))
    proxies = trainer.training_modules["shta_first"].loss.proxies
    proxies.data = proxies.data.roll(1, 0)  # a step alone may leave each token with its proxy
    trainer.save_checkpoint(str(run.checkpoint_file))
    return run, dataclasses.replace(run, checkpoint=kept)


def counted(run: TrainedRun, cases: Sequence[Case]) -> np.ndarray:
    """Eligible tokens by class and by nearest proxy, one by one."""
    model = load_model(run, "cpu")
    branch = load_branch(run, model)
    counts = np.zeros((branch.num_classes,) * 2, int)
    for case in cases:
        tokens = read_tokens(model, branch, cut_patches(model, branch, case), embed=True)
        for truth, q in zip(tokens.classes.tolist(), tokens.assignment.tolist(), strict=True):
            counts[truth, max(range(len(q)), key=lambda k: q[k])] += 1
    return counts


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
