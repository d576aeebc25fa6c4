"""Settings of a trainer: a frozen dataclass, one file that overrides it, and errors that name the right field."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from nnunet_ssl.errors import UserError

ENVIRONMENT_VARIABLE = "nnUNet_ssl_config"

S = TypeVar("S", bound="SSLSettings")


@dataclass(frozen=True, kw_only=True)
class SSLSettings:
    """What every trainer of this package can be told."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {"nnunet": {}}  # name -> fields that differ from the defaults

    preset: str = "nnunet"  # "paper" gives the papers' own values where they differ from the defaults
    seed: int | None = None  # None draws one; the one drawn is written to ssl_settings.json
    passes: Literal["lean", "joint"] = "lean"  # lean backpropagates pass by pass: the same gradients, less memory
    num_iterations_per_epoch: int = 250  # nnU-Net's own
    num_val_iterations_per_epoch: int = 50  # nnU-Net's own
    save_every: int = 50  # epochs between two checkpoint_latest.pth; nnU-Net's own
    keep_epochs: tuple[int, ...] = ()  # epochs after which checkpoint_epoch<N>.pth is kept, for learning curves

    def problems(self) -> dict[str, str]:
        """Fields whose value has the right type but cannot work, and what they must be."""
        problems = {}
        if self.seed is not None and not 0 <= self.seed < 2**63:
            problems["seed"] = "a whole number from 0"
        for name in ("num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every"):
            if getattr(self, name) < 1:
                problems[name] = "at least 1"
        return problems


def load_settings(cls: type[S], file: str | None) -> S:
    """The defaults of ``cls``, changed by a preset and by the fields that ``file`` names.

    Args:
        cls: the trainer's settings class.
        file: a JSON file with an object of field names and values, or None.

    Raises:
        UserError: if the file cannot be read, or names an unknown field or preset, or gives a value of a wrong type.
    """
    if not file:
        return cls()
    try:
        with open(file) as opened:
            given = json.load(opened)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{ENVIRONMENT_VARIABLE}={file} cannot be read as JSON ({error}); correct the file or unset the variable."
        ) from None
    if not isinstance(given, dict):
        raise UserError(f"{file} holds {type(given).__name__}; write one JSON object of setting names and values.")
    return settings_from_dict(cls, given, file)


def settings_from_dict(cls: type[S], given: dict[str, Any], source: str) -> S:
    """Like :func:`load_settings`, from a dictionary; ``source`` names it in errors."""
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            remedy = f"did you mean '{near[0]}'?" if near else f"the settings are {', '.join(names)}."
            raise UserError(f"{source} sets '{name}', which is not a setting of this trainer; {remedy}")
    values = {name: _checked(value, hints[name], name, source) for name, value in given.items()}
    preset, presets = values.get("preset", "nnunet"), all_presets(cls)
    if preset not in presets:
        raise UserError(f"{source} sets preset to {preset!r}; the presets are {', '.join(map(repr, presets))}.")
    settings = cls(**presets[preset] | values)
    for name, wanted in settings.problems().items():
        raise UserError(f"{source} sets '{name}' to {getattr(settings, name)!r}; it must be {wanted}.")
    return settings


def all_presets(cls: type[SSLSettings]) -> dict[str, dict[str, Any]]:
    """The presets of ``cls`` and its bases, merged by name."""
    merged: dict[str, dict[str, Any]] = {}
    for base in reversed(cls.__mro__):
        for name, values in vars(base).get("presets", {}).items():
            merged[name] = merged.get(name, {}) | values
    return merged


def _checked(value: Any, hint: Any, name: str, source: str) -> Any:
    """``value`` in the type of ``hint``, or a UserError."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # only "X | None" is used
        if value is None:
            return None
        return _checked(value, options[0], name, source)
    if origin is Literal:
        if value in options and isinstance(value, str):
            return value
        wanted = "one of " + ", ".join(map(repr, options))
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_checked(item, options[0], name, source) for item in value)
        wanted = f"a list of {options[0].__name__}"
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        wanted = "a number"
    else:
        if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
            return value
        wanted = {int: "a whole number", bool: "true or false", str: "a text"}[hint]
    raise UserError(f"{source} sets '{name}' to {value!r}; it must be {wanted}.")
