"""Writing files so that a kill at any moment leaves the old one or the new one, never half of one; and their stamps."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """Yield a temporary name beside ``path``; on success it becomes ``path``, on failure it is removed.

    Args:
        path: the file to make or to replace; one process at a time writes it.
    """
    temporary = f"{path}.tmp"  # one fixed name: what a kill leaves, the next write takes over
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if os.path.lexists(temporary):
            os.remove(temporary)


def write_text(path: str, text: str) -> None:
    """Write ``text`` as UTF-8 with :func:`replacing`."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def write_json(path: str, content: object) -> None:
    """Write ``content`` as JSON with :func:`replacing`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def stamp(path: str) -> list[int]:
    """Size in bytes and time of the last change in ns: what tells, without reading it, that a file is another one."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]
