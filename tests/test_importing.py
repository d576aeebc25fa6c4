"""What importing the package costs, and that all of it is installed. Which part may import which: pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "nnunet_ssl").rglob("*.py"))


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
