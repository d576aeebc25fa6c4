"""What the commands share: a parser that speaks in sentences, arguments, and numbers that are numbers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, get_args

from pydantic import TypeAdapter

from nnunet_ssl.declared import CONFIG, Count, DatasetId, Part, Seed, Weight, Whole, shown, words
from nnunet_ssl.errors import UserError


class Parser(argparse.ArgumentParser):
    """Refuses as everything else of ours does: one sentence, exit code 1."""

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

# spelt as nnU-Net spells them, where it has them
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
    "-device": {"choices": ("cpu", "cuda", "mps"), "help": "Device. Default: cuda where there is a GPU, else cpu"},
    "-np": {
        "dest": "processes", "type": count, "metavar": "N",
        "help": "Processes at a time. Default: nnU-Net's own number (nnUNet_def_n_proc, else 8)",
    },
    "--data": {"type": Path, "metavar": "DIR", "help": "Folder of the published data"},
    "--disable_tta": {
        "dest": "mirroring", "action": "store_false", "help": "Predict without mirroring: faster, less accurate",
    },
    "--copy": {"action": "store_true", "help": "Copy the files instead of linking to them"},
    "--seed": {"type": seed, "default": 0, "help": "Seed of all that is drawn. Default: 0"},
    "--dry-run": {"action": "store_true", "help": "Print the commands that are still to be run, and do nothing"},
}  # fmt: skip
# in place of the above, where -o (or -d) is a dataset to be made
NEW_DATASET = {
    "dest": "target_id",
    "required": True,
    "type": dataset_id,
    "metavar": "ID",
    "help": "Id of the new dataset",
}
# as they were spelt before
SHARED |= {
    old: SHARED[new] | {"help": argparse.SUPPRESS} for old, new in {"--device": "-device", "--dir": "-o"}.items()
}


def add_shared(parser: argparse._ActionsContainer, *options: str, **changes: Any) -> None:
    """Add arguments of ``SHARED``; ``changes`` are those of ``add_argument`` that differ in this command."""
    for option in options:
        parser.add_argument(option, **(SHARED[option] | changes))


def find_device(given: str | None) -> str:
    """The device that ``-device`` names; without one the GPU where torch sees one, else the CPU.

    Raises:
        UserError: a GPU is asked for, and torch sees none.
    """
    import torch

    gpu = torch.cuda.is_available()
    if given == "cuda" and not gpu:
        raise UserError("-device cuda: torch sees no GPU here; leave -device out to use the CPU.")
    return given or ("cuda" if gpu else "cpu")
