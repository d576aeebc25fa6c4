"""The trainers, found by name: nnU-Net looks them up here, through ``nnunet_ssl/_ext``.

A name is imported when it is asked for. ``<any trainer>_<N>epochs`` is a trainer too, with N epochs, from 1. So it is
with a class of a user's own, derived from one of these, in a folder of ``nnUNet_extTrainer``; and for such a
``nnUNetTrainer<X>`` there is ``nnUNetTrainerSHTA_<X>``.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable

from nnunet_ssl._startup import folders_of_the_user
from nnunet_ssl.errors import UserError

SHTA = "nnUNetTrainerSHTA_"
SHTA_HOSTS = (
    *("LabeledOnly", "CPS", "GACPS", "URPC", "MagicNet", "MeanTeacher", "UAMT", "ICT", "EntMin"),
    *("UniMatch", "MiDSS", "ABD", "DTC", "SASSNet", "MCNetPlus", "SSNet", "CauSSL", "DHC", "AUSS"),
)
TRAINERS = {
    "nnUNetTrainerLabeledOnly": "labeled_only",
    "nnUNetTrainerWarps": "warps",
    "nnUNetTrainerCPS": "cps",
    "nnUNetTrainerGACPS": "ga_cps",
    "nnUNetTrainerURPC": "urpc",
    "nnUNetTrainerMagicNet": "magicnet",
    "nnUNetTrainerSASNet": "sasnet.trainer",
    "nnUNetTrainerMeanTeacher": "mean_teacher",
    "nnUNetTrainerUAMT": "ua_mt",
    "nnUNetTrainerICT": "ict",
    "nnUNetTrainerEntMin": "ent_min",
    "nnUNetTrainerUniMatch": "unimatch",
    "nnUNetTrainerBCP": "bcp",
    "nnUNetTrainerMiDSS": "midss",
    "nnUNetTrainerABD": "abd",
    "nnUNetTrainerDTC": "dtc",
    "nnUNetTrainerSASSNet": "sassnet",
    "nnUNetTrainerMCNetPlus": "mcnet_plus",
    "nnUNetTrainerSSNet": "ssnet",
    "nnUNetTrainerCauSSL": "caussl",
    "nnUNetTrainerDHC": "dhc",
    "nnUNetTrainerSKCDF": "skcdf",
    "nnUNetTrainerAUSS": "auss",
    **{f"{SHTA}{host}": "shta" for host in SHTA_HOSTS},
    "nnUNetTrainerMAE": "mae",
}
BASES = {"nnUNetTrainerSSL": "base"}


def __getattr__(name: str) -> type:
    with_epochs = re.fullmatch(r"(nnUNetTrainer\w+?)_([0-9]+)epochs", name)
    base = with_epochs[1] if with_epochs else name
    if module := (TRAINERS | BASES).get(base):
        trainer = getattr(importlib.import_module(f"{__name__}.{module}"), base)
    elif (with_epochs or base.startswith(SHTA)) and not of_the_user(name):  # else nnU-Net will find it itself
        trainer = derived_by_the_user(base)
    else:
        trainer = None
    if trainer is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if with_epochs:
        if not re.fullmatch("0*[1-9][0-9]{0,8}", with_epochs[2]):
            # no AttributeError: nnU-Net's hasattr would hide it and say that there is no such trainer
            raise UserError(f"-tr {base}_<N>epochs: N must be a whole number from 1 and below 1e9. Choose another.")
        body = {"epochs": int(with_epochs[2]), "__module__": __name__, "__doc__": trainer.__doc__}
        trainer = type(name, (trainer,), body)
    globals()[name] = trainer  # the same class at every look-up, and picklable by name
    return trainer


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(TRAINERS) | set(BASES))


def of_the_user(name: str, use: Callable[[type], type | None] = lambda found: found) -> type | None:
    """The class of this name in the user's folders of ``nnUNet_extTrainer``, where nnU-Net looks after ours.

    ``use`` makes of it what is returned, while its module is still known: nnU-Net forgets it after a search.
    """
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class, temporarily_cleanup_imports_from_path

    for folder in filter(os.path.isdir, folders_of_the_user()):
        with temporarily_cleanup_imports_from_path(folder):
            if found := recursive_find_python_class(folder, name, None):
                return use(found)
    return None


def derived_by_the_user(name: str) -> type | None:
    """A user's class that derives from ours, or SHTA on one; None where there is none."""
    from nnunet_ssl.trainers.base import nnUNetTrainerSSL
    from nnunet_ssl.trainers.shta import on_host

    def is_ours(found: type) -> bool:
        return isinstance(found, type) and issubclass(found, nnUNetTrainerSSL)

    if found := of_the_user(name):
        return found if is_ours(found) else None
    if not name.startswith(SHTA):
        return None
    # its settings are made of the host's, whose types pydantic looks up in the host's module
    return of_the_user(f"nnUNetTrainer{name.removeprefix(SHTA)}", lambda host: on_host(host) if is_ours(host) else None)
