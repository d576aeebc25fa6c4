"""nnU-Net's commands and ours as child processes, in the environment that runs this.

As ``python -m nnunet_ssl.stock_commands COMMAND ...`` this module runs one of nnU-Net's commands, wherever pip has put
its script, and where it would take every core on as many threads as ``OMP_NUM_THREADS`` says.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from nnunet_ssl import supervise
from nnunet_ssl.errors import UserError

# those that ask torch for as many threads as there are cores, where they are told -device cpu
TAKE_EVERY_CORE = {"nnUNetv2_train", "nnUNetv2_predict"}


@contextmanager
def running(words: Sequence[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A command that runs; with the ``with`` block it ends, and so does every process that it has started.

    It ends with this process too, even where that is killed and can do nothing any more. (Not so on Windows.) ``words``
    are as :func:`of_this_python` gives them, ``options`` of ``subprocess.Popen``, less ``stdin``: the command reads
    nothing.
    """
    if os.name != "nt":
        words = [sys.executable, "-I", "-S", supervise.__file__, *words]  # -I -S: it starts quicker
    with subprocess.Popen(words, stdin=subprocess.PIPE, **options) as process:
        try:
            yield process
        finally:
            end(process)


def end(process: subprocess.Popen) -> None:
    """End a command of :func:`running`; from another thread, too."""
    if os.name == "nt":
        process.terminate()
    process.stdin.close()


def of_this_python(words: Sequence[str], device: str) -> list[str]:
    """A command with the executable of the environment that runs this.

    On the CPU nnU-Net's training and prediction take as many threads as ``OMP_NUM_THREADS`` says, where it says
    something; by themselves they pass over it and take every core.

    Args:
        words: as typed: ``python``, one of our commands or one of nnU-Net's, and its arguments.
        device: ``cuda``, ``cpu`` or ``mps``.

    Raises:
        UserError: there is no such command.
    """
    name, *rest = words
    if name == "python":
        return [sys.executable, *rest]
    if name.startswith("nnUNetv2_ssl_"):
        return [sys.executable, "-m", "nnunet_ssl.commands", name.removeprefix("nnUNetv2_ssl_"), *rest]
    script = Path(sys.executable).parent / (name + (".exe" if os.name == "nt" else ""))
    if script.exists() and not (device == "cpu" and name in TAKE_EVERY_CORE):
        return [str(script), *rest]
    entry_point(name)
    # -P: the current directory is no place to import from, as it is not for an installed command
    isolated = ["-P"] if sys.version_info >= (3, 11) else []
    return [sys.executable, *isolated, "-m", "nnunet_ssl.stock_commands", name, *rest]


def entry_point(name: str) -> EntryPoint:
    """What a command of the environment that runs this calls.

    Raises:
        UserError: there is no such command.
    """
    found = entry_points(group="console_scripts", name=name)
    if not found:
        raise UserError(f"{sys.executable} knows no command {name}; install nnunet-ssl with pip where nnU-Net is.")
    return next(iter(found))


def main() -> None:
    """Run the command that ``sys.argv`` names."""
    del sys.argv[0]
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # 4,2 is of nested loops
    if sys.argv[0] in TAKE_EVERY_CORE and threads.isdecimal() and int(threads) > 0:
        multiprocessing.cpu_count = lambda: int(threads)
    sys.exit(entry_point(sys.argv[0]).load()())


if __name__ == "__main__":
    main()
