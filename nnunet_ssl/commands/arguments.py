"""Shared by the commands: a parser whose errors are sentences, common arguments, and strict numbers."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, get_args

from pydantic import TypeAdapter

from nnunet_ssl.declared import CONFIG, Count, DatasetId, Part, Seed, Weight, Whole, shown, words
from nnunet_ssl.errors import UserError


class Parser(argparse.ArgumentParser):
    """Refuses arguments like the rest of the package: one sentence, exit code 1."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """As argparse; and what the command prints later is never too much for the terminal's or a log's encoding."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        return super().parse_args(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """End the command.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message}. See {self.prog} --help.")


def number(kind: Any) -> Callable[[str], Any]:
    """An argparse ``type`` for a declared number: plain digits, within its range."""
    base, check = get_args(kind)[0], TypeAdapter(kind, config=CONFIG)

    def read(text: str) -> Any:
        try:
            if not text.isascii() or "_" in text:  # int() takes the digits of every script, and 1_000
                raise ValueError
            return check.validate_python(base(text))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shown(text)} must be {words(kind)}") from None

    return read


count, whole, seed, dataset_id = map(number, (Count, Whole, Seed, DatasetId))
part, distance = number(Part), number(Weight)


def fold(text: str) -> str:
    """An argparse ``type`` for a fold: a number, or ``all``."""
    try:
        return text if text == "all" else str(whole(text))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a fold; give a number, or all") from None


# ------------------------------------------------------------------------------------------------ shared arguments

# named as in nnU-Net, if nnU-Net has them
SHARED: dict[str, dict[str, Any]] = {
    "-d": {"dest": "dataset", "required": True, "help": "Name or id of the dataset"},
    "-c": {"dest": "configuration", "required": True, "help": "Configuration, for instance 3d_fullres"},
    "-f": {"dest": "fold", "type": fold, "default": "0", "help": "Fold: a number, or all. Default: 0"},
    "-tr": {"dest": "trainer", "required": True, "help": "Trainer of the model, for instance nnUNetTrainerWarps"},
    "-p": {"dest": "plans", "default": "nnUNetPlans", "help": "Plans. Default: nnUNetPlans"},
    "-chk": {
        "dest": "checkpoint", "default": "checkpoint_final.pth", "help": "Checkpoint. Default: checkpoint_final.pth",
    },
    "-o": {"dest": "folder", "type": Path, "metavar": "DIR", "help": "Folder to write to"},
    "-device": {"choices": ("cpu", "cuda", "mps"), "help": "Device. Default: cuda if there is a GPU, otherwise cpu"},
    "-np": {
        "dest": "processes", "type": count, "metavar": "N",
        "help": "Parallel processes. Default: nnU-Net's own number (nnUNet_def_n_proc, or 8)",
    },
    "--data": {"type": Path, "metavar": "DIR", "help": "Folder of the published data"},
    "--disable_tta": {
        "dest": "mirroring", "action": "store_false", "help": "Predict without mirroring: faster, less accurate",
    },
    "--copy": {"action": "store_true", "help": "Copy the files instead of linking to them"},
    "--seed": {"type": seed, "default": 0, "help": "Seed of all random choices. Default: 0"},
    "--dry-run": {"action": "store_true", "help": "Print the remaining commands and run nothing"},
}  # fmt: skip
# instead of the above, for commands whose -o (or -d) is a new dataset
NEW_DATASET = {
    "dest": "target_id",
    "required": True,
    "type": dataset_id,
    "metavar": "ID",
    "help": "Id of the new dataset",
}
# former names
SHARED |= {
    old: SHARED[new] | {"help": argparse.SUPPRESS} for old, new in {"--device": "-device", "--dir": "-o"}.items()
}


def add_shared(parser: argparse._ActionsContainer, *options: str, **changes: Any) -> None:
    """Add arguments of ``SHARED``; ``changes`` override ``add_argument``'s keywords for this command."""
    for option in options:
        parser.add_argument(option, **(SHARED[option] | changes))


def find_device(given: str | None) -> str:
    """The device that ``-device`` names; by default the GPU if torch sees one, otherwise the CPU.

    Raises:
        UserError: another device than the CPU is asked for, and torch sees none.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if given is not None and not there[given]:
        raise UserError(f"-device {given}: torch sees no such GPU here; leave -device out to use what is there.")
    return given or ("cuda" if there["cuda"] else "cpu")
