"""nnU-Net without this package takes what these trainers write: checkpoints, zip files and exports.

A second virtual environment holds every installed distribution but ours. What it predicts is compared, bit for bit,
with what is predicted here.
"""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import datasets
from nnunetv2.evaluation.find_best_configuration import find_best_configuration
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.run.run_training import run_training
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

import nnunet_ssl
from nnunet_ssl.commands.export import main as export
from nnunet_ssl.commands.preprocess import main as prepare

pytestmark = pytest.mark.slow

# the last is a user's own, with an adversary and its optimizer
OURS = ("nnUNetTrainerCPS_2epochs", "nnUNetTrainerSHTA_CPS_2epochs", "nnUNetTrainerAdversarial_2epochs")
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_epoch1.pth")
EXPECTED_KEYS = {
    "network_weights",
    "optimizer_state",
    "grad_scaler_state",
    "logging",
    "_best_ema",
    "current_epoch",
    "init_args",
    "trainer_name",
    "inference_allowed_mirroring_axes",
}
# Predicts a folder with several models in one process: importing nnU-Net takes longer than the rest.
PREDICT = """
import json, multiprocessing, os, sys
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
torch.set_num_threads(multiprocessing.cpu_count())  # as nnUNetv2_predict does; sums depend on it
for model, folds, checkpoint, images, output in json.loads(sys.argv[1]):
    os.makedirs(output)
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(model, folds, checkpoint)
    predictor.predict_from_files_sequential(images, output, save_probabilities=True)
"""


def is_ours(entry: Path) -> bool:
    """Whether an entry of site-packages belongs to this package, or leads to it."""
    if "nnunet_ssl" in entry.name.replace("-", "_").lower():
        return True
    return entry.suffix in (".pth", ".start") and "nnunet_ssl" in entry.read_text(errors="replace")


class StockEnvironment:
    """A virtual environment with everything that is installed here but this package."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "venv", with_pip=False, symlinks=True)
        self.python = folder / "venv" / "bin" / "python"
        self.folder = folder
        library = folder / "venv" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        for source in [*site.getsitepackages(), site.getusersitepackages()]:
            for entry in Path(source).glob("*") if os.path.isdir(source) else ():
                link = library / entry.name
                if entry.name != "__pycache__" and not is_ours(entry) and not link.exists():
                    link.symlink_to(entry)

    def run(self, code: str, *args: Any, **variables: str) -> str:
        """Run Python code there, in a folder without this package, and return what it printed."""
        ours = ("PYTHONPATH", "nnUNet_extTrainer", "nnUNet_ssl_config", "VIRTUAL_ENV")
        process = subprocess.run(
            [str(self.python), "-c", code, *map(str, args)],
            env={**{k: v for k, v in os.environ.items() if k not in ours}, "nnUNet_n_proc_DA": "1", **variables},
            cwd=self.folder,
            encoding="utf-8",
            capture_output=True,
            timeout=500,
        )
        assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
        return process.stdout

    def command(self, name: str, *args: Any, **variables: str) -> str:
        """Run one of nnU-Net's commands there."""
        code = (
            "import sys; from importlib.metadata import entry_points as e; "
            f"[c] = e(group='console_scripts', name='{name}'); sys.argv[0] = '{name}'; c.load()()"
        )
        return self.run(code, *args, **variables)

    def predict(self, jobs: list[tuple], **variables: str) -> None:
        """Run ``PREDICT`` there."""
        self.run(PREDICT, json.dumps(jobs, default=str), **variables)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> StockEnvironment:
    """The second environment, proved to have nnU-Net and not this package."""
    environment = StockEnvironment(tmp_path_factory.mktemp("stock"))
    seen = environment.run(
        "import importlib.util as u, os, nnunetv2; "
        "print(u.find_spec('nnunet_ssl'), os.environ.get('nnUNet_extTrainer'), nnunetv2.__file__)"
    )
    nothing, no_trainers, nnunet = seen.split(maxsplit=2)
    assert (nothing, no_trainers) == ("None", "None")
    assert str(environment.folder) in nnunet
    return environment


@pytest.fixture(scope="module")
def trained(
    tiny: Callable, no_curves: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, dict[str, Path]]]:
    """The tiny dataset and the model folders of two epochs, with validation, by nnU-Net and by each of our trainers.

    While this module runs, nnU-Net's variables point at them, and nnU-Net's pools are threads.
    """
    dataset = tiny("3d")
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "settings.json"
    config.write_text(
        json.dumps({"num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "seed": 0, "keep_epochs": [1]})
    )
    variables = {
        "nnUNet_results": str(folder),
        "nnUNet_ssl_config": str(config),
        "nnUNet_extTrainer": os.pathsep.join(
            map(str, (Path(nnunet_ssl.__file__).parent / "_ext", Path(__file__).parent / "own_trainers"))
        ),
    }
    prepare(["-d", str(dataset.id), "-c", dataset.configuration, "-np", "1"])
    with datasets.environment(variables), datasets.threads_for_processes(), pytest.MonkeyPatch.context() as patch:
        for drawing in no_curves:
            patch.setattr(*drawing)  # nnU-Net's zip of a model holds progress.png
        models = {}
        for name in (*OURS, "nnUNetTrainer"):
            trainer = recursive_find_trainer_class_by_name(name)(
                plans={**dataset.plans, "continue_training": False},
                configuration=dataset.configuration,
                fold=0,
                dataset_json=dataset.dataset_json,
                device=torch.device("cpu"),
            )
            if name == "nnUNetTrainer":
                trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 2, 2, 1
            trainer.run_training()
            trainer.perform_actual_validation()
            models[name] = Path(trainer.output_folder_base)
        yield dataset, models


@pytest.fixture(scope="module")
def predicted(trained: tuple, stock: StockEnvironment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the predictions of each checkpoint, in ``here`` and in ``stock``."""
    dataset, models = trained
    folder = tmp_path_factory.mktemp("predicted")
    for place in ("here", "stock"):
        jobs = [
            (models[name], [0], checkpoint, dataset.raw / "imagesTs", folder / place / name / checkpoint)
            for name in OURS
            for checkpoint in CHECKPOINTS
        ]
        if place == "stock":
            stock.predict(jobs)
        else:
            environment = {**os.environ, "PYTHONPATH": str(Path(nnunet_ssl.__file__).parent.parent)}
            subprocess.run([sys.executable, "-c", PREDICT, json.dumps(jobs, default=str)], env=environment, check=True)
    return folder


def probabilities(folder: Path) -> dict[str, np.ndarray]:
    """Of each case that was predicted into ``folder``."""
    return {file.name: np.load(file)["probabilities"] for file in sorted(folder.glob("*.npz"))}


def assert_same(one: Path, other: Path) -> None:
    """The same cases with the same probabilities, bit for bit."""
    first, second = probabilities(one), probabilities(other)
    assert first
    assert first.keys() == second.keys()
    for case in first:
        np.testing.assert_array_equal(first[case], second[case])


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("name", OURS)
def test_checkpoint_predicts_the_same_without_this_package(predicted, name, checkpoint):
    assert_same(predicted / "here" / name / checkpoint, predicted / "stock" / name / checkpoint)


def test_command_predicts_without_this_package(stock, trained, predicted, tmp_path):
    dataset, _ = trained
    stock.command(
        "nnUNetv2_predict", "-d", dataset.id, "-c", dataset.configuration, "-f", 0, "-tr", OURS[1],
        "-i", dataset.raw / "imagesTs", "-o", tmp_path, "-device", "cpu", "-npp", 1, "-nps", 1, "--save_probabilities",
    )  # fmt: skip
    assert_same(tmp_path, predicted / "here" / OURS[1] / "checkpoint_final.pth")


@pytest.mark.parametrize("name", OURS)
def test_checkpoint_is_that_of_a_plain_trainer(trained, name):
    _, models = trained
    ours, theirs = (models[n] / "fold_0" / "checkpoint_final.pth" for n in (name, "nnUNetTrainer"))
    ours_content, theirs_content = (torch.load(f, map_location="cpu", weights_only=False) for f in (ours, theirs))

    assert ours_content.keys() == theirs_content.keys() == EXPECTED_KEYS
    assert ours_content["trainer_name"] == theirs_content["trainer_name"] == "nnUNetTrainer"
    assert ours_content["logging"].keys() == theirs_content["logging"].keys()
    assert ours_content["current_epoch"] == theirs_content["current_epoch"]
    weights, plain_weights = ours_content["network_weights"], theirs_content["network_weights"]
    assert {k: (v.shape, v.dtype) for k, v in weights.items()} == {
        k: (v.shape, v.dtype) for k, v in plain_weights.items()
    }
    assert len(ours_content["optimizer_state"]["state"]) == len(theirs_content["optimizer_state"]["state"])
    # what is logged takes a few bytes more or less
    assert ours.stat().st_size == pytest.approx(theirs.stat().st_size, abs=1024)


def test_model_zip_of_nnunet_installs_and_predicts_without_this_package(stock, trained, predicted, tmp_path):
    dataset, models = trained
    archive, installed = tmp_path / "model.zip", tmp_path / "installed"
    installed.mkdir()
    export_pretrained_model(dataset.id, str(archive), (dataset.configuration,), OURS[0], dataset.plans_name, (0,))
    stock.command("nnUNetv2_install_pretrained_model_from_zip", archive, nnUNet_results=str(installed))
    assert not list(installed.rglob("*_ssl.pth"))
    model = installed / dataset.name / models[OURS[0]].name
    stock.predict([(model, [0], "checkpoint_final.pth", dataset.raw / "imagesTs", tmp_path / "out")])
    assert_same(tmp_path / "out", predicted / "here" / OURS[0] / "checkpoint_final.pth")


def test_export_installs_and_averages_both_networks_without_this_package(stock, trained, predicted, tmp_path):
    dataset, _ = trained
    installed = tmp_path / "installed"
    installed.mkdir()
    export(
        ["-d", str(dataset.id), "-c", dataset.configuration, "-f", "0", "-tr", OURS[0], "-o", str(tmp_path / "plain"),
         "--both", "--zip"]
    )  # fmt: skip
    stock.command("nnUNetv2_install_pretrained_model_from_zip", tmp_path / "plain.zip", nnUNet_results=str(installed))
    model = installed / dataset.name / f"nnUNetTrainer__{dataset.plans_name}__{dataset.configuration}"
    names = {"first": [0], "second": [1], "average": [0, 1]}
    stock.predict(
        [
            (model, folds, "checkpoint_final.pth", dataset.raw / "imagesTs", tmp_path / name)
            for name, folds in names.items()
        ]
    )
    assert_same(tmp_path / "first", predicted / "here" / OURS[0] / "checkpoint_final.pth")
    first, second, average = (probabilities(tmp_path / name) for name in names)
    for case in average:
        assert not np.array_equal(first[case], second[case])
        # nnU-Net averages logits: log-probabilities average up to a constant in each voxel
        mean = np.exp((np.log(first[case].astype(np.float64)) + np.log(second[case].astype(np.float64))) / 2)
        np.testing.assert_allclose(average[case], mean / mean.sum(0), atol=5e-3)


@pytest.mark.parametrize("name", OURS)
def test_other_commands_take_the_model(trained, name):
    """With this package: the class is found by -tr, though the file says nnUNetTrainer."""
    dataset, models = trained
    summary = models[name] / "fold_0" / "validation" / "summary.json"
    first_scores = json.loads(summary.read_text())["foreground_mean"]
    summary.unlink()
    arguments = (str(dataset.id), dataset.configuration, 0, name, dataset.plans_name)
    run_training(*arguments, only_run_validation=True, device=torch.device("cpu"))  # --val
    assert json.loads(summary.read_text())["foreground_mean"] == first_scores
    run_training(*arguments, only_run_validation=True, val_with_best=True, device=torch.device("cpu"))  # --val_best
    run_training(*arguments, continue_training=True, device=torch.device("cpu"))  # --c of a finished run
    assert json.loads(summary.read_text())["foreground_mean"] == first_scores

    model = {"configuration": dataset.configuration, "plans": dataset.plans_name, "trainer": name}
    find_best_configuration(dataset.id, [model], allow_ensembling=False, num_processes=1, folds=(0,))
    assert (models[name] / "crossval_results_folds_0" / "postprocessing.pkl").is_file()
