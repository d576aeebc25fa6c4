"""The trainers, found by name: nnU-Net looks them up here, through ``nnunet_ssl/_ext``.

A name is imported when it is asked for. ``<any trainer>_<N>epochs`` is a trainer too, with N epochs, from 1.
"""

from __future__ import annotations

import importlib
import re

from nnunet_ssl.errors import UserError

TRAINERS = {
    "nnUNetTrainerLabeledOnly": "labeled_only",
    "nnUNetTrainerWarps": "warps",
    "nnUNetTrainerCPS": "cps",
    "nnUNetTrainerGACPS": "ga_cps",
    "nnUNetTrainerURPC": "urpc",
    "nnUNetTrainerMagicNet": "magicnet",
    "nnUNetTrainerSASNet": "sasnet.trainer",
    **{f"nnUNetTrainerSHTA_{host}": "shta" for host in ("LabeledOnly", "CPS", "GACPS", "URPC", "MagicNet")},
    "nnUNetTrainerMAE": "mae",
}
BASES = {"nnUNetTrainerSSL": "base"}


def __getattr__(name: str) -> type:
    with_epochs = re.fullmatch(r"(nnUNetTrainer\w+?)_([0-9]+)epochs", name)
    base = with_epochs[1] if with_epochs else name
    module = (TRAINERS | BASES).get(base)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if with_epochs and not re.fullmatch("0*[1-9][0-9]{0,8}", with_epochs[2]):
        # no AttributeError: nnU-Net's hasattr would hide it and say that there is no such trainer
        raise UserError(f"-tr {base}_<N>epochs: N must be a whole number from 1 and below 1e9. Choose another.")
    trainer = getattr(importlib.import_module(f"{__name__}.{module}"), base)
    if with_epochs:
        body = {"epochs": int(with_epochs[2]), "__module__": __name__, "__doc__": trainer.__doc__}
        trainer = type(name, (trainer,), body)
    globals()[name] = trainer  # the same class at every look-up, and picklable by name
    return trainer


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(TRAINERS) | set(BASES))
