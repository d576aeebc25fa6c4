"""Runs at the start of every interpreter of the environment: ``nnunet_ssl.pth`` calls it (``.start`` from Python 3.15).

It lies next to the package, not in it, so that it is there as long as the two files that call it: where the package is
gone or broken (an editable install whose source tree was moved, a merge conflict) Python starts in silence.
"""


def run():
    """Let nnU-Net find the trainers of this package."""
    try:
        from nnunet_ssl._startup import register

        register()
    except Exception:
        pass  # nnUNetv2_ssl_trainers --check says what is wrong
