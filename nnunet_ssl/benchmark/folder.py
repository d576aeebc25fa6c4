"""The folder of a benchmark: the protocol it was started with, and the process that works in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from nnunet_ssl.benchmark.protocol import row_key
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json, write_json
from nnunet_ssl.locks import holding

ADDED_TO = ("seeds", "labeled", "rows", "budgets")  # what a protocol may get more of while its benchmark is under way
FREE = ("about", "figures", "gap")
IDS = "datasets.json"
KEEP = "It records the protocol of this folder: restore it, or choose another -o."


@contextmanager
def claimed(home: Path, given: dict[str, Any], device: str) -> Iterator[None]:
    """Take the folder for a protocol and a device, and keep others out while it is worked in.

    Args:
        home: created if it does not exist.
        given: the protocol as it stands in its file.
        device: where it runs.

    Raises:
        UserError: the folder belongs to something else, to a protocol that differs, or is worked in right now.
    """
    note = home / "protocol.json"
    if home.exists() and not note.is_file() and (not home.is_dir() or set(os.listdir(home)) - {".lock"}):
        raise UserError(f"{home} exists but is not a benchmark folder; choose another -o.")
    with ExitStack() as held:
        try:
            held.enter_context(
                holding(home / ".lock", f"another nnUNetv2_ssl_benchmark is using {home}; wait, or choose another -o.")
            )
        except OSError as error:
            raise UserError(
                f"{error.filename or home} cannot be written ({error.strerror}); choose another -o."
            ) from None
        left_out = refuse_other(home, given, device)
        write_json(str(note), {"device": device, "protocol": {**given, "rows": [*given["rows"], *left_out]}})
        yield


def refuse_other(home: Path, given: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Refuse a protocol whose runs would not belong with those that are in the folder.

    Seeds, labeled sets, rows and budgets may be added or left out; a row of the same name must be the same.

    Returns:
        The rows of the folder that the protocol leaves out this time.
    """
    note = home / "protocol.json"
    if not note.is_file():
        return []
    before = read_json(note, KEEP, keys={"device": str, "protocol": dict})
    try:
        return _left_out(home, before, given, device)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{note} holds no protocol that a benchmark wrote ({error!r}). {KEEP}") from error


def _left_out(home: Path, before: dict[str, Any], given: dict[str, Any], device: str) -> list[dict[str, Any]]:
    old, given = dict(before["protocol"]), dict(given)
    seconds = [by_row(protocol.setdefault("measure", {}).get("seconds", {})) for protocol in (old, given)]
    for protocol in (old, given):  # seconds come and go with their rows
        protocol["measure"] = {k: v for k, v in protocol["measure"].items() if k != "seconds"}
    if before["device"] != device:
        raise UserError(f"{home} was started with -device {before['device']}; keep to it, or choose another -o.")
    for name in sorted(set(old) | set(given)):
        if name not in (*ADDED_TO, *FREE) and old.get(name) != given.get(name):
            raise UserError(
                f"{home} was started with '{name}' {json.dumps(old.get(name))}, the protocol now says "
                f"{json.dumps(given.get(name))}; undo that, or choose another -o."
            )
    first, now = (next((b["steps"] for b in p["budgets"] if "steps" in b), None) for p in (old, given))
    if first != now and any("time_of" in budget for budget in old["budgets"]):
        raise UserError(
            f"{home} was started with {first} as the first budget in steps, on which 'time_of' is based; the protocol "
            f"now says {now}; undo that, or choose another -o."
        )
    for key in {row_key(row["name"]) for row in old["rows"]} & {row_key(row["name"]) for row in given["rows"]}:
        was, now = (one.get(key) for one in seconds)
        if was != now:
            raise UserError(
                f"{home} was started with {was or 'measured'} seconds per step of {key!r}, the protocol now says "
                f"{now or 'to measure them'}; undo that, or choose another -o."
            )
    rows = {row_key(row["name"]): row for row in old["rows"]}
    for row in given["rows"]:
        was = rows.pop(row_key(row["name"]), row)
        if {k: v for k, v in was.items() if k != "against"} != {k: v for k, v in row.items() if k != "against"}:
            raise UserError(
                f"{home} was started with another row {row['name']!r} ({json.dumps(was)}); undo that, give the row "
                "another name, or choose another -o."
            )
    return list(rows.values())


def by_row(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds per step by the rows' keys."""
    return {row_key(name): value for name, value in seconds.items()}


def begun_with(home: Path) -> str | None:
    """The device of a benchmark that was started."""
    file = home / "protocol.json"
    if not file.is_file():
        return None
    device = read_json(file, KEEP, keys={"device": str})["device"]
    if device not in ("cpu", "cuda", "mps"):
        raise UserError(f"{file} names the device {device!r}, which is none of cpu, cuda and mps. {KEEP}")
    return device


def known_ids(home: Path) -> dict[str, int]:
    """The dataset ids that this benchmark has chosen so far; none if it is new.

    Raises:
        UserError: the file is something else.
    """
    file, remedy = home / IDS, "It says which dataset is which: restore it, or choose another -o."
    kept = read_json(file, remedy) if file.exists() else {}
    if wrong := [name for name, value in kept.items() if type(value) is not int]:
        raise UserError(f"{file} has {kept[wrong[0]]!r} under '{wrong[0]}', not a number. {remedy}")
    return kept
