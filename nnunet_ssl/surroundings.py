"""What a training was made with, for its record."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch

from nnunet_ssl import __version__

PACKAGES = ("nnunetv2", "torch", "batchgeneratorsv2", "batchgenerators", "numpy", "scipy")


def surroundings(device: torch.device) -> dict[str, str]:
    """``device``, ``machine`` (the GPU's or the CPU's name), and the versions of what computes."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    versions = {name: version(name) for name in PACKAGES}
    return {
        "device": device.type,
        "machine": machine,
        "nnunet_ssl": __version__,
        "python": platform.python_version(),
        **versions,
    }


def processor() -> str:
    """The CPU's name, as far as the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
