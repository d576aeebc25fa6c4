"""nnU-Net finds our trainers after a real ``pip install``, in every process, and nothing stays after uninstalling.

The package is installed from a copy of this source tree into a small virtual environment that sees the packages of the
environment that runs the tests, so nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from nnunet_ssl import _startup
from nnunet_ssl.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "startup", "nnunet_ssl")
VARIABLE = "nnUNet_extTrainer"
MODES = ["plain", "editable"]

NAMES = ("nnUNetTrainerSHTA_CPS", "nnUNetTrainerCPS", "nnUNetTrainerLabeledOnly", "nnUNetTrainerSHTA_CPS_7epochs")

USERS_TRAINER = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

class nnUNetTrainerOfTheUser(nnUNetTrainer):
    pass
"""

# Run as a file in the small environment: what nnU-Net does in the process itself and in each DDP rank.
LOOKUPS = """
import json, os, pickle, sys
import torch.multiprocessing
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find

FOLDER, *NAMES = sys.argv[1:]

def describe(name):
    first, second = find(name), find(name)
    return {
        "name": first.__name__,
        "module": first.__module__,
        "same": first is second,
        "pickles": pickle.loads(pickle.dumps(first)) is first,
    }

def rank(number):
    found = {name: describe(name) for name in (NAMES[0], NAMES[-1])}
    found["user"] = find("nnUNetTrainerOfTheUser").__name__
    with open(os.path.join(FOLDER, f"{number}.json"), "w") as file:
        json.dump(found, file)

if __name__ == "__main__":
    found = {name: describe(name) for name in NAMES}
    from nnunet_ssl import trainers
    for name in NAMES:
        assert find(name) is getattr(trainers, name)
    assert "nnunet_ssl_ext" not in sys.modules, "nnU-Net forgets the module of its search"
    found["user"] = find("nnUNetTrainerOfTheUser").__name__
    found["variable"] = os.environ["nnUNet_extTrainer"].split(os.pathsep)
    torch.multiprocessing.spawn(rank, nprocs=1)
    with open(os.path.join(FOLDER, "0.json")) as file:
        found["rank"] = json.load(file)
    print("RESULT" + json.dumps(found))
"""


class SmallEnvironment:
    """A virtual environment with a copy of the source tree beside it.

    Args:
        folder: where both are made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefix = folder / "venv"
        venv.create(self.prefix, with_pip=False, symlinks=os.name != "nt")
        scripts = "Scripts" if os.name == "nt" else "bin"
        self.python = self.prefix / scripts / Path(sys.executable).name
        where = self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        self.site_packages = Path(where.stdout.strip())
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (self.site_packages / "packages_of_the_tests.pth").write_text("\n".join(sorted(paths)) + "\n")
        self.source = folder / "source"
        self.source.mkdir()
        for name in INSTALLED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.source / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, self.source)

    def run(self, *arguments: str | Path, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        """Its Python, in an empty folder and with none of our variables but those given."""
        kept = {k: v for k, v in os.environ.items() if k not in (VARIABLE, "PYTHONPATH")}
        elsewhere = self.folder / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        done = subprocess.run(
            [str(self.python), *map(str, arguments)], cwd=elsewhere, env={**kept, **variables},
            capture_output=True, encoding="utf-8", timeout=300,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def pip(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "pip", "--disable-pip-version-check", *arguments)

    def install(self, mode: str) -> None:
        editable = ["-e"] if mode == "editable" else []
        self.pip("install", "--no-deps", "--no-index", "--no-build-isolation", *editable, self.source)

    def variable(self) -> list[str]:
        """The folders that a fresh Python has in nnU-Net's variable."""
        return self.run("-c", f"import os; print(os.environ.get({VARIABLE!r}, ''))").stdout.strip().split(os.pathsep)

    def files(self) -> set[str]:
        return {path.relative_to(self.prefix).as_posix() for path in self.prefix.rglob("*")}


@pytest.fixture
def small_environment(tmp_path: Path) -> SmallEnvironment:
    pytest.importorskip("setuptools", reason="the build of the package needs setuptools (the dev extra has it)")
    return SmallEnvironment(tmp_path)


@pytest.fixture
def installed(small_environment: SmallEnvironment) -> Callable[[str], SmallEnvironment]:
    def install(mode: str) -> SmallEnvironment:
        small_environment.install(mode)
        return small_environment

    return install


def our_folder(environment: SmallEnvironment, mode: str) -> str:
    home = environment.source if mode == "editable" else environment.site_packages
    return str(home / "nnunet_ssl" / "_ext")


@pytest.mark.parametrize("mode", MODES)
def test_install_takes_effect_and_uninstall_leaves_nothing(
    small_environment: SmallEnvironment, tmp_path: Path, mode: str
) -> None:
    """In between, nnU-Net finds the trainers, and Python starts in silence even where the package is broken."""
    environment = small_environment
    assert environment.variable() == [""]
    before = environment.files()

    environment.install(mode)
    assert environment.variable() == [our_folder(environment, mode)]
    assert "nnUNetv2_ssl_trainers" in {Path(file).stem for file in environment.files()}
    # Both files are there, and what .start names does nothing that .pth has not done.
    entry = (environment.site_packages / "nnunet_ssl.start").read_text().strip()
    again = f"import os, pkgutil; pkgutil.resolve_name({entry!r})(); print(os.environ[{VARIABLE!r}])"
    assert environment.run("-c", again).stdout.strip() == our_folder(environment, mode)
    if mode == "plain":
        nnunet_finds_trainers_in_every_process(environment, tmp_path, mode)
    else:
        python_starts_in_silence_when_the_package_is_broken_or_gone(environment)

    environment.pip("uninstall", "-y", "nnunet-ssl")
    assert environment.files() == before
    assert environment.variable() == [""]


def nnunet_finds_trainers_in_every_process(environment: SmallEnvironment, tmp_path: Path, mode: str) -> None:
    users = tmp_path / "users"
    users.mkdir()
    (users / "users_trainer.py").write_text(USERS_TRAINER)
    script = tmp_path / "lookups.py"
    script.write_text(LOOKUPS)

    done = environment.run(script, tmp_path, *NAMES, **{VARIABLE: str(users)})
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))[len("RESULT") :])

    for name in NAMES:
        assert found[name]["name"] == name
        assert found[name]["module"].startswith("nnunet_ssl.trainers")
        assert found[name]["same"]
        assert found[name]["pickles"]
    assert found["user"] == "nnUNetTrainerOfTheUser"
    assert found["variable"] == [our_folder(environment, mode), str(users)]
    assert found["rank"]["nnUNetTrainerSHTA_CPS"] == found["nnUNetTrainerSHTA_CPS"]
    assert found["rank"]["nnUNetTrainerSHTA_CPS_7epochs"] == found["nnUNetTrainerSHTA_CPS_7epochs"]
    assert found["rank"]["user"] == "nnUNetTrainerOfTheUser"


def python_starts_in_silence_when_the_package_is_broken_or_gone(environment: SmallEnvironment) -> None:
    package = environment.source / "nnunet_ssl"
    (package / "__init__.py").write_text("<<<<<<< a merge conflict\n")
    broken = environment.run("-c", "print('alive')")
    shutil.rmtree(package)
    gone = environment.run("-c", "print('alive')")
    for start in (broken, gone):
        assert (start.stdout, start.stderr) == ("alive\n", "")


@pytest.mark.slow
def test_nnunet_finds_trainers_of_an_editable_install(
    installed: Callable[[str], SmallEnvironment], tmp_path: Path
) -> None:
    nnunet_finds_trainers_in_every_process(installed("editable"), tmp_path, "editable")


@pytest.mark.slow
def test_wheel_from_sdist_carries_the_startup_files(small_environment: SmallEnvironment, tmp_path: Path) -> None:
    """As an index would serve it: first the source archive, from that the wheel."""
    build = f"""
import os, tarfile, zipfile, glob
import setuptools.build_meta as backend
os.chdir({str(small_environment.source)!r})
archive = backend.build_sdist({str(tmp_path)!r})
with tarfile.open(os.path.join({str(tmp_path)!r}, archive)) as file:
    file.extractall({str(tmp_path / "unpacked")!r})
os.chdir(glob.glob(os.path.join({str(tmp_path / "unpacked")!r}, "*"))[0])
wheel = backend.build_wheel({str(tmp_path)!r})
print("WHEEL", *zipfile.ZipFile(os.path.join({str(tmp_path)!r}, wheel)).namelist())
"""
    names = small_environment.run("-c", build).stdout.strip().splitlines()[-1].split()
    assert names[0] == "WHEEL"
    assert {"nnunet_ssl.pth", "nnunet_ssl.start", "_nnunet_ssl_startup.py"} <= set(names)
    assert {f"nnunet_ssl/{file.relative_to(ROOT / 'nnunet_ssl').as_posix()}" for file in
            (ROOT / "nnunet_ssl").rglob("*.py")} <= set(names)  # fmt: skip


def register(monkeypatch: pytest.MonkeyPatch, before: str | None) -> list[str]:
    if before is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, before)
    _startup.register()
    _startup.register()
    return os.environ[VARIABLE].split(os.pathsep)


@pytest.mark.parametrize(
    ("before", "behind"),
    [
        (None, []),
        ("", []),
        ("theirs", ["theirs"]),
        (os.pathsep.join(["one", "two"]), ["one", "two"]),
        (os.pathsep.join(["one", _startup.EXT_FOLDER]), ["one"]),
        (os.pathsep.join([os.path.join("another", "nnunet_ssl", "_ext"), "one", ""]), ["one"]),
    ],
)
def test_register_puts_our_folder_in_front_once(
    monkeypatch: pytest.MonkeyPatch, before: str | None, behind: list[str]
) -> None:
    assert register(monkeypatch, before) == [_startup.EXT_FOLDER, *behind]


@pytest.fixture
def ext() -> ModuleType:
    """The module as nnU-Net imports it: by file, outside any package."""
    spec = importlib.util.spec_from_file_location("nnunet_ssl_ext", Path(_startup.EXT_FOLDER, "nnunet_ssl_ext.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_searched_folder_holds_one_module() -> None:
    modules = [file.name for file in Path(_startup.EXT_FOLDER).glob("*.py") if file.name != "__init__.py"]
    assert modules == ["nnunet_ssl_ext.py"]


def test_a_python_without_the_package_looks_on(ext: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is inherited by other environments' Pythons: nnU-Net there must get to the user's own folders."""
    monkeypatch.setitem(sys.modules, "nnunet_ssl", None)
    assert not hasattr(ext, "nnUNetTrainerCPS")


def test_an_import_error_of_a_trainer_is_not_hidden(ext: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    trainers = ModuleType("nnunet_ssl.trainers")

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named 'torch', wanted by {name}", name="torch")

    trainers.__getattr__ = missing
    monkeypatch.setitem(sys.modules, "nnunet_ssl.trainers", trainers)
    monkeypatch.setattr("nnunet_ssl.trainers", trainers, raising=False)
    with pytest.raises(ModuleNotFoundError, match="torch"):
        ext.nnUNetTrainerCPS  # noqa: B018


def test_ours_is_found_beside_a_broken_folder_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunet_ssl import trainers

    (tmp_path / "unfinished_trainer.py").write_text("import a_module_that_is_not_there\n")
    register(monkeypatch, str(tmp_path))
    assert recursive_find_trainer_class_by_name("nnUNetTrainerCPS") is trainers.nnUNetTrainerCPS


@pytest.mark.parametrize(
    "name",
    ["nnUNetTrainerCPS_epochs", "nnUNetTrainerCPS_-1epochs", "nnUNetTrainerNoSuch", "nnUNetTrainerNoSuch_5epochs"],
)
def test_names_that_are_not_ours_are_refused(ext: ModuleType, name: str) -> None:
    with pytest.raises(AttributeError):
        getattr(ext, name)


@pytest.mark.parametrize("number", ["0", "00", "1000000000", "9" * 401, "9" * 5000], ids=lambda number: number[:11])
def test_numbers_of_epochs_that_cannot_be(ext: ModuleType, number: str) -> None:
    """In a sentence, through nnU-Net's own look-up."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    name = f"nnUNetTrainerCPS_{number}epochs"
    with pytest.raises(UserError, match=r"nnUNetTrainerCPS_<N>epochs: N must be"):
        hasattr(ext, name)
    with pytest.raises(UserError, match=r"nnUNetTrainerCPS_<N>epochs: N must be"):
        recursive_find_trainer_class_by_name(name)


def test_numbers_of_epochs_that_can_be(ext: ModuleType) -> None:
    assert [getattr(ext, f"nnUNetTrainerCPS_{n}epochs").epochs for n in ("1", "007", "999999999")] == [1, 7, 999999999]
