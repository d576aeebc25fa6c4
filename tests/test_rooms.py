"""The rooms of the package: which may import which, and what importing them costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nnunet_ssl"

# small modules below every room
OPEN_TO_ALL = {
    "checkpoints",
    "declared",
    "errors",
    "files",
    "locks",
    "names",
    "pools",
    "ram",
    "randomness",
    "stock_commands",
    "supervise",
    "volumes",
}
# room -> the rooms that it may import besides itself
MAY_IMPORT = {
    "__init__": set(),
    "_startup": set(),
    **{module: set() for module in OPEN_TO_ALL},
    "losses": set(),
    "networks": {"losses"},
    "unlabeled": set(),
    "shapes": {"unlabeled"},
    "trainers": {"losses", "networks", "unlabeled", "shapes"},
    "evaluation": set(),
    "_ext": {"trainers"},
    "export": {"losses", "networks", "unlabeled", "shapes", "trainers"},
    "demo": {"losses", "networks", "unlabeled", "shapes", "trainers", "evaluation"},
    "self_training": {"unlabeled", "shapes", "export"},
    "figures": {"losses", "networks", "unlabeled", "shapes", "trainers", "evaluation"},
    "benchmark": {"trainers", "evaluation", "demo"},
    "commands": {
        "_startup",
        "losses",
        "networks",
        "unlabeled",
        "shapes",
        "trainers",
        "evaluation",
        "export",
        "demo",
        "self_training",
        "benchmark",
        "figures",
    },
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    """The folder, or the module, right below the package."""
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def rooms_imported_by(file: Path) -> set[str]:
    """The rooms that a file names in its import statements, wherever in the file they stand."""
    package = ["nnunet_ssl", *file.relative_to(PACKAGE).parts[:-1]]
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("nnunet_ssl.")} - {"__version__"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(file: Path) -> None:
    room = room_of(file)
    assert room in MAY_IMPORT, f"{room} is a new room: say in MAY_IMPORT what it may import"
    wrong = rooms_imported_by(file) - MAY_IMPORT[room] - OPEN_TO_ALL - {room}
    assert not wrong, f"{file.relative_to(ROOT)} imports from {sorted(wrong)}; {room} may import {MAY_IMPORT[room]}"


def test_the_reader_of_imports_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    file = tmp_path / "losses" / "made_up.py"
    file.parent.mkdir()
    file.write_text(
        "import nnunet_ssl.networks.twin\nfrom nnunet_ssl.trainers import base\nfrom nnunet_ssl import evaluation\n"
        "from ..unlabeled import loader\nfrom . import ramps\nimport torch\n\n"
        "def f():\n    from nnunet_ssl.demo import x\n"
    )
    assert room_of(file) == "losses"
    assert rooms_imported_by(file) == {"networks", "trainers", "evaluation", "unlabeled", "losses", "demo"}


def test_every_folder_with_modules_is_a_package() -> None:
    """Folders without ``__init__.py`` are left out of the wheel without a word."""
    missing = {file.parent for file in FILES if not (file.parent / "__init__.py").is_file()}
    assert not missing


def modules_imported_by(code: str) -> set[str]:
    """The modules that ``code`` adds to those of a bare interpreter that has imported ``os``, as every start does."""
    script = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); before = set(sys.modules)\n{code}\n"
    script += "print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_startup_imports_nothing_but_itself() -> None:
    assert modules_imported_by("import nnunet_ssl._startup") == {"nnunet_ssl", "nnunet_ssl._startup"}


def test_a_name_that_is_not_ours_is_refused_without_importing_torch() -> None:
    """nnU-Net asks our module for the trainers of others as well."""
    code = (
        "sys.path.insert(0, os.path.join(sys.path[0], 'nnunet_ssl', '_ext'))\n"
        "import nnunet_ssl_ext\n"
        "assert not hasattr(nnunet_ssl_ext, 'nnUNetTrainerOfSomebodyElse')\n"
        "assert not hasattr(nnunet_ssl_ext, 'TRAINERS')"
    )
    imported = modules_imported_by(code)
    assert "nnunet_ssl.trainers" in imported
    assert not imported & {"torch", "numpy", "nnunetv2", "scipy", "matplotlib"}
