"""nnU-Net's commands and ours as child processes, in the environment that runs this."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nnunet_ssl.errors import UserError

# those that ask torch for as many threads as there are cores, where they are told -device cpu
ENTRY_POINTS = {
    "nnUNetv2_train": "nnunetv2.run.run_training:run_training_entry",
    "nnUNetv2_predict": "nnunetv2.inference.predict_from_raw_data:predict_entry_point",
}


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
        return [sys.executable, "-m", f"nnunet_ssl.commands.{name.removeprefix('nnUNetv2_ssl_')}", *rest]
    if device == "cpu" and name in ENTRY_POINTS:
        module, function = ENTRY_POINTS[name].split(":")
        code = "import multiprocessing as m, os; cores = m.cpu_count(); "
        code += "m.cpu_count = lambda: int(os.environ.get('OMP_NUM_THREADS') or cores); "
        code += f"from {module} import {function} as f; f()"
        return [sys.executable, "-c", code, *rest]
    return [executable(name), *rest]


def executable(name: str) -> str:
    """nnU-Net's command of the environment that runs this.

    Raises:
        UserError: there is none.
    """
    file = Path(sys.executable).parent / (name + (".exe" if os.name == "nt" else ""))
    if not file.exists():
        raise UserError(f"{file} does not exist; install nnunet-ssl with pip in the environment that nnU-Net lives in.")
    return str(file)
