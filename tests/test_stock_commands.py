"""nnU-Net's commands as child processes: the right Python, and as many threads as they are given."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from nnunet_ssl import stock_commands
from nnunet_ssl.errors import UserError
from nnunet_ssl.stock_commands import end, of_this_python, running


def test_every_command_is_this_environments():
    assert of_this_python(["python", "a.py"], "cuda") == [sys.executable, "a.py"]
    assert of_this_python(["nnUNetv2_ssl_split", "-d", "4"], "cpu") == [
        sys.executable, "-m", "nnunet_ssl.commands", "split", "-d", "4",
    ]  # fmt: skip
    program, *rest = of_this_python(["nnUNetv2_train", "4"], "cuda")
    assert Path(program).parent == Path(sys.executable).parent
    assert rest == ["4"]
    with pytest.raises(UserError, match="knows no command nnUNetv2_no_such"):
        of_this_python(["nnUNetv2_no_such"], "cpu")


@pytest.mark.parametrize(("given", "expected"), [("1", 1), ("3,2", 3), ("0", os.cpu_count()), (None, os.cpu_count())])
def test_threads_on_the_cpu(tmp_path, given, expected):
    """nnU-Net asks multiprocessing for the number of cores, and gives torch as many threads."""
    (tmp_path / "probe.py").write_text(
        "import multiprocessing, sys\ndef main(): print(multiprocessing.cpu_count(), *sys.argv)\n"
    )
    installed = tmp_path / "probe-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: probe\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[console_scripts]\nprobe = probe:main\n")
    path = os.pathsep.join([str(tmp_path), str(Path(stock_commands.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": given or ""}
    words = of_this_python(["nnUNetv2_train", "4", "-device", "cpu"], "cpu")
    words[1 : words.index("nnUNetv2_train") + 1] = [
        "-c", "from nnunet_ssl import stock_commands as s; s.TAKE_EVERY_CORE = {'probe'}; s.main()", "probe",
    ]  # fmt: skip
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(expected), "probe", "4", "-device", "cpu"]


def test_wherever_pip_has_put_nnunets_scripts(tmp_path, monkeypatch):
    """In a container or with ``--user`` they are not beside Python."""
    python = str(tmp_path / "python")
    monkeypatch.setattr(sys, "executable", python)
    words = of_this_python(["nnUNetv2_move_plans_between_datasets", "-h"], "cuda")
    monkeypatch.undo()
    assert words[0] == python
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=True)
    assert "usage: nnUNetv2_move_plans_between_datasets" in done.stdout


def test_commands_held_to_their_threads_are_nnunets():
    """All of them exist, and one is run: importing nnU-Net takes seconds."""
    for name in stock_commands.TAKE_EVERY_CORE:
        assert "nnunet_ssl.stock_commands" in of_this_python([name], "cpu")
        [entry] = metadata.entry_points(group="console_scripts", name=name)
        assert entry.value.startswith("nnunetv2.")
    words = of_this_python(["nnUNetv2_train", "-h"], "cpu")
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "usage: nnUNetv2_train " in done.stdout


# ------------------------------------------------------------------ commands that run

# A command that starts a worker, as nnU-Net does, and writes down who they are.
FAMILY = """
import os, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(sys.argv[1] + ".new", "w") as file:
    file.write(f"{os.getpid()} {worker.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""
PARENT = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that were started in the background ignore it
from nnunet_ssl.stock_commands import running
with running([sys.executable, "-c", {FAMILY!r}, sys.argv[1]]) as process:
    process.wait()
"""


def family(file: Path) -> list[psutil.Process]:
    """The command and its worker, once both are there."""
    until = time.time() + 60
    while not file.exists():
        assert time.time() < until
        time.sleep(0.02)
    return [psutil.Process(int(number)) for number in file.read_text().split()]


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    alive = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        process.kill()
    assert alive == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_command_and_its_workers_end_with_who_started_it(tmp_path, number):
    with subprocess.Popen([sys.executable, "-c", PARENT, tmp_path / "pids"], stderr=subprocess.DEVNULL) as parent:
        processes = family(tmp_path / "pids")
        parent.send_signal(number)
    assert_gone(processes)


def test_a_command_ends_with_its_block_and_from_another_thread(tmp_path):
    words = [sys.executable, "-c", FAMILY]
    with running([*words, str(tmp_path / "first")]):
        processes = family(tmp_path / "first")
    with running([*words, str(tmp_path / "second")]) as process:
        processes += family(tmp_path / "second")
        end(process)
        assert process.wait(20) != 0
    assert_gone(processes)


def test_a_command_that_is_told_to_end_takes_its_workers_along(tmp_path):
    """By its own number, as in a list of processes, it is the supervisor's that is shown first."""
    with running([sys.executable, "-c", FAMILY, str(tmp_path / "pids")]) as process:
        processes = family(tmp_path / "pids")
        process.terminate()
        assert process.wait(20) != 0
    assert_gone(processes)


def test_workers_of_a_command_that_was_killed_end_too(tmp_path):
    with running([sys.executable, "-c", FAMILY, str(tmp_path / "pids")]) as process:
        command, worker = family(tmp_path / "pids")
        command.kill()
        assert process.wait(20) == 128 + signal.SIGKILL
        assert_gone([worker])


@pytest.mark.parametrize(("code", "expected"), [("raise SystemExit(3)", 3), ("pass", 0), ("os.abort()", 128 + 6)])
def test_a_command_keeps_its_output_and_exit_code(code, expected):
    script = f"import os, sys; print(sys.stdin.read(), 'said', flush=True); {code}"
    with running([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.read().split() == ["said"]
        assert process.wait(20) == expected
