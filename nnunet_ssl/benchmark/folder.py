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
from nnunet_ssl.files import read_json, read_text, write_json, write_text, writing
from nnunet_ssl.locks import holding

ADDED_TO = ("seeds", "labeled", "rows", "budgets")  # what a protocol may get more of while its benchmark is under way
LISTS = ("test", "validation")
FREE = ("about", "figures", "gap")
FIRST_STEPS = "the first budget's steps"  # by which budgets go that are the time of a row
IDS = "datasets.json"
SNAPSHOT = "protocol_in_use.json"  # what the workflow goes by, whatever becomes of the user's file meanwhile
RESERVED = ".nnunet_ssl_benchmarks.json"  # in nnUNet_raw: the dataset ids of each benchmark's folder
KEEP = "It records the protocol of this folder: restore it, or choose another -o."


@contextmanager
def claimed(home: Path, given: dict[str, Any], device: str) -> Iterator[None]:
    """Take the folder for a protocol, as it stands in its file, and a device, and keep others out meanwhile.

    Raises:
        UserError: the folder belongs to something else, to a protocol that differs, or is worked in right now.
    """
    note = home / "protocol.json"
    if home.exists() and not note.is_file() and (not home.is_dir() or set(os.listdir(home)) - {".lock"}):
        raise UserError(f"{home} exists but is not a benchmark folder; choose another -o.")
    busy = f"another nnUNetv2_ssl_benchmark is using {home}; wait, or choose another -o."
    with ExitStack() as held:
        with writing("Choose another -o."):
            held.enter_context(holding(home / ".lock", busy))
        write_json(note, {"device": device, "protocol": refuse_other(home, given, device)})
        yield


def refuse_other(home: Path, given: dict[str, Any], device: str) -> dict[str, Any]:
    """Refuse a protocol whose runs would not belong with those that are in the folder.

    Seeds, labeled sets, rows and budgets may be added or left out; a row of the same name must be the same.

    Returns:
        The protocol, with the rows of the folder that it leaves out this time, and the seconds per step given of them.
    """
    note = home / "protocol.json"
    if not note.is_file():
        return given
    before = read_json(note, KEEP, keys={"device": str, "protocol": dict})
    try:
        first = before["protocol"]
        (old, old_rows), (new, new_rows) = _what_stays(first), _what_stays(given)
        if not any("time_of" in budget for budget in first["budgets"]):
            new[FIRST_STEPS] = old[FIRST_STEPS]
        left_out = [row for row in first["rows"] if row_key(row["name"]) not in new_rows]
        given_before = first.get("measure", {}).get("seconds", {})
        seconds = {name: value for name, value in given_before.items() if row_key(name) not in new_rows}
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{note} holds no protocol that a benchmark wrote ({error!r}). {KEEP}") from error
    old, new = old | {"-device": before["device"]}, new | {"-device": device}
    for name in sorted({*old, *new}):
        _refuse_change(home, name, old.get(name), new.get(name))
    for key in new_rows.keys() & old_rows:
        _refuse_change(home, f"row {key}", old_rows[key], new_rows[key])
    kept = {**given, "rows": [*given["rows"], *left_out]}
    if seconds:
        measure = given.get("measure", {})
        kept["measure"] = {**measure, "seconds": {**seconds, **measure.get("seconds", {})}}
    return kept


def with_own_lists(home: Path, given: dict[str, Any], file: Path) -> dict[str, Any]:
    """A protocol that finds its lists of cases in the folder, where copies are kept; ``given`` stands in ``file``.

    Raises:
        UserError: a list holds other cases than when the benchmark was started.
    """
    lists = {}
    for name in LISTS:
        value = given["data"].get(name)
        if isinstance(value, str) and (file.parent / value).is_file():
            source, copy = file.parent / value, home / "lists" / name / Path(value).name
            cases = read_text(source, "Write one case per line.")
            if not copy.is_file():
                copy.parent.mkdir(parents=True, exist_ok=True)
                write_text(copy, cases)
            elif read_text(copy, KEEP).split() != cases.split():
                raise UserError(
                    f"{source} lists other cases than {copy}, with which {home} was started: undo that, or choose "
                    "another -o."
                )
            lists[name] = str(copy)
    return {**given, "data": {**given["data"], **lists}}


def _what_stays(protocol: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a benchmark goes by to its end: fields by name, and rows by key, each with its seconds per step."""
    measure = dict(protocol.get("measure", {}))
    seconds = by_row(measure.pop("seconds", {}))
    fields = {name: value for name, value in protocol.items() if name not in (*ADDED_TO, *FREE)}
    # lists of cases stand next to the file, whose copy in the folder names them in full
    fields["data"] = {name: Path(value).name if name in LISTS and isinstance(value, str) else value
                      for name, value in protocol["data"].items()}  # fmt: skip
    steps = next((budget["steps"] for budget in protocol["budgets"] if "steps" in budget), None)
    rows = {row_key(row["name"]): row | {"against": None} for row in protocol["rows"]}
    rows = {key: row | {"seconds per step": seconds.get(key)} for key, row in rows.items()}
    return fields | {"measure": measure, FIRST_STEPS: steps}, rows


def _refuse_change(home: Path, what: str, old: object, new: object) -> None:
    if old != new:
        raise UserError(
            f"{home} was started with {what} {json.dumps(old)}, now it is {json.dumps(new)}; undo that, give a row "
            "another name, or choose another -o."
        )


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


@contextmanager
def reserving(raw: Path) -> Iterator[None]:
    """While a benchmark chooses dataset ids, no other does; their folders come into being much later."""
    with holding(
        (raw / RESERVED).with_suffix(".lock"), "another benchmark is choosing dataset ids; waiting.", wait=True
    ):
        yield


def ids_of_others(raw: Path, home: Path) -> set[int]:
    """Dataset ids that benchmarks in other folders have reserved."""
    return {number for folder, ids in _reserved(raw).items() if folder != str(home) for number in ids}


def reserve(raw: Path, home: Path, ids: set[int]) -> None:
    """Keep ids for the benchmark in a folder; what benchmarks had whose folder is gone is free again."""
    others = {folder: taken for folder, taken in _reserved(raw).items() if Path(folder, IDS).is_file()}
    write_json(raw / RESERVED, {**others, str(home): sorted(ids)})


def _reserved(raw: Path) -> dict[str, list[int]]:
    file = raw / RESERVED
    return read_json(file, "Remove it if no other benchmark is under way.") if file.is_file() else {}


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
