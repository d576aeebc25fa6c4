"""Short sequences of commands that resume where they were stopped.

A step is done when its record says so and what it makes is there; then it is skipped. One that was done with other
settings is refused, since what comes after was made from it.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json, same_content, write_json
from nnunet_ssl.stock_commands import of_this_python, running


@dataclass(frozen=True)
class Step:
    """Commands that are run once."""

    record: Path  # says that they were, and with which settings
    makes: tuple[Path, ...] = ()  # what is there then
    commands: tuple[Sequence[str], ...] = ()  # each as typed
    made_with: dict[str, Any] = field(default_factory=dict)  # the settings, as JSON keeps them
    title: str = ""  # printed when it begins
    there: str = ""  # printed when it is skipped


@dataclass(frozen=True)
class Steps:
    """Does steps."""

    device: str  # of the commands: cpu, cuda or mps
    elsewhere: str  # how to have a step with other settings, for instance "choose another -o"
    dry_run: bool = False  # print the commands and do nothing
    variables: Mapping[str, str] | None = None  # the commands' environment; None for our own
    log: Path | None = None  # what the commands print is added to it; with None it goes where our own output goes
    show: Callable[[str], None] = lambda line: None  # called with each line for the log

    def is_done(self, step: Step) -> bool:
        """Whether a step need not be done.

        Raises:
            UserError: it was done with other settings, or its record is damaged.
        """
        if not all(path.exists() for path in (step.record, *step.makes)):
            return False
        remedy = f"It records how {step.record.parent} was made: restore it, or {self.elsewhere}."
        made_with = read_json(step.record, remedy, keys={"made_with": dict})["made_with"]
        if changed := differences(made_with, step.made_with):
            raise UserError(
                f"{step.record.parent} was made with other options or by another model: {'; '.join(changed)}. Go back "
                f"to these, or {self.elsewhere}."
            )
        return True

    def do(self, step: Step) -> None:
        """Do a step and record it, unless it is done; raises as ``is_done`` and ``run``."""
        if self.is_done(step):
            return self.skip(step.there)
        if step.title:
            print(f"\n{step.title}", flush=True)
        if not self.dry_run:
            step.record.unlink(missing_ok=True)  # where something that it made is gone
        for words in step.commands:
            self.run(words)
        if not self.dry_run:
            step.record.parent.mkdir(parents=True, exist_ok=True)
            write_json(step.record, {"commands": list(map(shlex.join, step.commands)), "made_with": step.made_with})
        return None

    def skip(self, what: str) -> None:
        """Say what is there already, if anything is to be said."""
        if what:
            print(f"  # {what}", flush=True)

    def run(self, words: Sequence[str]) -> None:
        """Run a command, which ends with this process.

        Raises:
            UserError: it failed.
        """
        print(f"  $ {shlex.join(words)}", flush=True)
        if self.dry_run:
            return
        piped: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        options = {**piped, "encoding": "utf-8", "errors": "replace"} if self.log else {}
        with (
            self.log.open("a", encoding="utf-8") if self.log else nullcontext() as log,
            running(of_this_python(words, self.device), env=self.variables, **options) as process,
        ):
            if log:
                log.write(f"\n$ {shlex.join(words)}\n")
                for line in process.stdout:
                    log.write(line)
                    log.flush()
                    self.show(line)
            code = process.wait()
        if code != 0:
            where = f"its output is at the end of {self.log}" if self.log else "its output is above"
            raise UserError(
                f"{words[0]} ended with exit code {code}; {where}. Start this command again with the same options "
                "to resume from here."
            )


def training(words: Sequence[str], fold: Path, *anew: str) -> list[str]:
    """The words of a training: with ``--c`` if the folder of its fold has a checkpoint, otherwise with ``anew``."""
    return [*words, "--c"] if any(fold.glob("checkpoint_*.pth")) else [*words, *anew]


def differences(then: Any, now: dict[str, Any], of: str = "") -> list[str]:
    """How a dataset or a teacher differs from the one that a record names, in words.

    Args:
        then: the content of the record, of any shape.
        now: the same of now. ``checkpoint`` (with a fold, where there are several) is a file's name and its stamp,
            whose time tells nothing.
        of: what comes before the names of its fields, for instance ``"teacher's "``.
    """
    if not isinstance(then, dict):
        return [f"{of}record was {then!r}"]
    found = []
    for key in [*now, *(key for key in then if key not in now)]:
        before, after = then.get(key), now.get(key)
        if isinstance(after, dict):
            found += differences(before, after, f"{key}'s ")
        elif key.startswith("checkpoint") and isinstance(after, list):
            if not (isinstance(before, list) and len(before) == len(after) and before[0] == after[0]):
                found.append(f"{of}{key} was {before[0] if isinstance(before, list) and before else before}, "
                             f"now {after[0]}")  # fmt: skip
            elif not same_content(before[1:], after[1:]):
                found.append(f"{of}{after[0]}{key.removeprefix('checkpoint')} was another file")
        elif before != after:
            was, is_now = ("not given" if value is None else value for value in (before, after))
            found.append(f"{of}{key} was {was}, now {is_now}")
    return found
