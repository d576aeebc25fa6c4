"""The one exception that speaks to the user."""

from __future__ import annotations


class UserError(SystemExit):
    """A problem that the user can fix: a missing folder, a broken image, an unknown setting.

    The message is one plain sentence or two that name the file, the value and the remedy. As a ``SystemExit`` it ends
    nnU-Net's own commands, whose top level is not ours, with exit code 1 and the message on standard error, without a
    traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)  # args, with which pickle calls __init__ again when another process has raised it
        self.code = f"nnunet_ssl: {message}"

    def __str__(self) -> str:
        return str(self.code)
