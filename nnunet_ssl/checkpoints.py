"""Checkpoints of nnU-Net's and ours, read without running what a stranger may have put into them.

A ``.pth`` file is a pickle, and a pickle can call any function when it is read. torch reads one of tensors and builtin
types without that (``weights_only=True``); nnU-Net's logs hold numpy's numbers as well.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import replacing

TRUST = "nnUNet_ssl_trust_checkpoints"  # environment variable: read what could run code, too

_scalar = np.float64().__reduce__()[0]
NUMBERS = [
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # of numpy 1 and 2
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"},
]


def read_checkpoint(file: str | Path, remedy: str, keys: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; tensors are mapped, so that those that nobody uses are not read.

    Args:
        file: as ``torch.save`` writes it.
        remedy: a sentence that says what to do about a file that is no good.
        keys: what it must have, and of which type.

    Raises:
        UserError: it is missing, unreadable, damaged or no checkpoint; or it could run code, and the environment
            variable ``nnUNet_ssl_trust_checkpoints`` does not say that it may.
    """
    trusted = os.environ.get(TRUST, "").lower() in ("1", "true", "t")
    try:
        with torch.serialization.safe_globals(NUMBERS):
            content = torch.load(file, map_location="cpu", weights_only=not trusted, mmap=True)
    except MemoryError:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}). {remedy}") from None
    except Exception as error:  # a damaged pickle ends in any of them
        if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL (\S+)", str(error))):
            raise UserError(
                f"{file} calls {found[1]} when it is read, which neither weights nor nnU-Net's log need and which "
                f"could do anything. If you trust the author of the file, set {TRUST}=1."
            ) from None
        what = "is cut off, damaged or no checkpoint at all" if os.path.getsize(file) else "is empty"
        raise UserError(f"{file} {what}. {remedy}") from error
    for key, kind in (keys or {}).items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise UserError(f"{file} is no checkpoint of a training: it has no '{key}'. {remedy}")
    return content


def save_whole(content: object, file: str | Path) -> None:
    """``torch.save`` that replaces a file only when the new one is on the disk.

    Raises:
        OSError: it cannot be written, for instance for lack of room; torch would not say why. The old file stays.
    """
    with replacing(file) as temporary, open(temporary, "wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        stream.flush()
        os.fsync(stream.fileno())  # a network file system may say only now that there is no room
