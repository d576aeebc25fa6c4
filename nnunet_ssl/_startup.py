"""What makes nnU-Net's own commands find the trainers, without an environment variable that the user has to set.

nnU-Net looks for trainers in its own source tree and then in the folders of ``nnUNet_extTrainer``. ``register`` puts
the package's ``_ext`` folder in front of that variable. It runs at the start of every interpreter of the environment
(``startup/`` in the source tree), so it holds for worker processes and DDP ranks as well, and it imports nothing
that Python has not imported by then.
"""

import os

VARIABLE = "nnUNet_extTrainer"
EXT_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_ext")


def register() -> None:
    """Put ``_ext`` in front of ``nnUNet_extTrainer``, once; folders that the user has set stay behind it.

    In front, because nnU-Net gives up at the first folder that fails to import: a user's unfinished trainer must not
    hide ours, while ours answers for its own names only. An entry that another environment's copy of this package
    left in an inherited variable is dropped.
    """
    os.environ[VARIABLE] = os.pathsep.join([EXT_FOLDER, *folders_of_the_user()])


def folders_of_the_user() -> list[str]:
    """The folders of ``nnUNet_extTrainer`` that are of no copy of this package."""
    copies = os.path.join("nnunet_ssl", "_ext")
    return [f for f in os.environ.get(VARIABLE, "").split(os.pathsep) if f.strip() and not f.endswith(copies)]
