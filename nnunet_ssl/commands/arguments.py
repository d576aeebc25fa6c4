"""What the commands share: a parser that speaks in sentences, and numbers that are numbers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
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
