"""``nnUNetv2_ssl_trainers``: which trainers there are and, with ``--check``, whether this installation can use them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from importlib import metadata
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nnunet_ssl import trainers
from nnunet_ssl._startup import EXT_FOLDER, VARIABLE
from nnunet_ssl.commands.arguments import Parser
from nnunet_ssl.names import FOLDERS

NNUNET = ">=2.8.0,<2.9"

# A new Python process before every training does the same: nnU-Net's own search, by name.
LOOKUP = """
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
trainer = recursive_find_trainer_class_by_name({name!r})
print("FOUND", trainer.__module__)
"""


class Finding(NamedTuple):
    """One line of ``--check``: ``level`` is "ok", "note" (works, but know this) or "WRONG"."""

    level: str
    text: str


def check_nnunet() -> Finding:
    """The nnU-Net that is installed is one that this package was written for."""
    remedy = f"pip install 'nnunetv2{NNUNET}'"
    try:
        version = metadata.version("nnunetv2")
    except metadata.PackageNotFoundError:
        return Finding("WRONG", f"nnU-Net is not installed in {sys.prefix}: {remedy}")
    if not SpecifierSet(NNUNET).contains(version, prereleases=True):
        return Finding("WRONG", f"nnU-Net {version} is installed, this package needs {NNUNET}: {remedy}")
    return Finding("ok", f"nnU-Net {version} (needed: {NNUNET})")


def check_requirements() -> Finding:
    """What else the package needs is installed in the versions that it needs; pip may have changed them since."""
    wanted = [Requirement(line) for line in metadata.requires("nnunet_ssl") or ()]
    wrong = []
    for need in (need for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})):
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            version = ""
        if not version or not need.specifier.contains(version, prereleases=True):
            wrong.append((f"{need.name} {version or 'is missing'}", f"'{need.name}{need.specifier}'"))
    if wrong:
        found, remedies = zip(*wrong, strict=True)
        return Finding("WRONG", f"other versions are needed than {', '.join(found)}: pip install {' '.join(remedies)}")
    return Finding("ok", "all packages that are needed, in versions that work")


def check_discovery(name: str = "nnUNetTrainerLabeledOnly") -> Finding:
    """A new Python process, with only the user's own variables, finds our trainer in this package.

    The process starts without our entry in the inherited variable and in an empty folder, so that the installation is
    tested and not the current process or folder.
    """
    inherited = os.environ.get(VARIABLE, "").split(os.pathsep)
    variable = {VARIABLE: os.pathsep.join(folder for folder in inherited if folder != EXT_FOLDER)}
    with tempfile.TemporaryDirectory() as folder:
        lookup = subprocess.run(
            [sys.executable, "-c", LOOKUP.format(name=name)],
            env={**os.environ, **variable}, cwd=folder, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
    if lookup.returncode == 0 and (found := re.search(r"^FOUND (\S+)\s*\Z", lookup.stdout, re.MULTILINE)):
        if found[1].startswith("nnunet_ssl."):
            return Finding("ok", f"nnU-Net finds {name} without a variable of ours ({found[1]})")
        return Finding(
            "WRONG",
            f"nnU-Net takes {name} from the module {found[1]}, not from this package: rename that trainer or take its "
            f"folder out of {VARIABLE}",
        )
    reason = (lookup.stderr.strip().splitlines() or [f"exit code {lookup.returncode}"])[-1]
    return Finding(
        "WRONG",
        f"nnU-Net does not find {name} ({reason}): install the package with pip into {sys.prefix}, or, if Python "
        f"does not read what pip installs there (PYTHONPATH, pip install --target), set {VARIABLE}={EXT_FOLDER}",
    )


def check_folder(variable: str) -> Finding:
    """One of nnU-Net's three folders is set, exists and can be written to."""
    folder = os.environ.get(variable)
    if not folder:
        return Finding("WRONG", f"{variable} is not set: export {variable}=FOLDER")
    if not os.path.isdir(folder):
        return Finding("WRONG", f"{variable}={folder} is not a folder: make it, or correct the variable")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if variable == "nnUNet_raw":
            return Finding("note", f"{variable}={folder} is read-only: enough to train, not for nnUNetv2_ssl_split")
        return Finding("WRONG", f"{variable}={folder} cannot be written to ({error.strerror}): change its permissions")
    return Finding("ok", f"{variable}={folder}")


def check_gpu() -> Finding:
    """There is a GPU that torch can use. Without one everything works, slowly."""
    try:
        import torch
    except ImportError as error:
        return Finding("WRONG", f"torch cannot be imported ({error}): pip install torch")
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return Finding("ok", f"GPU: {torch.cuda.get_device_name(0)}, {memory:.0f} GiB (torch {torch.__version__})")
    return Finding(
        "note",
        f"torch {torch.__version__} sees no GPU: train with -device cpu (slow), or install the torch for your driver",
    )


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="nnUNetv2_ssl_trainers",
        description="List the trainers of nnunet_ssl, for -tr, with their papers, or check the installation.",
    )
    parser.add_argument(
        "--check", action="store_true",
        help="Check nnU-Net's version, whether it finds the trainers, its three folders and the GPU; "
        "the exit code is 1 if something is wrong",
    )  # fmt: skip
    if not parser.parse_args(argv).check:
        for name in trainers.TRAINERS:
            trainer = getattr(trainers, name)
            print(f"{name:<26}  {(trainer.__doc__ or '').strip().splitlines()[0]} [{trainer.paper}]")
        return
    levels = set()
    folders = [partial(check_folder, name) for name in FOLDERS]
    for find in (check_nnunet, check_requirements, *folders, check_gpu, check_discovery):
        level, text = find()
        print(f"{level:<5}  {text}", flush=True)
        levels.add(level)
    if "WRONG" in levels:
        raise SystemExit(1)
