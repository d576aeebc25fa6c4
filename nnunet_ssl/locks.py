"""Locks between processes, on file systems that have them and on those that have not.

A lock is freed by the system when its holder dies. Some network file systems have none (NFS without lockd): there we
say so once and continue, as nnU-Net itself does everywhere.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from nnunet_ssl.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NO_LOCKS_HERE = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
OPEN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)  # a link may lie in wait in a shared folder

_said: set[str] = set()  # folders of which it has been said that they have no locks
_shared: dict[tuple[int, int], int] = {}  # device and inode -> descriptor, of what this process shares


def take(
    file: str | Path, busy: str, *, wait: bool = False, patience: float = 0, of_process: bool = False
) -> BaseFileLock | None:
    """Take a lock, and keep it until ``release`` or the end of the process.

    Args:
        file: the lock's file; it stays. Its folder is made where it is missing.
        busy: what to say where another process holds it.
        wait: print ``busy`` and wait, rather than refuse.
        patience: seconds to wait before either, for a holder that is about to end.
        of_process: taking it again in this process shares it. It is free when all have released it or are gone.

    Returns:
        The lock; None on a file system without locks.

    Raises:
        UserError: ``busy``, unless ``wait``.
        OSError: the file cannot be made.
    """
    folder = os.path.dirname(os.path.abspath(file))
    os.makedirs(folder, exist_ok=True)
    if not _has_locks(file):
        if folder not in _said:
            _said.add(folder)
            print(
                f"nnunet_ssl: {folder} is on a file system without locks: make sure that no two processes work there "
                "at the same time.",
                flush=True,
            )
        return None
    lock = FileLock(file, thread_local=False, is_singleton=of_process)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        if not wait:
            raise UserError(busy) from None
        print(f"nnunet_ssl: {busy}", flush=True)
        lock.acquire()
    return lock


def _has_locks(file: str | Path) -> bool:
    """Ask the system: filelock 3 takes a file system without locks for a lock that is held, and waits forever."""
    if fcntl is None:
        return True
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | OPEN, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in NO_LOCKS_HERE
    finally:
        os.close(descriptor)
    return True


@contextmanager
def holding(file: str | Path, busy: str, *, wait: bool = False) -> Iterator[None]:
    """:func:`take` a lock for the length of a ``with`` block."""
    lock = take(file, busy, wait=wait)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def share(file: str | Path) -> None:
    """Say until the end of this process that it uses something; any number of processes may at a time.

    The right to read is enough where the lock's file is there; else it is made. Nothing is said on a file system
    without locks.

    Raises:
        OSError: it cannot be opened.
    """
    if fcntl is None:
        return
    try:
        descriptor = os.open(file, os.O_RDONLY | OPEN)
    except FileNotFoundError:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | OPEN, 0o666)
    status = os.fstat(descriptor)
    this = (status.st_dev, status.st_ino)
    try:
        if this not in _shared:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            _shared[this] = descriptor
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
    finally:
        if _shared.get(this) != descriptor:
            os.close(descriptor)


def is_shared(file: str | Path) -> bool | None:
    """Whether a process, this one too, uses what :func:`share` says with a file; None where nobody can tell."""
    if fcntl is None:
        return None
    try:
        try:
            descriptor = os.open(file, os.O_RDWR | OPEN)  # NFS locks alone only what may be written
        except PermissionError:  # it is somebody else's; elsewhere the right to read is enough
            descriptor = os.open(file, os.O_RDONLY | OPEN)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in (errno.EAGAIN, errno.EACCES) else None
    finally:
        os.close(descriptor)
    return False


def _let_go() -> None:
    """In a forked child: its parent's locks end with the parent, however long the child lives."""
    for descriptor in _shared.values():
        os.close(descriptor)
    _shared.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
