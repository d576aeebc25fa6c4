"""nnU-Net without this package takes what these trainers write: checkpoints, zip files and exports.

A second virtual environment holds every installed distribution but ours. What it predicts is compared, bit for bit,
with what is predicted here.
"""

from __future__ import annotations

import os
import site
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow

TRAINERS = ("nnUNetTrainerCPS", "nnUNetTrainerSHTA_CPS")
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
            text=True,
            capture_output=True,
            timeout=600,
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
    tiny: Callable, run_nnunet: Callable, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, dict[str, str]]:
    """The tiny dataset and, in a results folder, models of one epoch by nnU-Net and by each of our trainers."""
    dataset = tiny("3d")
    results = tmp_path_factory.mktemp("results")
    variables = {**dataset.folders.environment(), "nnUNet_results": str(results)}
    for name in TRAINERS:
        run_nnunet(
            "nnUNetv2_train", dataset.id, dataset.configuration, 0, "-tr", f"{name}_2epochs", "-device", "cpu",
            env=variables, settings={"keep_epochs": [1]}, folder=results,
        )  # fmt: skip
    return dataset, variables


def model_folder(dataset: Any, variables: dict[str, str], trainer: str) -> Path:
    """The folder of a trained model."""
    name = f"{trainer}__{dataset.plans_name}__{dataset.configuration}"
    return Path(variables["nnUNet_results"]) / dataset.name / name


def predictions(folder: Path) -> dict[str, np.ndarray]:
    """The probabilities of each case."""
    return {file.name: np.load(file)["probabilities"] for file in sorted(folder.glob("*.npz"))}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert one
    assert one.keys() == other.keys()
    for case in one:
        np.testing.assert_array_equal(one[case], other[case])


@pytest.mark.parametrize("checkpoint", ["checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_epoch1.pth"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_checkpoint_predicts_the_same_without_this_package(stock, trained, run_nnunet, tmp_path, trainer, checkpoint):
    dataset, variables = trained
    arguments = [
        "-d", dataset.id, "-c", dataset.configuration, "-f", 0, "-tr", f"{trainer}_2epochs", "-chk", checkpoint,
        "-i", dataset.raw / "imagesTs", "-device", "cpu", "--save_probabilities", "-npp", 1, "-nps", 1,
    ]  # fmt: skip
    run_nnunet("nnUNetv2_predict", *arguments, "-o", tmp_path / "here", env=variables)
    stock.command("nnUNetv2_predict", *arguments, "-o", tmp_path / "stock", **variables)
    assert_same(predictions(tmp_path / "here"), predictions(tmp_path / "stock"))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_checkpoint_is_that_of_a_plain_trainer(trained, make_trainer, tmp_path, trainer):
    dataset, variables = trained
    plain = make_trainer("nnUNetTrainer", dataset)
    plain.num_epochs, plain.num_iterations_per_epoch, plain.num_val_iterations_per_epoch = 2, 2, 1
    plain.run_training()
    plain_file = Path(plain.output_folder) / "checkpoint_final.pth"
    file = model_folder(dataset, variables, f"{trainer}_2epochs") / "fold_0" / "checkpoint_final.pth"
    ours, theirs = (torch.load(f, map_location="cpu", weights_only=False) for f in (file, plain_file))

    assert ours.keys() == theirs.keys() == EXPECTED_KEYS
    assert ours["trainer_name"] == theirs["trainer_name"] == "nnUNetTrainer"
    shapes = [{k: (v.shape, v.dtype) for k, v in c["network_weights"].items()} for c in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert len(ours["optimizer_state"]["state"]) == len(theirs["optimizer_state"]["state"])
    assert ours["logging"].keys() == theirs["logging"].keys()
    # the logged values take a few bytes more or less
    assert file.stat().st_size == pytest.approx(plain_file.stat().st_size, abs=2048)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_model_zip_of_nnunet_installs_and_predicts_without_this_package(stock, trained, run_nnunet, tmp_path, trainer):
    dataset, variables = trained
    run_nnunet(
        "nnUNetv2_export_model_to_zip", "-d", dataset.id, "-c", dataset.configuration, "-f", 0, "-tr",
        f"{trainer}_2epochs", "-o", tmp_path / "model.zip", env=variables,
    )  # fmt: skip
    installed = tmp_path / "installed"
    installed.mkdir()
    stock.command("nnUNetv2_install_pretrained_model_from_zip", tmp_path / "model.zip", nnUNet_results=str(installed))
    stock.command(
        "nnUNetv2_predict", "-d", dataset.name, "-c", dataset.configuration, "-f", 0, "-tr", f"{trainer}_2epochs",
        "-i", dataset.raw / "imagesTs", "-o", tmp_path / "out", "-device", "cpu", "-npp", 1, "-nps", 1,
        nnUNet_results=str(installed),
    )  # fmt: skip
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == dataset.recipe.test
    assert not list(installed.rglob("*_ssl.pth"))


def test_export_installs_and_averages_both_networks_without_this_package(stock, trained, run_nnunet, tmp_path):
    dataset, variables = trained
    run_nnunet(
        "nnUNetv2_ssl_export", "-d", dataset.id, "-c", dataset.configuration, "-f", 0, "-tr",
        f"{TRAINERS[0]}_2epochs", "-o", tmp_path / "plain", "--both", "--zip", env=variables,
    )  # fmt: skip
    installed = tmp_path / "installed"
    installed.mkdir()
    stock.command("nnUNetv2_install_pretrained_model_from_zip", tmp_path / "plain.zip", nnUNet_results=str(installed))
    for folds in ([0], [1], [0, 1]):
        stock.command(
            "nnUNetv2_predict", "-d", dataset.name, "-c", dataset.configuration, "-f", *folds,
            "-i", dataset.raw / "imagesTs", "-o", tmp_path / f"folds{len(folds)}{folds[0]}", "-device", "cpu",
            "-npp", 1, "-nps", 1, "--save_probabilities", nnUNet_results=str(installed),
        )  # fmt: skip
    first, second, average = (predictions(tmp_path / f"folds{name}") for name in ("10", "11", "20"))
    for case in average:
        assert not np.array_equal(first[case], second[case])
        # nnU-Net averages logits: the log-probabilities average up to a constant a voxel
        logs = [np.log(p[case].astype(np.float64)) for p in (first, second)]
        mean = np.exp((logs[0] + logs[1]) / 2)
        np.testing.assert_allclose(average[case], mean / mean.sum(0), atol=2e-3)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_other_stock_commands_take_the_model(trained, run_nnunet, trainer):
    """Here, with the package: the class is found by -tr, the file says nnUNetTrainer."""
    dataset, variables = trained
    common = [dataset.id, dataset.configuration, 0, "-tr", f"{trainer}_2epochs", "-device", "cpu"]
    settings = {"settings": {"keep_epochs": [1]}, "folder": Path(variables["nnUNet_results"])}
    run_nnunet("nnUNetv2_train", *common, "--val", env=variables, **settings)
    run_nnunet("nnUNetv2_train", *common, "--val", "--val_best", env=variables, **settings)
    run_nnunet("nnUNetv2_train", *common, "--c", env=variables, **settings)
    run_nnunet(
        "nnUNetv2_find_best_configuration", dataset.id, "-c", dataset.configuration, "-tr", f"{trainer}_2epochs",
        "-p", dataset.plans_name, "-f", 0, "--disable_ensembling", "-np", 1, env=variables,
    )  # fmt: skip
    assert (model_folder(dataset, variables, f"{trainer}_2epochs") / "crossval_results_folds_0").is_dir()
