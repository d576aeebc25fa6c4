"""The two branches of SASNet by name, so that nowhere an order of them has to be known."""

from __future__ import annotations

from typing import Any, NamedTuple


class Branches(NamedTuple):
    """One thing of each branch: what it gives, its probabilities, its confidence. This order is the only one."""

    high: Any
    low: Any = None  # None in a network without a low-level branch

    def named(self) -> dict[str, Any]:
        """What there is, by the branch's name."""
        return {name: value for name, value in self._asdict().items() if value is not None}
