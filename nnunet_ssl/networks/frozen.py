"""A module that gradients flow through and that takes none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Around forwards of an adversary that judges: what it is shown learns from it, and it does not.

    Only the forward need be inside; the backward may come after.

    Args:
        module: whose parameters learn outside. Its mode stays as it is.
    """
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
