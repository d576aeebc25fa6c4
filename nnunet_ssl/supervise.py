"""Runs a command, and ends it with every process that it has started when the one who asked for it is gone.

``stock_commands.running`` starts this file by its path, in a Python of its own, with the command's words as arguments;
it needs nothing but the standard library. Whoever started it holds the other end of its standard input. When that
closes, by intent or because its holder was killed, everything is ended: SIGKILL tells no child, and nnU-Net's worker
processes do not notice that they are alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main(words: list[str]) -> int:
    """Run ``words``; returns the exit code, 128 and the signal's number where one ended it, as a shell does."""
    os.setsid()  # a process group of its own, which holds the command and its workers
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
