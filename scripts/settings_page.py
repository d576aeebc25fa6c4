"""Writes the tables of settings in docs/ from what the trainers declare: ``make settings``.

A table stands between ``<!-- settings: CLASS ... -->``, which names the classes whose own settings it lists, and
``<!-- end -->``. The rest of the page is written by hand.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_ssl import trainers
from nnunet_ssl.declared import about, fields_of, must_be

PAGES = [Path(__file__).resolve().parents[1] / "docs" / page for page in ("settings.md", "methods.md")]
TABLE = re.compile(r"(<!-- settings: ([\w ]*) -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)


def classes_with_settings() -> dict[str, type]:
    """The classes that declare settings of the package's trainers, by name."""
    every = [cls for name in trainers.TRAINERS for cls in getattr(trainers, name).Settings.__mro__]
    return {cls.__name__: cls for cls in every if own_settings(cls)}


def own_settings(cls: type) -> list[str]:
    """The names of the settings that a class declares itself."""
    return [name for name in inspect.get_annotations(cls) if name in getattr(cls, "__pydantic_fields__", {})]


def table_of(*classes: type) -> str:
    """A table of the settings that these classes declare; a column without entries is left out."""
    rows = [["Setting", "Symbol", "Default", "Paper", "Must be", "Meaning"]]
    for cls in classes:
        for name in own_settings(cls):
            field = fields_of(cls)[name]
            told = about(field)
            paper = "" if told["paper"] is None else as_json(told["paper"])
            rows.append([f"`{name}`", told["symbol"], as_json(field.default), paper, must_be(field), told["meaning"]])
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    head, *body = (f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in zip(*columns, strict=True))
    return "\n".join([head, "|" + " --- |" * len(columns), *body, ""])


def as_json(value: Any) -> str:
    """A value as a settings file has it."""
    return f"`{json.dumps(value)}`"


def with_tables(pages: Sequence[str]) -> list[str]:
    """The pages with every table as the code has it.

    Raises:
        ValueError: a class with settings has no table, or a table is of a class that there is not.
    """
    classes = classes_with_settings()
    shown = [name for page in pages for table in TABLE.finditer(page) for name in table[2].split()]
    if wrong := set(shown) ^ set(classes):
        raise ValueError(f"{', '.join(sorted(wrong))}: a class with settings and no table, or a table of no such class")

    def rewritten(table: re.Match[str]) -> str:
        return table[1] + table_of(*(classes[name] for name in table[2].split()))

    return [TABLE.sub(rewritten, page) for page in pages]


if __name__ == "__main__":
    for page, text in zip(PAGES, with_tables([page.read_text(encoding="utf-8") for page in PAGES]), strict=True):
        page.write_text(text, encoding="utf-8")
