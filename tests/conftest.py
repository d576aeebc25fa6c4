"""Fixtures that every test may use: tiny prepared datasets, trainers in this process, nnU-Net's real commands.

| fixture | gives |
| --- | --- |
| ``tiny(kind)`` | a prepared dataset shared by the session: not to be changed; kinds: ``helpers.datasets.RECIPES`` |
| ``tiny_copy(kind)`` | a copy of one in this test's own folders, which nnU-Net's variables point at |
| ``fresh_folders`` | three empty nnU-Net folders for this test, set in the environment |
| ``make_trainer(name, dataset, ...)`` | a trainer in this process, results in this test's own folder |
| ``run_nnunet(command, *args, ...)`` | a real command in a separate process |
| ``curves`` | for tests of ``progress.png`` and ``progress_ssl.png``, which trainers here draw only then |
| ``quick_registration`` | for tests of what is done with registrations: a few iterations each |

nnU-Net reads its three folders from the environment at each use, so setting the variables is enough.
"""

from __future__ import annotations

import json
import locale
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))  # `from helpers import ...` in any test

# Read by nnU-Net when it is imported, so set before that.
os.environ.update(
    nnUNet_n_proc_DA="0",  # in this process: no workers
    nnUNet_def_n_proc="1",  # each process of a pool imports nnU-Net, which takes longer than its work
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="PASSIVE",  # nnU-Net's commands take every core each: threads that wait must not spin
    MPLBACKEND="Agg",
    nnUNet_compile="f",
)
for variable in ("nnUNet_ssl_config", "nnUNet_wandb_enabled"):
    os.environ.pop(variable, None)

pytest.register_assert_rewrite("helpers")

from helpers import datasets  # noqa: E402
from helpers.datasets import Folders, TinyDataset  # noqa: E402

# A process settles at its first backward pass how many threads that takes. After torch.compile, which pretends that a
# GPU is there, it starts one, and its forks cannot run backward: so the first one is here, whatever test comes first.
torch.ones((), requires_grad=True).backward()

SHORT = {"num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "seed": 0}


@pytest.fixture(autouse=True)
def own_locale() -> Any:
    """GDCM, which reads DICOM, leaves the process with an ASCII locale: that is not to reach another test."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture(scope="session", autouse=True)
def session_folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """nnU-Net's three folders of the session; no test sees a user's own."""
    folders = Folders.below(tmp_path_factory.mktemp("nnunet"))
    # one of each labeled case, where no test says more
    few_warps = mock.patch.multiple("nnunet_ssl.shapes.warped", BUDGET=0.0, LEAST_EACH=1)
    with datasets.environment(folders.environment()), few_warps:
        yield folders


@pytest.fixture(scope="session", autouse=True)
def no_curves() -> Any:
    """A training in this process draws no curves, which take two seconds an epoch; what a command runs does."""
    from nnunetv2.training.logging.nnunet_logger import MetaLogger

    from nnunet_ssl.trainers.log import SSLLog

    drawing = [(cls, name, getattr(cls, name)) for cls, name in ((MetaLogger, "plot_progress_png"), (SSLLog, "_draw"))]
    with pytest.MonkeyPatch.context() as patch:
        for cls, name, _ in drawing:
            patch.setattr(cls, name, lambda *_: None)
        yield drawing


@pytest.fixture
def curves(no_curves: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws ``progress.png`` and ``progress_ssl.png`` all the same."""
    for drawing in no_curves:
        monkeypatch.setattr(*drawing)


@pytest.fixture(scope="session")
def tiny(session_folders: Folders) -> Callable[..., TinyDataset]:
    """``tiny("3d")``: a prepared dataset, made once a session. Not to be changed: take ``tiny_copy`` for that."""
    made: dict[str, TinyDataset] = {}

    def make(kind: str = "3d") -> TinyDataset:
        if kind not in made:
            recipe = datasets.RECIPES[kind]
            datasets.write_raw_dataset(recipe, session_folders.raw)
            made[kind] = datasets.plan_and_preprocess(recipe, session_folders)
        return made[kind]

    return make


@pytest.fixture
def fresh_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    """Three empty nnU-Net folders of this test, set in the environment."""
    folders = Folders.below(tmp_path / "nnunet")
    for name, value in folders.environment().items():
        monkeypatch.setenv(name, value)
    return folders


@pytest.fixture
def tiny_copy(tiny: Callable[..., TinyDataset], fresh_folders: Folders) -> Callable[..., TinyDataset]:
    """``tiny_copy("3d")``: a dataset that this test may change; its unlabeled images are not prepared yet."""

    def copy(kind: str = "3d") -> TinyDataset:
        original = tiny(kind)
        shutil.copytree(original.raw, fresh_folders.raw / original.name)
        unprepared = shutil.ignore_patterns("*_unlabeled", "*_warped*")  # another test's trainer may have prepared them
        shutil.copytree(original.preprocessed, fresh_folders.preprocessed / original.name, ignore=unprepared)
        return TinyDataset(original.recipe, fresh_folders, original.plans_name)

    return copy


@pytest.fixture
def own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder of this test alone, set in the environment."""
    folder = tmp_path / "results"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("nnUNet_results", str(folder))
    return folder


@pytest.fixture
def quick_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real registrations of a third of the time, which bring the tiny images less close to each other."""
    monkeypatch.setattr("nnunet_ssl.shapes.registration.ITERATIONS", 4)


@pytest.fixture
def make_trainer(own_results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``make_trainer(name, dataset, fold=0, device="cpu", settings=None, initialize=True)``.

    ``settings`` go through ``nnUNet_ssl_config`` on top of two steps an epoch and seed 0 (``SHORT``). The trainer's
    results are this test's own. ``name`` may also be one of nnU-Net's, such as ``nnUNetTrainer``.
    """

    def make(
        name: str,
        dataset: TinyDataset,
        *,
        fold: int | str = 0,
        device: str = "cpu",
        settings: dict[str, Any] | None = None,
        initialize: bool = True,
    ) -> Any:
        config = tmp_path / f"settings_{len(list(tmp_path.glob('settings_*.json')))}.json"
        config.write_text(json.dumps({**SHORT, **(settings or {})}))
        monkeypatch.setenv("nnUNet_ssl_config", str(config))
        for variable, value in dataset.folders.environment().items():
            if variable != "nnUNet_results":
                monkeypatch.setenv(variable, value)
        trainer = _trainer_class(name)(
            plans={**dataset.plans, "continue_training": False},
            configuration=dataset.configuration,
            fold=fold,
            dataset_json=dataset.dataset_json,
            device=torch.device(device),
        )
        if initialize:
            trainer.initialize()
        return trainer

    return make


def _trainer_class(name: str) -> type:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    import nnunet_ssl.trainers

    try:
        return getattr(nnunet_ssl.trainers, name)
    except AttributeError:
        return recursive_find_trainer_class_by_name(name)


@pytest.fixture(scope="session")
def run_nnunet() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_nnunet("nnUNetv2_train", 901, "3d_fullres", 0, "-tr", name, "-device", "cpu", settings={...})``.

    Runs the command in a separate process with the environment as it is now, one worker and one thread where
    nnU-Net lets us say so, and gives back what it printed. ``check=True`` (the default) fails the test with the end
    of the output when the exit code is not 0. ``settings`` as for ``make_trainer``. Works with the package installed
    or not.
    """
    counter = iter(range(10**6))

    def run(
        command: str,
        *args: Any,
        env: dict[str, str] | None = None,
        settings: dict[str, Any] | None = None,
        check: bool = True,
        timeout: float = 300,
        folder: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "nnUNet_n_proc_DA": "1", **_discovery(), **(env or {})}
        if settings is not None:
            config = (folder or Path(variables["nnUNet_results"])) / f"run_settings_{next(counter)}.json"
            config.write_text(json.dumps({**SHORT, **settings}))
            variables["nnUNet_ssl_config"] = str(config)
        process = subprocess.run(
            [*_executable(command), *map(str, args)],
            env=variables,
            encoding="utf-8",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=timeout,
        )
        if check and process.returncode != 0:
            pytest.fail(
                f"{command} ended with {process.returncode}\n{process.stdout[-3000:]}\n{process.stderr[-3000:]}",
                pytrace=False,
            )
        return process

    return run


def _executable(command: str) -> list[str]:
    """The installed command, or the module behind one of ours where the package is not installed."""
    script = Path(sys.executable).parent / command
    if script.exists():
        return [str(script)]
    verb = command.removeprefix("nnUNetv2_ssl_")
    return [sys.executable, "-c", f"from nnunet_ssl.commands.{verb} import main; main()"]


def _discovery() -> dict[str, str]:
    """What makes a child find the package from the checkout even where it is not installed."""
    ext = ROOT / "nnunet_ssl" / "_ext"
    known = os.environ.get("nnUNet_extTrainer", "")
    trainers = known if str(ext) in known.split(os.pathsep) else os.pathsep.join(filter(None, (str(ext), known)))
    return {
        "nnUNet_extTrainer": trainers,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))),
    }
