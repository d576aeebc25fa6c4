"""What careless editors, full disks and strangers do to files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class RunsCode:
    """In a pickle: whoever reads it makes ``file``."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.file)!r}, 'w').close()",)


def _written(content: str | bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content if isinstance(content, bytes) else content.encode())


def _unreadable(file: Path) -> None:
    """Even for root, whom permissions do not stop."""
    file.unlink()
    file.mkdir()


def _other_values(file: Path) -> None:
    """The keys stay, and each holds something of another type."""
    content = json.loads(file.read_text(encoding="utf-8-sig"))
    file.write_text(json.dumps(dict.fromkeys(content, "nothing of the kind") if isinstance(content, dict) else [[3]]))


# what may have happened to a JSON file of an object: name -> what does it
JSON_DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": _written(""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "a list": _written("[1, 2]"),
    "null": _written("null"),
    "an empty object": _written("{}"),
    "other values": _other_values,
    "not UTF-8": _written(b"\xff\xfe{}"),
    "nested": _written("[" * 100_000),
    "unreadable": _unreadable,
}


def with_byte_order_mark(file: Path) -> None:
    """As Windows' editors write it; nothing is damaged."""
    file.write_text(file.read_text(encoding="utf-8"), encoding="utf-8-sig")
