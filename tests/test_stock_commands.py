"""nnU-Net's commands as child processes: the right Python, and as many threads as they are given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_ssl import stock_commands
from nnunet_ssl.errors import UserError
from nnunet_ssl.stock_commands import of_this_python


def test_every_command_is_this_environments():
    assert of_this_python(["python", "a.py"], "cuda") == [sys.executable, "a.py"]
    assert of_this_python(["nnUNetv2_ssl_split", "-d", "4"], "cpu") == [
        sys.executable, "-m", "nnunet_ssl.commands.split", "-d", "4",
    ]  # fmt: skip
    program, *rest = of_this_python(["nnUNetv2_train", "4"], "cuda")
    assert Path(program).parent == Path(sys.executable).parent
    assert rest == ["4"]
    with pytest.raises(UserError, match="nnUNetv2_no_such does not exist"):
        of_this_python(["nnUNetv2_no_such"], "cpu")


@pytest.mark.parametrize(("given", "expected"), [("1", 1), ("3,2", 3), ("0", os.cpu_count()), (None, os.cpu_count())])
def test_threads_on_the_cpu(tmp_path, monkeypatch, given, expected):
    """nnU-Net asks multiprocessing for the number of cores, and gives torch as many threads."""
    (tmp_path / "probe.py").write_text(
        "import multiprocessing, sys\ndef main(): print(multiprocessing.cpu_count(), *sys.argv[1:])\n"
    )
    monkeypatch.setitem(stock_commands.ENTRY_POINTS, "nnUNetv2_train", "probe:main")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": given or ""}
    words = of_this_python(["nnUNetv2_train", "4", "-device", "cpu"], "cpu")
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(expected), "4", "-device", "cpu"]


def test_the_entry_points_are_nnunets():
    from importlib.metadata import entry_points

    known = {point.name: point.value for point in entry_points(group="console_scripts")}
    assert {name: known[name] for name in stock_commands.ENTRY_POINTS} == stock_commands.ENTRY_POINTS
