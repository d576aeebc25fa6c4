"""Locks between processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.locks import holding, take

fcntl = pytest.importorskip("fcntl", reason="locks of POSIX")


def test_a_second_process_is_refused_until_the_first_has_gone(tmp_path: Path) -> None:
    code = f"from nnunet_ssl.locks import take; lock = take({str(tmp_path / 'lock')!r}, 'x')"
    code += "; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="busy with it"):
            take(tmp_path / "lock", "busy with it")
        other.kill()
        other.wait()
        with holding(tmp_path / "lock", "busy with it"):
            pass


def test_a_released_lock_is_free(tmp_path: Path) -> None:
    with holding(tmp_path / "lock", "busy"):
        pass
    take(tmp_path / "lock", "busy").release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("wait", [True, False])
def test_no_locks_are_said_once_and_passed_over(tmp_path, monkeypatch, capsys, number, wait) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        with holding(tmp_path / "lock", "busy", wait=wait):
            pass
    assert capsys.readouterr().out.count("without locks") == 1


def test_another_error_is_raised(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"exists|directory"):
        take(tmp_path / "file" / "lock", "busy")
