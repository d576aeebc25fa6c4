"""Names from files of others, before they become paths.

Case names, identifiers and file endings come from ``dataset.json``, plans, lists and CSV files that somebody else may
have written. Each is one component of a path, or it is refused: nothing is read or written outside the folder that is
meant.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from nnunet_ssl.errors import UserError

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")  # the variables that name nnU-Net's folders
LONGEST = 255  # bytes of a name, on nearly every file system


def path_component(name: object, what: str, source: str | os.PathLike) -> str:
    """``name``, if it can be a file's or folder's name.

    Args:
        name: as read.
        what: what it names, for the message: ``"case"``, ``"data_identifier"``.
        source: the file or list that it comes from.

    Raises:
        UserError: it is no text, empty, hidden (begins with a dot, so ``.`` and ``..`` too), longer than a name may be,
            or has a separator, a control character or bytes that are not UTF-8 in it.
    """
    if problem := _problem(name):
        raise UserError(
            f"{os.fspath(source)!s}: {what} {_shown(name)} {problem}. Give it a plain name, without folders."
        )
    return str(name)


def file_ending(ending: object, source: str | os.PathLike) -> str:
    """``ending``, if it can be a dataset's file ending: a dot and a name, such as ``.nii.gz``.

    Raises:
        UserError: it is not.
    """
    if not isinstance(ending, str) or not ending.startswith(".") or _problem(ending[1:]):
        raise UserError(
            f"{os.fspath(source)!s}: file_ending {_shown(ending)} is no file ending. Write one that begins with a dot, "
            "for instance .nii.gz."
        )
    return ending


def _problem(name: object) -> str | None:
    if not isinstance(name, str):
        return "is not a text"
    if not name.strip():
        return "is empty"
    if name.startswith("."):
        return "begins with a dot"
    if any(separator in name for separator in "/\\"):
        return "has a path separator in it"
    if any("\ud800" <= character <= "\udfff" for character in name):  # how Python keeps bytes that it cannot decode
        return "is not UTF-8, or this system's locale is not (set PYTHONUTF8=1 or a UTF-8 locale)"
    if not name.isprintable():
        return "has characters in it that cannot be printed"
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return "cannot be written with this system's file names (set PYTHONUTF8=1 or a UTF-8 locale)"
    return f"is longer than {LONGEST} bytes" if len(encoded) > LONGEST else None


def _shown(name: object) -> str:
    return ascii(name) if isinstance(name, str) and not name.isprintable() else repr(name)


def a_few(names: Sequence[str]) -> str:
    """The first three in a message: ``a, b, c, ...``."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
