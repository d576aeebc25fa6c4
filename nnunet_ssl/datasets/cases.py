"""A case, the part that it has in a dataset, and where its published files are."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nnunet_ssl.errors import UserError

Part = Literal["labeled", "validation", "unlabeled", "test"]


@dataclass(frozen=True)
class Case:
    """A case and its files; ``label`` is None where it is not to be opened."""

    name: str
    part: Part
    image: Path
    label: Path | None


class Files:
    """Where a dataset's files are, by case; the ``._*`` files that macOS puts into archives are none.

    Args:
        root: folder that is searched with all that is below it.
        template: the end of a file's path, the case in braces: ``img{}.nii.gz``, ``{}/lgemri.nrrd``. A template that
            ends in ``.gz`` also finds the unpacked file.
        folders: look for folders that hold such a file, not for the file itself (DICOM).

    Raises:
        UserError: there is no such folder.
    """

    def __init__(self, root: Path, template: str, folders: bool = False) -> None:
        if not root.is_dir():
            raise UserError(f"{root} is not a folder.")
        self.root, self.template = root, template
        pattern = re.escape(template).replace(r"\{\}", "(?P<case>[^/]+)").replace(r"\*\*/", "(?:.*/)?")
        pattern = pattern.replace(r"\*", "[^/]*")
        pattern = pattern.removesuffix(r"\.gz") + r"(?:\.gz)?" if pattern.endswith(r"\.gz") else pattern
        self.found: dict[str, set[Path]] = defaultdict(set)
        for file in files_below(root):
            if match := re.fullmatch(f"(?:.*/)?{pattern}", file.relative_to(root).as_posix()):
                self.found[match["case"]].add(file.parent if folders else file)

    def one(self, case: str, problems: list[str]) -> Path | None:
        """The one file of a case; where there is none or more than one, that is added to ``problems``."""
        files, name = sorted(self.found.get(case, ())), self.template.replace("{}", case)
        if not files:
            problems.append(f"{name} is missing below {self.root}.")
        elif len(files) > 1:
            problems.append(f"{name} is there {len(files)} times: {', '.join(map(str, files))}. Keep one.")
        return files[0] if len(files) == 1 else None


def files_below(root: Path) -> Iterator[Path]:
    """All files but hidden ones, in linked folders too."""
    seen = set()  # a link may lead back up
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if (real := os.path.realpath(folder)) in seen:
            below.clear()
            continue
        seen.add(real)
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def choose_h5(published: Files, h5: Files) -> bool:
    """Whether a dataset comes as the h5 files that the literature passes around, rather than as its owners publish it.

    Raises:
        UserError: both are there, or neither.
    """
    if bool(published.found) == bool(h5.found):
        names = " and ".join(files.template.replace("{}", "<case>") for files in (published, h5))
        many = "both" if h5.found else "neither"
        raise UserError(f"{h5.root} holds {many} {names}; one of them is needed.")
    return bool(h5.found)
