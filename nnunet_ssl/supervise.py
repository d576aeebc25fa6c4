"""Runs a command, and ends it and every process it has started once the process that asked for it is gone.

``stock_commands.running`` starts this file by its path, in a separate Python process, with the command's words as
arguments; it needs only the standard library. The process that started it holds the other end of its standard input.
When that closes, on purpose or because its holder was killed, everything is ended: children are not told of a SIGKILL,
and nnU-Net's worker processes do not notice that they are alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main(words: list[str]) -> int:
    """Run ``words``; returns the exit code, 128 and the signal's number where one ended it, as a shell does."""
    os.setsid()  # a separate process group, which holds the command and its workers
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=_watch, daemon=True).start()
    code = subprocess.Popen(words, stdin=subprocess.DEVNULL).wait()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)  # workers of a command that was killed do not notice that they are alone
    return code if code >= 0 else 128 - code


def _watch() -> None:
    os.read(0, 1)  # nobody writes there
    _end()


def _end(*_: object) -> None:
    os.killpg(0, signal.SIGKILL)  # this process too


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
