"""Settings of a trainer: a frozen dataclass, one file that overrides it, and errors that name the right field."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field

from nnunet_ssl.declared import Count, Counts, Part, Share, build, declared, shown
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json

ENVIRONMENT_VARIABLE = "nnUNet_ssl_config"

RunSeed = Annotated[int, Field(ge=0, lt=2**63, description="a whole number from 0 and below 2^63")]
S = TypeVar("S", bound="SSLSettings")


@declared
class SSLSettings:
    """What every trainer of this package can be told.

    A method's own settings are a subclass with the decorator :data:`nnunet_ssl.declared.declared` and fields of the
    types there, which give the ranges. A check across fields is a ``pydantic.model_validator`` that raises ValueError
    with what follows the file's name in the message.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"nnunet": {}}  # name -> fields that differ from the defaults

    preset: str = "nnunet"  # "paper" gives the papers' own values where they differ from the defaults
    seed: RunSeed | None = None  # None draws one; the one drawn is written to ssl_settings.json
    passes: Literal["lean", "joint"] = "lean"  # lean backpropagates pass by pass: the same gradients, less memory
    num_iterations_per_epoch: Count = 250  # nnU-Net's own
    num_val_iterations_per_epoch: Count = 50  # nnU-Net's own
    save_every: Count = 50  # epochs between two checkpoint_latest.pth; nnU-Net's own
    cpu_bfloat16: bool = False  # autocast on a CPU too: faster where it has instructions for it
    predict_with: Literal["last", "ema"] = "last"  # ema: the average of the weights, in checkpoints and validation
    ema_share: Part = 0.1  # share of the steps so far that the average spans, which suits a training of any length
    elastic_deformation: Share = 0.0  # probability that a training patch is deformed elastically; nnU-Net does not
    keep_epochs: Counts = ()  # epochs after which checkpoint_epoch<N>.pth is kept, for learning curves
    warped_share: Share = 0.0  # probability that a labelled patch is of a warp: see docs/shapes.md
    warped_share_last: Share | None = None  # that at the last step, changing linearly; None leaves it as it is


def load_settings(cls: type[S], file: str | None) -> S:
    """The defaults of ``cls``, changed by a preset and by the fields that ``file`` names.

    Args:
        cls: the trainer's settings class.
        file: a JSON file with an object of field names and values, or None.

    Raises:
        UserError: if the file cannot be read, or names an unknown field or preset, or gives a value of a wrong type or
            out of its range.
    """
    if not file:
        return cls()
    remedy = f"Write one JSON object of setting names and values, or unset {ENVIRONMENT_VARIABLE}."
    return settings_from_dict(cls, read_json(file, remedy), file)


def settings_from_dict(cls: type[S], given: Any, source: str) -> S:
    """Like :func:`load_settings`, from what was read of a file; ``source`` names it in errors."""
    if isinstance(given, dict):
        preset, presets = given.get("preset", "nnunet"), all_presets(cls)
        if not isinstance(preset, str) or preset not in presets:
            names = ", ".join(map(repr, presets))
            raise UserError(f"{source} sets 'preset' to {shown(preset)}; it must be one of {names}.")
        given = presets[preset] | given
    return build(cls, given, source, "a setting of this trainer")


def all_presets(cls: type[SSLSettings]) -> dict[str, dict[str, Any]]:
    """The presets of ``cls`` and its bases, merged by name."""
    merged: dict[str, dict[str, Any]] = {}
    for base in reversed(cls.__mro__):
        for name, values in vars(base).get("presets", {}).items():
            merged[name] = merged.get(name, {}) | values
    return merged
