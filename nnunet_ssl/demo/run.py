"""The demo: nnU-Net's own commands from a made-up dataset to a table of Dice and a figure."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.demo.dataset import DATASET, LABELED, ORGANS, TEST, UNLABELED, write_dataset
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json, write_json, writing
from nnunet_ssl.names import FOLDERS
from nnunet_ssl.steps import Step, Steps, training

TRAINERS = ("nnUNetTrainerLabeledOnly", "nnUNetTrainerWarps")
CONFIGURATION, PLANS, FOLD = "2d", "nnUNetPlans", "all"
DATASET_ID = 1
FEATURES = (8, 16, 32)
PATCH_SIZE = (40, 36)
BATCH_SIZE = 8
PAIRS = 10  # warps of each labeled case
STEPS_AN_EPOCH = 100
SETTINGS = {"num_iterations_per_epoch": STEPS_AN_EPOCH, "num_val_iterations_per_epoch": 2, "save_every": 5}
FIGURE_CASES = 3  # the first of the test set


@dataclass(frozen=True)
class Demo:
    """A demo in a folder, step by step; a stopped one resumes where it was.

    Attributes:
        folder: everything is written here.
        epochs: of each training, of 100 steps each.
        device: ``cpu``, ``cuda`` or ``mps``, as nnU-Net's ``-device``.
        seed: of the dataset and of both trainings.
    """

    folder: Path
    epochs: int
    device: str
    seed: int

    @writing("Make room, or take another -o.")
    def run(self) -> dict[str, Any]:
        """Do all of it; returns what is written to ``results.json``.

        Raises:
            UserError: the folder holds something else, or a command failed.
        """
        start = time.time()
        self._refuse_other()
        self._make_folders()
        if not self._raw.is_dir():  # complete or not there
            print(f"\nDrawing the dataset: {LABELED} labeled, {UNLABELED} unlabeled and {TEST} test cases", flush=True)
            write_dataset(self._raw.parent, self.seed)
        self._do_steps()
        dice = {trainer: {"test_dice": read_dice(self._predictions(trainer) / "summary.json")} for trainer in TRAINERS}
        results = {"epochs": self.epochs, "seed": self.seed, "device": self.device, "trainers": dice}
        figure = self.folder / f"demo_{self.epochs}epochs.png"
        draw_figure(self._raw, {trainer: self._predictions(trainer) for trainer in TRAINERS}, figure)
        results_file = self.folder / f"results_{self.epochs}epochs.json"
        write_json(results_file, results)
        print(f"\n{dice_table(results)}", flush=True)
        print(f"\nDice on {len(list((self._raw / 'labelsTs').iterdir()))} test cases, seed {self.seed}.")
        print(f"Figure: {figure}\nResults: {results_file}\n{(time.time() - start) / 60:.1f} minutes.", flush=True)
        return results

    def dry_run(self) -> None:
        """Print the commands that are still to be run, and do nothing.

        Raises:
            UserError: the folder holds something else.
        """
        self._refuse_other()
        self._do_steps(dry_run=True)

    def _refuse_other(self) -> None:
        """Refuse a folder that holds something else.

        Raises:
            UserError: the folder belongs to another seed, or to something else.
        """
        note = self.folder / "demo.json"
        if note.is_file():
            seed = read_json(note, "It records which demo this is: choose another -o.", keys={"seed": int})["seed"]
            if seed != self.seed:
                raise UserError(f"{self.folder} holds the demo of seed {seed}; choose another -o, or --seed {seed}.")
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{self.folder} exists but is not a demo; choose another -o.")

    def _make_folders(self) -> None:
        """Note what the folder is for, and the settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "demo.json", {"seed": self.seed})  # first: it says whose the rest is
        for name in FOLDERS:
            (self.folder / name).mkdir(exist_ok=True)
        write_json(self.folder / "settings.json", {"seed": self.seed, **SETTINGS})

    # ------------------------------------------------------------------ steps

    def _do_steps(self, dry_run: bool = False) -> None:
        steps = self._steps(dry_run)
        steps.do(self._plan())
        steps.do(self._warp())
        for trainer in TRAINERS:
            steps.do(self._train(trainer))
            steps.do(self._test(trainer))

    def _steps(self, dry_run: bool) -> Steps:
        """What does them; the commands' output goes to ``log.txt``, their epochs to the terminal."""
        variables = {
            "nnUNet_def_n_proc": "2",
            # on the CPU the cores are for the network, and threads that wait must not spin: the worker needs a core too
            **({"nnUNet_n_proc_DA": "1", "OMP_WAIT_POLICY": "PASSIVE"} if self.device == "cpu" else {}),
            **os.environ,
            **{name: str(self.folder / name) for name in FOLDERS},
            "nnUNet_ssl_config": str(self.folder / "settings.json"),
            "MPLBACKEND": "Agg",
            "PYTHONUNBUFFERED": "1",
        }
        log = self.folder / "log.txt"
        return Steps(self.device, "choose another -o", dry_run, variables=variables, log=log, show=self._show_epoch)

    def _step(self, name: str, title: str, makes: Path, *commands: list[Any]) -> Step:
        words = tuple(list(map(str, command)) for command in commands)
        return Step(self.folder / "steps" / f"{name}.json", (makes,), words, title=title)

    def _plan(self) -> Step:
        """Fingerprint, plans, preprocessing; then the plans for a CPU."""
        file = self._prepared / f"{PLANS}.json"
        plan = ["nnUNetv2_plan_and_preprocess", "-d", DATASET_ID, "-c", CONFIGURATION, "-npfp", 2, "-np", 2]
        shrink = ["python", "-m", "nnunet_ssl.demo.plans", file, CONFIGURATION, "--features", *FEATURES]
        shrink += ["--patch-size", *PATCH_SIZE, "--batch-size", BATCH_SIZE]
        return self._step("plan", "Planning and preprocessing", file, plan, shrink)

    def _warp(self) -> Step:
        """Labeled images in the shapes of unlabeled ones."""
        makes = self._prepared / f"{PLANS}_{CONFIGURATION}_warped" / "warps.png"
        warp = ["nnUNetv2_ssl_warp", "-d", DATASET_ID, "-c", CONFIGURATION, "--pairs", PAIRS, "-np", 2]
        return self._step("warp", "Registering labeled images onto unlabeled ones", makes, warp)

    def _train(self, trainer: str) -> Step:
        name, fold = f"{trainer}_{self.epochs}epochs", self._model(trainer) / f"fold_{FOLD}"
        words = ["nnUNetv2_train", DATASET_ID, CONFIGURATION, FOLD, "-tr", name, "-device", self.device]
        title = f"Training {trainer}, {self.epochs} epochs of {STEPS_AN_EPOCH} steps"
        return self._step(f"train_{name}", title, fold / "validation" / "summary.json", training(words, fold))

    def _test(self, trainer: str) -> Step:
        """Predict and evaluate the test cases."""
        name, predictions = f"{trainer}_{self.epochs}epochs", self._predictions(trainer)
        predict = ["nnUNetv2_predict", "-d", DATASET_ID, "-c", CONFIGURATION, "-f", FOLD, "-tr", name]
        predict += ["-i", self._raw / "imagesTs", "-o", predictions, "-npp", 1, "-nps", 1, "--disable_tta"]
        evaluate = ["nnUNetv2_evaluate_folder", self._raw / "labelsTs", predictions, "-djfile"]
        evaluate += [self._raw / "dataset.json", "-pfile", self._model(trainer) / "plans.json", "-np", 1]
        title = f"Predicting the test cases with {trainer}"
        commands = [*predict, "-device", self.device], evaluate
        return self._step(f"test_{name}", title, predictions / "summary.json", *commands)

    @property
    def _raw(self) -> Path:
        return self.folder / "nnUNet_raw" / DATASET

    @property
    def _prepared(self) -> Path:
        return self.folder / "nnUNet_preprocessed" / DATASET

    def _model(self, trainer: str) -> Path:
        name = f"{trainer}_{self.epochs}epochs__{PLANS}__{CONFIGURATION}"
        return self.folder / "nnUNet_results" / DATASET / name

    def _predictions(self, trainer: str) -> Path:
        return self.folder / "predictions" / f"{trainer}_{self.epochs}epochs"

    def _show_epoch(self, line: str) -> None:
        """Print where a training is, from a line of nnU-Net's output."""
        if match := re.search(r": Epoch (\d+)\s*$", line):
            epoch = int(match[1])
            if epoch % max(1, self.epochs // 5) == 0:
                print(f"  epoch {epoch + 1} of {self.epochs}", flush=True)


def read_dice(summary: Path) -> dict[str, float]:
    """The mean Dice of each organ, and their mean, from what ``nnUNetv2_evaluate_folder`` has written.

    Raises:
        UserError: the file is damaged.
    """
    remedy = "Remove it to predict and evaluate the test cases again."
    metrics = read_json(summary, remedy, keys={"mean": dict, "foreground_mean": dict})
    organs = {name: label for name, label in ORGANS.items() if label}
    try:
        dice = {name: float(metrics["mean"][str(label)]["Dice"]) for name, label in organs.items()}
        return {**dice, "mean": float(metrics["foreground_mean"]["Dice"])}
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{summary} is not as nnUNetv2_evaluate_folder writes it ({error!r}). {remedy}") from error


def dice_table(results: dict[str, Any]) -> str:
    """The Dice of each organ, both trainers side by side, as Markdown."""
    first, second = (results["trainers"][trainer]["test_dice"] for trainer in TRAINERS)
    width = max(map(len, TRAINERS))
    lines = [f"| {'organ':8} | {TRAINERS[0]:>{width}} | {TRAINERS[1]:>{width}} | difference |"]
    lines.append(f"| {'-' * 8} | {'-' * (width - 1)}: | {'-' * (width - 1)}: | ---------: |")
    for organ in first:
        a, b = first[organ], second[organ]
        lines.append(f"| {organ:8} | {a:{width}.3f} | {b:{width}.3f} | {b - a:+10.3f} |")
    return "\n".join(lines)


def figure_slice(labels: np.ndarray) -> int:
    """The axial slice that shows the most organs; among those the one with most organ in it."""
    organs = [len(np.unique(plane)) for plane in labels]
    voxels = [np.count_nonzero(plane) for plane in labels]
    return max(range(len(labels)), key=lambda z: (organs[z], voxels[z]))


def draw_figure(raw: Path, predictions: dict[str, Path], file: Path) -> None:
    """Image, truth and each prediction for the first test cases, one row a case.

    Args:
        raw: the raw dataset.
        predictions: folder of predicted test cases by trainer.
        file: the picture to write.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colors = ListedColormap(["#00000000", "#d1495b", "#30638e", "#edae49", "#66a182", "#b56cc4"])
    cases = sorted(path.name for path in (raw / "labelsTs").glob("*.nii.gz"))[:FIGURE_CASES]
    folders = {"image": None, "truth": raw / "labelsTs", **predictions}
    figure = Figure(figsize=(2.7 * len(folders), 2.9 * len(cases) + 0.4))
    axes = figure.subplots(len(cases), len(folders), squeeze=False)
    for title, panel in zip(folders, axes[0], strict=True):
        panel.set_title(title.removeprefix("nnUNetTrainer"), fontsize=10)
    for row, case in zip(axes, cases, strict=True):
        image = _read(raw / "imagesTs" / case.replace(".nii.gz", "_0000.nii.gz"))
        z = figure_slice(_read(raw / "labelsTs" / case))
        for panel, folder in zip(row, folders.values(), strict=True):
            panel.imshow(image[z], cmap="gray", vmin=0, vmax=np.percentile(image, 99.8))
            if folder is not None:
                labels = _read(folder / case)[z]
                panel.imshow(labels, cmap=colors, vmin=0, vmax=5, alpha=0.75, interpolation="nearest")
            panel.set_axis_off()
    handles = [Patch(color=colors(label), label=name) for name, label in ORGANS.items() if label]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(file, dpi=120)


def _read(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
