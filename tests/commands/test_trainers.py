"""``nnUNetv2_ssl_trainers``: the list, and what ``--check`` finds wrong with an installation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_ssl import trainers
from nnunet_ssl._startup import EXT_FOLDER, VARIABLE
from nnunet_ssl.commands import trainers as command

IMPOSTOR = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

class nnUNetTrainerLabeledOnly(nnUNetTrainer):
    pass
"""


@pytest.fixture
def good_installation(fresh_folders: object, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Three folders, and a search for trainers that is known to work: the tests that follow break one thing each."""
    monkeypatch.setattr(command, "check_discovery", lambda: command.Finding("ok", "found"))
    return monkeypatch


def levels(printed: str) -> dict[str, list[str]]:
    """The lines of ``--check`` by level; every line starts with one."""
    found: dict[str, list[str]] = {"ok": [], "note": [], "WRONG": []}
    for line in printed.strip().splitlines():
        level, _, text = line.partition(" ")
        found[level].append(text.strip())
    return found


def test_list_has_a_line_with_the_paper_for_each_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    command.main([])
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in lines] == list(trainers.TRAINERS)
    for line, name in zip(lines, trainers.TRAINERS, strict=True):
        trainer = getattr(trainers, name)
        assert trainer.paper
        assert line.endswith(f"[{trainer.paper}]")
        assert trainer.__doc__.strip().split("\n")[0] in line


def test_check_is_content(good_installation: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--check"])
    found = levels(capsys.readouterr().out)
    assert not found["WRONG"]
    assert [line.partition("=")[0] for line in found["ok"][2:5]] == list(command.FOLDERS)


def wrong_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What ``--check`` finds wrong, when it ends with exit code 1 as it then must."""
    with pytest.raises(SystemExit) as end:
        command.main(["--check"])
    assert end.value.code == 1
    return levels(capsys.readouterr().out)["WRONG"]


@pytest.mark.parametrize("variable", command.FOLDERS)
@pytest.mark.parametrize("state", ["unset", "missing", "a file"])
def test_check_names_the_folder_that_is_wrong(
    good_installation: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, variable: str, state: str
) -> None:
    value = str(tmp_path / "somewhere")
    if state == "unset":
        good_installation.delenv(variable)
    else:
        good_installation.setenv(variable, value)
        if state == "a file":
            Path(value).write_text("")
    (line,) = wrong_lines(capsys)
    assert line.startswith(variable)
    assert (value in line) == (state != "unset")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that nobody can write to")
def test_check_sees_a_folder_that_cannot_be_written_to(
    good_installation: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good_installation.setenv("nnUNet_results", "/proc/self")
    (line,) = wrong_lines(capsys)
    assert line.startswith("nnUNet_results=/proc/self cannot be written to")
    good_installation.setenv("nnUNet_raw", "/proc/self")  # a read-only archive is no reason not to train
    assert len(wrong_lines(capsys)) == 1


@pytest.mark.parametrize(
    ("version", "level"),
    [("2.7.9", "WRONG"), ("2.8.0", "ok"), ("2.8.1", "ok"), ("2.8.10.dev3", "ok"), ("2.9", "WRONG"), ("3.0.1", "WRONG")],
)
def test_check_of_nnunets_version(monkeypatch: pytest.MonkeyPatch, version: str, level: str) -> None:
    monkeypatch.setattr(command.metadata, "version", lambda name: version)
    finding = command.check_nnunet()
    assert finding.level == level
    assert version in finding.text
    assert ("pip install" in finding.text) == (level == "WRONG")


def test_check_of_an_nnunet_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise command.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(command.metadata, "version", missing)
    assert command.check_nnunet().level == "WRONG"


@pytest.mark.parametrize(("version", "told"), [("0.25.2", "0.25.2"), (None, "is missing")])
def test_check_of_what_else_is_needed(monkeypatch: pytest.MonkeyPatch, version: str | None, told: str) -> None:
    """Whoever upgraded nnU-Net alone may have kept an older one."""
    assert command.check_requirements().level == "ok"
    found = command.metadata.version

    def other(name: str) -> str:
        if name != "batchgenerators":
            return found(name)
        if version is None:
            raise command.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(command.metadata, "version", other)
    finding = command.check_requirements()
    assert finding.level == "WRONG"
    assert f"batchgenerators {told}" in finding.text
    assert "pip install 'batchgenerators>=0.25.3'" in finding.text


def test_check_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = command.check_gpu()
    assert finding.level == "note"
    assert "-device cpu" in finding.text


def test_check_of_a_torch_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    finding = command.check_gpu()
    assert finding.level == "WRONG"
    assert "pip install torch" in finding.text


def run_isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the look-up's new process ignore what pip installed for the start of Python, as ``python -S`` would."""
    run = subprocess.run
    paths = os.pathsep.join(path for path in sys.path if path)

    def without_site(arguments: list[str], env: dict[str, str], **options: object) -> subprocess.CompletedProcess:
        return run([arguments[0], "-S", *arguments[1:]], env={**env, "PYTHONPATH": paths}, **options)

    monkeypatch.setattr(command.subprocess, "run", without_site)


def test_discovery_is_wrong_where_the_startup_files_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry that this process inherited must not hide that a new Python would not have it."""
    run_isolated(monkeypatch)
    monkeypatch.setenv(VARIABLE, EXT_FOLDER)
    finding = command.check_discovery()
    assert finding.level == "WRONG"
    assert f"{VARIABLE}={EXT_FOLDER}" in finding.text


@pytest.mark.slow
def test_discovery_is_wrong_where_another_trainer_has_the_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_isolated(monkeypatch)
    (tmp_path / "impostor.py").write_text(IMPOSTOR)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    finding = command.check_discovery()
    assert finding.level == "WRONG"
    assert "impostor" in finding.text


@pytest.mark.slow
def test_the_command_itself(run_nnunet: Callable) -> None:
    assert "nnUNetTrainerSHTA_CPS " in run_nnunet("nnUNetv2_ssl_trainers").stdout
