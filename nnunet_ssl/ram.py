"""How much RAM this process may use: the machine's, or less in a container or in a job of a cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import PurePosixPath

import psutil


def ram_limit(root: str = "/") -> int:
    """Bytes of RAM that the processes of this machine, container or SLURM job may take together.

    The last two are control groups of Linux (cgroups, version 1 or 2), of which psutil does not know. The smallest
    limit counts, of the process's own group and all that this one lies in; beyond it the kernel kills. ``root`` is
    where ``proc`` and ``sys`` are.
    """
    limits = [psutil.virtual_memory().total]
    for file in _limit_files(root):
        text = _read(file).strip()
        if text.isdecimal():  # else there is no such file, or no limit: "max"
            limits.append(int(text))
    return min(limits)


def _limit_files(root: str) -> Iterator[str]:
    """Files that may hold a limit. A container may know its group by the host's path; then only the top is there."""
    for line in _read(os.path.join(root, "proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, name = "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(os.path.normpath(path))
        for folder in (group, *group.parents):
            yield os.path.join(root, mount, *folder.parts[1:], name)


def _read(file: str) -> str:
    try:
        with open(file, encoding="utf-8") as opened:
            return opened.read()
    except OSError:  # no Linux, no control groups, or not ours to read
        return ""
