"""What careless editors, full disks and strangers do to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class RunsCode:
    """In a pickle: whoever reads it makes ``file``."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.file)!r}, 'w').close()",)
