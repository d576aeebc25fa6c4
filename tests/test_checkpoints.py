"""Checkpoints are read whole, refused in a sentence, and run nothing."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.damage import RunsCode

from nnunet_ssl.checkpoints import TRUST, read_checkpoint
from nnunet_ssl.errors import UserError

NUMBERS = [np.float64(0.5), np.float32(2), np.float16(3), np.int64(4), np.bool_(True), np.uint8(5)]


@pytest.fixture(autouse=True)
def nobody_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRUST, raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """As nnU-Net writes it, with numpy's numbers in the log."""
    file = tmp_path / "checkpoint.pth"
    content = {"network_weights": {"w": torch.arange(1000.0)}, "logging": {"dice": NUMBERS}, "axes": (0, 1)}
    torch.save(content | {"init_args": {"device": torch.device("cuda:0")}}, file)
    return file


def test_weights_log_and_device_are_read(file: Path) -> None:
    content = read_checkpoint(file, "", {"network_weights": dict, "logging": dict})
    assert torch.equal(content["network_weights"]["w"], torch.arange(1000.0))
    assert content["logging"]["dice"] == NUMBERS
    assert content["init_args"]["device"] == torch.device("cuda:0")


def test_numbers_of_the_other_numpy_are_read(file: Path) -> None:
    """numpy 1 and 2 name their function differently in a pickle."""
    import zipfile

    here, there = ("_core", "core") if np.__version__ >= "2" else ("core", "_core")
    other = file.with_name("other.pth")
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content.replace(f"numpy.{here}.multi".encode(), f"numpy.{there}.multi".encode()))
            assert name.endswith("data.pkl") is not (content.count(b"multiarray") == 0)
    assert read_checkpoint(other, "")["logging"]["dice"] == NUMBERS


def test_nothing_is_run_unless_the_user_says_so(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = file.with_name("ran")
    torch.save({"network_weights": {}, "further": RunsCode(ran)}, file)
    with pytest.raises(UserError, match=f"{file} calls .*exec .*If you trust .* set {TRUST}=1"):
        read_checkpoint(file, "")
    assert not ran.exists()
    monkeypatch.setenv(TRUST, "1")
    assert read_checkpoint(file, "")["network_weights"] == {}
    assert ran.exists()


@pytest.mark.parametrize("length", [0, 1, 100, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_named(file: Path, length: float) -> None:
    os.truncate(file, int(length * file.stat().st_size) if length < 1 else int(length))
    says = "is empty" if length == 0 else "is cut off, damaged or no checkpoint at all"
    with pytest.raises(UserError, match=f"{file} {says}. Restore it.$"):
        read_checkpoint(file, "Restore it.")


@pytest.mark.parametrize("content", [[1, 2], {}, {"network_weights": [1]}, torch.ones(3), None], ids=str)
def test_something_else_is_named(file: Path, content: object) -> None:
    torch.save(content, file)
    with pytest.raises(UserError, match=f"{file} is no checkpoint of a training: it has no 'network_weights'. Restore"):
        read_checkpoint(file, "Restore it.", {"network_weights": dict})


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    for file, why in ((tmp_path, "Is a directory"), (tmp_path / "none.pth", "No such file or directory")):
        with pytest.raises(UserError, match=f"{file} cannot be read .{why}.. Restore it."):
            read_checkpoint(file, "Restore it.")


def test_any_damage_is_one_sentence(file: Path) -> None:
    whole = file.read_bytes()
    rng = np.random.RandomState(0)
    for _ in range(100):
        damaged = bytearray(whole)
        for place in rng.randint(0, 900, 3):
            damaged[place] = rng.randint(256)
        file.write_bytes(damaged)
        with contextlib.suppress(UserError):  # and nothing else
            read_checkpoint(file, "Restore it.", {"network_weights": dict})
