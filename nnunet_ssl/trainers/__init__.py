"""The trainers, found by name: nnU-Net looks them up here, through ``nnunet_ssl/_ext``.

A name is imported when it is asked for. ``<any trainer>_<N>epochs`` is a trainer too, with N epochs.
"""

from __future__ import annotations

import importlib
import re

TRAINERS = {
    "nnUNetTrainerLabeledOnly": "labeled_only",
    "nnUNetTrainerCPS": "cps",
    "nnUNetTrainerGACPS": "ga_cps",
    "nnUNetTrainerURPC": "urpc",
    "nnUNetTrainerMagicNet": "magicnet",
    "nnUNetTrainerSASNet": "sasnet",
    "nnUNetTrainerSHTA_LabeledOnly": "shta",
    "nnUNetTrainerSHTA_CPS": "shta",
    "nnUNetTrainerSHTA_GACPS": "shta",
    "nnUNetTrainerSHTA_URPC": "shta",
    "nnUNetTrainerSHTA_MagicNet": "shta",
}
BASES = {"nnUNetTrainerSSL": "base"}


def __getattr__(name: str) -> type:
    with_epochs = re.fullmatch(r"(nnUNetTrainer\w+?)_(\d+)epochs", name)
    base = with_epochs[1] if with_epochs else name
    module = (TRAINERS | BASES).get(base)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    trainer = getattr(importlib.import_module(f"{__name__}.{module}"), base)
    if with_epochs:
        body = {"epochs": int(with_epochs[2]), "__module__": __name__, "__doc__": trainer.__doc__}
        trainer = type(name, (trainer,), body)
    globals()[name] = trainer  # the same class at every look-up, and picklable by name
    return trainer


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(TRAINERS) | set(BASES))
