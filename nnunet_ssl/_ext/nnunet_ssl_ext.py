"""The one module that nnU-Net's search for trainers imports: it asks ``nnunet_ssl.trainers`` for the name.

nnU-Net imports the modules of this folder as top-level ones (hence a name that nobody else uses) and forgets them after
the search. The trainers live outside the folder, so their classes stay importable, picklable and the same object at
every look-up.
"""

from __future__ import annotations


def __getattr__(name: str) -> object:
    if not name.startswith("nnUNetTrainer"):
        raise AttributeError(name)
    try:
        from nnunet_ssl import trainers
    except ModuleNotFoundError as error:
        if error.name != "nnunet_ssl":
            raise
        # The variable was inherited by a Python that does not have the package: not ours to answer.
        raise AttributeError(name) from None
    return getattr(trainers, name)
