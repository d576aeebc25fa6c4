"""Which cases train, validate and test, and which of them keep their labels: the literature's lists, or a user's."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_ssl.datasets.cases import Part
from nnunet_ssl.errors import UserError


def add_labeled(parser: argparse.ArgumentParser, default: int, allowed: str = "a number", what: str = "cases") -> None:
    """``--labeled``, for ``Lists.parts``."""
    text = f"Training {what} that keep labels: {allowed}, or all. Default: {default}"
    parser.add_argument("--labeled", default=str(default), metavar="N", help=text)


def add_lists(parser: argparse.ArgumentParser) -> None:
    """``--train-list`` and its like, for ``Lists.with_files`` and ``Lists.parts``."""
    for name in ("train", "validation", "test", "labeled"):
        text = f"File with the {name} cases, one per line or a JSON list, instead of the published ones"
        parser.add_argument(f"--{name}-list", type=Path, metavar="FILE", help=text)


def read_cases(file: Path, option: str, pattern: str) -> list[str]:
    """The cases that a file lists, one a line or as a JSON list; what ``pattern`` finds first in each is the case.

    Raises:
        UserError: the file cannot be read, or a line holds no case.
    """
    from nnunet_ssl.unlabeled.split import read_list  # heavy: only once the arguments are known to be good

    lines = read_list(str(file), option)
    matches = [re.search(pattern, line) for line in lines]
    if None in matches:
        raise UserError(f"{option} {file}: no case in the line {lines[matches.index(None)]!r}.")
    return [match[0] for match in matches if match]


@dataclass(frozen=True)
class Lists:
    """A protocol: which cases train, validate and test, and which of the training cases keep their labels."""

    train: list[str]
    test: list[str]
    validation: list[str] = field(default_factory=list)
    ordered: int = 0  # for n up to this number, the first n of train are a labeled set
    labeled: dict[int, list[str]] = field(default_factory=dict)  # further labeled sets, by their size
    pattern: str = r"[^,\s]+"  # what a case looks like in a file of the user

    def with_files(self, args: argparse.Namespace) -> Lists:
        """These lists, those replaced that the user has given as files."""
        own = {
            name: read_cases(file, f"--{name}-list", self.pattern)
            for name in ("train", "validation", "test")
            if (file := getattr(args, f"{name}_list"))
        }
        content = {**vars(self), **own}
        if "train" in own:
            content.update(ordered=len(own["train"]), labeled={})
        return Lists(**content)

    def parts(
        self, labeled: str, labeled_list: Path | None = None, keep: Callable[[str], bool] = lambda case: True
    ) -> dict[str, Part]:
        """The part of each case, in the order of the lists, the labeled ones first.

        Args:
            labeled: how many training cases keep their labels, or "all".
            labeled_list: a file that says which ones do, in place of the number.
            keep: cases for which it is false are left out of all lists.

        Raises:
            UserError: no labeled set of this size is known, or the lists contradict each other.
        """
        chosen = read_cases(labeled_list, "--labeled-list", self.pattern) if labeled_list else self._labeled(labeled)
        chosen, train, validation, test = (
            [case for case in cases if keep(case)] for cases in (chosen, self.train, self.validation, self.test)
        )
        strangers = sorted(set(chosen) - set(train))
        if strangers:
            source = labeled_list or f"the set of --labeled {labeled}"
            raise UserError(f"{source} holds cases that are not training cases: {', '.join(strangers)}.")
        rest = [case for case in train if case not in set(chosen)]
        pairs: list[tuple[Part, list[str]]] = [
            ("labeled", chosen), ("validation", validation), ("unlabeled", rest), ("test", test),
        ]  # fmt: skip
        if doubled := twice([case for _, cases in pairs for case in cases]):
            raise UserError(f"the lists of cases hold a case twice: {', '.join(doubled)}.")
        return {case: part for part, cases in pairs for case in cases}

    def _labeled(self, labeled: str) -> list[str]:
        number = int(labeled) if labeled.isdecimal() else 0
        if labeled == "all":
            return self.train
        if number in self.labeled:
            return self.labeled[number]
        limit = min(self.ordered, len(self.train))
        if 1 <= number <= limit:
            return self.train[:number]
        known = [*map(str, sorted(self.labeled)), *([f"1 to {limit}"] if limit else []), "all"]
        raise UserError(f"--labeled {labeled}: expected {' or '.join(known)}; --labeled-list takes another set.")


def twice(names: list[str]) -> list[str]:
    """The names that are there more than once, sorted."""
    return sorted(name for name, times in Counter(names).items() if times > 1)
