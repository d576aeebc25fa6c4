"""Settings of a trainer: a frozen dataclass, one file that overrides it, and errors that name the right field."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from nnunet_ssl.declared import Count, Counts, Part, Share, build, declared, papers_values, setting
from nnunet_ssl.files import read_json

ENVIRONMENT_VARIABLE = "nnUNet_ssl_config"

RunSeed = Annotated[int, Field(ge=0, lt=2**63, description="a whole number from 0 and below 2^63")]
S = TypeVar("S", bound="SSLSettings")


@declared
class SSLSettings:
    """What every trainer of this package can be told.

    A method's own settings are a subclass with the decorator :data:`nnunet_ssl.declared.declared` and fields of the
    types there, which give the ranges; :func:`nnunet_ssl.declared.setting` says the rest. A check across fields is a
    ``pydantic.model_validator`` that raises ValueError with what follows the file's name in the message.
    """

    preset: Literal["nnunet", "paper"] = setting(
        "nnunet", '`"paper"` uses the papers\' own values, `"nnunet"` the defaults'
    )
    seed: RunSeed | None = setting(
        None, "A whole number makes the run reproducible; `null` draws one and writes it to `ssl_settings.json`"
    )
    passes: Literal["paired", "lean", "joint"] = setting(
        "paired",
        'Order of the passes of two networks that teach each other: `"paired"` runs both on labeled or unlabeled '
        'images, then backpropagates both; `"lean"` keeps one network at a time, which saves memory, and runs the '
        'second twice; `"joint"` keeps all passes, of any method, until the end of the step, for tests. The gradients '
        "are the same",
    )
    num_iterations_per_epoch: Count = setting(250, "Training steps per epoch, nnU-Net's own number")
    num_val_iterations_per_epoch: Count = setting(50, "Validation steps per epoch, nnU-Net's own number")
    save_every: Count = setting(50, "Epochs between writes of `checkpoint_latest.pth`, nnU-Net's own number")
    cpu_bfloat16: bool = setting(
        False,
        "On a CPU, train under autocast with bfloat16, as nnU-Net does with float16 on a GPU. Worth it if the CPU has "
        "instructions for it (AMX): a training on the hippocampus took 0.63 of the time. Without them a convolution "
        "takes five times as long, and the log says so",
    )
    predict_with: Literal["last", "ema"] = setting(
        "last",
        "Weights for validation, checkpoints and prediction: the last step's, or their "
        "[running average](#averaged-weights)",
    )
    ema_share: Part = setting(0.1, "Share of the steps made so far that this average spans")
    augment: Literal["workers", "device"] = setting(
        "workers", "Where training patches are augmented: by the loader's workers, or on the [device](#augmentation)"
    )
    elastic_deformation: Share = setting(0.0, "Probability that a training patch is [deformed](#elastic-deformation)")
    warped_share: Share = setting(
        0.0, "Probability that a labeled patch comes from a [warp](shapes.md); `nnUNetTrainerMAE` refuses it"
    )
    warped_share_last: Share | None = setting(
        None, "That probability at the last step, reached by a linear change; `null` keeps it constant"
    )
    warp_onto: Literal["unlabeled", "labeled"] = setting(
        "unlabeled", "Images that labeled ones are warped onto: those in `imagesUn`, or the fold's other labeled images"
    )
    keep_epochs: Counts = setting((), "Epochs after which `checkpoint_epoch<N>.pth` is also kept, for learning curves")

    @model_validator(mode="after")
    def _no_elastic_deformation_on_the_device(self) -> SSLSettings:
        if self.augment == "device" and self.elastic_deformation:
            raise ValueError(
                "sets 'elastic_deformation', which only workers can do; leave it out, or set 'augment' to 'workers'"
            )
        return self


def load_settings(cls: type[S], file: str | None) -> S:
    """The defaults of ``cls``, changed by a preset and by the fields that ``file``, if any, names in a JSON object.

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
    if isinstance(given, dict) and given.get("preset") == "paper":
        given = papers_values(cls) | given
    return build(cls, given, source, "a setting of this trainer")
