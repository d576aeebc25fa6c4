"""Files that outlive kills, copies and careless editors: written whole, read in any shape, told apart by content."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nnunet_ssl.errors import UserError

Stamp = list  # [size in bytes, time of the last change in ns, SHA-256 of the content], as JSON keeps it


@contextmanager
def replacing(path: str | Path) -> Iterator[str]:
    """Yield a temporary file next to ``path``; on success it becomes ``path``, on failure it is removed.

    One process at a time writes a file. Nobody can foresee the temporary name, and the file is a new one: a link that
    somebody has put into a shared folder is not followed. What a kill leaves is removed by the next write of the same
    file.

    Raises:
        OSError: it cannot be written; its ``filename`` is ``path``, also on a full disk, where the system names none.
    """
    folder, name = os.path.split(os.fspath(path))
    before, after = os.path.join(folder, f".{name}."), ".tmp"
    for left in glob.glob(f"{glob.escape(before)}*{after}"):
        with suppress(OSError):
            os.remove(left)
    temporary = f"{before}{secrets.token_hex(8)}{after}"
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, temporary):
            error.filename, error.filename2 = os.fspath(path), None
        raise
    finally:
        with suppress(OSError):  # where its folder is not there or not ours, it was never made
            os.remove(temporary)


@contextmanager
def writing(remedy: str) -> Iterator[None]:
    """Around what writes results: says which file cannot be written, and why; ``remedy`` is a sentence.

    Raises:
        UserError: for an OSError within, for instance on a full disk.
    """
    try:
        yield
    except OSError as error:
        file = error.filename or "a file"
        there = "found or " if isinstance(error, FileNotFoundError) else ""  # of what is read meanwhile
        raise UserError(f"{file} cannot be {there}written ({error.strerror or error}). {remedy}") from error


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 with :func:`replacing`."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def write_json(path: str | Path, content: object) -> None:
    """Write ``content`` as JSON with :func:`replacing`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(
    path: str | Path, remedy: str, kind: type | tuple[type, ...] = dict, keys: Mapping[str, type] | None = None
) -> Any:
    """Read a JSON file that may have been cut off, edited by hand, or never been what it should be.

    Args:
        path: UTF-8, with or without a byte order mark.
        remedy: a sentence that says what to do about a file that is no good.
        kind: the type or types of the content.
        keys: what an object must have, and of which type.

    Raises:
        UserError: the file is missing, unreadable, no JSON, or something else than asked for.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}). {remedy}") from None
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are a ValueError too
        reason = "it is empty" if not os.path.getsize(path) else str(error)
        raise UserError(f"{path} is not JSON ({reason}). {remedy}") from None
    if not isinstance(content, kind):
        raise UserError(f"{path} holds {_named(type(content))}, not {_named(kind)}. {remedy}")
    for key, wanted in (keys or {}).items():
        if not isinstance(content.get(key), wanted):
            found = _named(type(content[key])) if key in content else "nothing"
            raise UserError(f"{path} has {found} under '{key}', not {_named(wanted)}. {remedy}")
    return content


def read_text(path: str | Path, remedy: str) -> str:
    """Read a text file that a user has written, with or without a byte order mark.

    Raises:
        UserError: it is missing, unreadable or not UTF-8; ``remedy`` says what to do.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}). {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}). {remedy}") from None


def _named(kind: type | tuple[type, ...]) -> str:
    """A JSON type in words."""
    words = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}
    words |= {bool: "true or false", type(None): "null"}
    return " or ".join(words[k] for k in (kind if isinstance(kind, tuple) else (kind,)))


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def stamp(path: str | Path, kept: Stamp | None = None, digest: Callable[[str | Path], str] = file_digest) -> Stamp:
    """What tells that a file is another one: size, time of the last change, and a digest of its content.

    The content is read, by ``digest``, only where size or time are not as ``kept``: what this said earlier, perhaps of
    a file that this one is a copy of.
    """
    status = os.stat(path)
    if kept is not None and kept[:2] == [status.st_size, status.st_mtime_ns] and len(kept) == 3:
        return kept
    return [status.st_size, status.st_mtime_ns, digest(path)]


def same_content(one: Stamp, other: Stamp) -> bool:
    """Whether two stamps are of files that hold the same; their times tell nothing."""
    return [one[0], *one[2:]] == [other[0], *other[2:]]
