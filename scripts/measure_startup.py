"""How much longer Python takes to start where this package is installed, plain and editable.

    python scripts/measure_startup.py [--starts 200]

Makes three empty virtual environments, installs the package without its dependencies into two of them, and starts the
three Pythons in turn, so that what else the machine does falls on all alike. Prints the median of each, on the clock
and on the processor, and how much more that is than in the empty one. Needs setuptools, no network; not for Windows.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys, setuptools.build_meta as backend; getattr(backend, sys.argv[1])(sys.argv[2])"


def environment(folder: Path, build: str | None) -> Path:
    """A virtual environment's Python, with what a build hook of setuptools (PEP 517, PEP 660) makes installed in it."""
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    if build is not None:
        source = folder / "source"
        for name in ("nnunet_ssl", "startup"):
            shutil.copytree(ROOT / name, source / name)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        subprocess.run([sys.executable, "-c", BUILD, build, str(folder)], cwd=source, check=True, capture_output=True)
        (wheel,) = folder.glob("*.whl")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*pip, str(wheel)], check=True)
    return python


def start(python: Path) -> tuple[float, float]:
    """Milliseconds from the start of a Python to its end: on the clock, and of processor time."""
    used, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([str(python), "-c", "pass"], check=True, env={})
    clock, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1000 * clock, 1000 * (after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--starts", type=int, default=200, help="of each environment's Python")
    starts = parser.parse_args().starts
    with tempfile.TemporaryDirectory() as temporary:
        pythons = {}
        for name, build in {"empty": None, "plain": "build_wheel", "editable": "build_editable"}.items():
            folder = Path(temporary, name)
            folder.mkdir()
            pythons[name] = environment(folder, build)
            start(pythons[name])
        times = {name: [] for name in pythons}
        for _ in range(starts):
            for name, python in pythons.items():
                times[name].append(start(python))
    print(f"Python {sys.version.split()[0]}, median of {starts} starts      clock               processor")
    empty = [statistics.median(values) for values in zip(*times["empty"], strict=True)]
    for name, values in times.items():
        medians = [statistics.median(column) for column in zip(*values, strict=True)]
        columns = [f"{median:6.2f} ms ({median - base:+.2f})" for median, base in zip(medians, empty, strict=True)]
        print(f"{name:<38} {'   '.join(columns)}")


if __name__ == "__main__":
    main()
