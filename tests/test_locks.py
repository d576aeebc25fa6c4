"""Locks between processes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.locks import holding, is_shared, share, take

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


def test_a_lock_of_the_process_is_taken_again_and_free_when_nobody_has_it(tmp_path: Path) -> None:
    first, second = (take(tmp_path / "lock", "busy", of_process=True) for _ in range(2))
    assert first is second
    del first, second
    take(tmp_path / "lock", "busy").release()


def test_patience_outlasts_a_holder_that_is_about_to_end(tmp_path: Path) -> None:
    code = f"from nnunet_ssl.locks import take; lock = take({str(tmp_path / 'lock')!r}, 'x')"
    code += "; print(flush=True); import time; time.sleep(0.5)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        take(tmp_path / "lock", "busy", patience=60).release()


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


def test_a_link_that_lies_in_wait_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "lock").symlink_to(victim)
    (tmp_path / "new").symlink_to(tmp_path / "elsewhere")
    for name in ("lock", "new"):
        with pytest.raises(OSError):  # noqa: PT011
            take(tmp_path / name, "busy")
        with pytest.raises(OSError):  # noqa: PT011
            share(tmp_path / name)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "elsewhere").exists()


def test_what_is_shared_is_so_until_the_last_process_has_gone_but_not_its_forked_children(tmp_path: Path) -> None:
    file = tmp_path / "shared"
    assert is_shared(file) is False
    code = f"""
import os, time
from nnunet_ssl.locks import is_shared, share
share({str(file)!r})
share({str(file)!r})
if os.fork() == 0:
    print(os.getpid(), flush=True)  # it has let go: a fork does so before it goes on
    time.sleep(60)
input()
"""
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8") for _ in range(2)]
    children = [int(process.stdout.readline()) for process in processes]
    try:
        for process in processes:
            assert is_shared(file) is True
            process.kill()
            process.wait()
        assert is_shared(file) is False
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


def test_what_may_only_be_read_can_be_shared(tmp_path: Path) -> None:
    file = tmp_path / "shared"
    file.touch()
    real_open = os.open
    with pytest.MonkeyPatch.context() as patch:  # root may write everything

        def read_only(path: str, flags: int, *mode: int) -> int:
            if flags & (os.O_RDWR | os.O_CREAT):
                raise PermissionError(errno.EACCES, "no")
            return real_open(path, flags, *mode)

        patch.setattr(os, "open", read_only)
        share(file)
    assert is_shared(file) is True


def test_nobody_can_tell_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "none")

    monkeypatch.setattr(fcntl, "flock", flock)
    share(tmp_path / "shared")
    assert is_shared(tmp_path / "shared") is None
