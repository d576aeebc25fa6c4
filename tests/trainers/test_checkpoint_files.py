"""Checkpoints that cannot be written or read: a sentence, and nothing lost."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.damage import RunsCode
from helpers.runs import NAME, resumed, train

from nnunet_ssl.errors import UserError

LABELED_ONLY = "nnUNetTrainerLabeledOnly_3epochs"


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    resource = pytest.importorskip("resource", reason="limits of POSIX")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files but nnU-Net's logs."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if file.is_file() and not file.name.startswith("training_log")
    }


@pytest.fixture
def running(tiny, make_trainer):
    """``running(name)``: a trainer within its second epoch, and its folder with the checkpoint of the first."""

    def make(name):
        trainer = make_trainer(name, tiny(), settings={"save_every": 1})
        train(trainer, until=1)
        trainer.train_step(next(trainer.dataloader_train))  # other weights than those that were saved
        return trainer, Path(trainer.output_folder)

    return make


@pytest.mark.parametrize(
    ("name", "too_large"),
    [(NAME, "checkpoint_latest_ssl.pth.new"), (LABELED_ONLY, "checkpoint_latest.pth")],
    ids=["the state", "the checkpoint"],
)
def test_without_room_the_last_checkpoint_stays_and_can_be_continued(running, make_trainer, tiny, name, too_large):
    trainer, folder = running(name)
    before = contents(folder)
    limit = (folder / too_large.removesuffix(".new")).stat().st_size - 1000
    with (
        file_size_limit(limit),
        pytest.raises(
            UserError, match=rf"{folder / too_large} cannot be written \(File too large\)\. The last .* is kept: .*--c"
        ),
    ):
        trainer.save_checkpoint(str(folder / "checkpoint_latest.pth"))
    assert contents(folder) == before
    again = resumed(make_trainer, tiny, folder, name)
    again.on_train_start()
    assert again.current_epoch == 1


def test_a_full_disk(running, tmp_path):
    """A real one, where whoever tests may mount it."""
    trainer, folder = running(LABELED_ONLY)
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(file.stat().st_size for file in folder.glob("checkpoint_*.pth")) * 3 // 2
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        for file in folder.glob("checkpoint_latest*.pth"):
            (disk / file.name).write_bytes(file.read_bytes())
        before = contents(disk)
        (disk / "ballast").write_bytes(bytes(size - sum(file.stat().st_size for file in disk.iterdir()) - 50_000))
        with pytest.raises(UserError, match=r"checkpoint_latest\.pth cannot be written \(No space left on device\)"):
            trainer.save_checkpoint(str(disk / "checkpoint_latest.pth"))
        assert contents(disk) == {**before, "ballast": contents(disk)["ballast"]}
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.usefixtures("curves")
@pytest.mark.parametrize("what", ["ssl_log.csv", "progress.png"])
def test_without_room_for_a_table_or_curves_it_says_so(running, make_trainer, tiny, what, monkeypatch):
    trainer, folder = running(LABELED_ONLY)
    trainer.on_train_epoch_end([{"loss": torch.zeros(())}])
    with torch.no_grad():
        trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    file = folder / what
    if what == "progress.png":
        file.unlink()
        file.mkdir()  # nnU-Net writes it itself
        message = rf"{file} cannot be written"
    else:
        monkeypatch.setattr(trainer.ssl_log, "csv_file", str(folder / "no_such_folder" / what))
        message = rf"{what} cannot be found or written"
    with pytest.raises(UserError, match=rf"{message} .*The last checkpoint is kept"):
        trainer.on_epoch_end()
    resumed(make_trainer, tiny, folder, LABELED_ONLY).on_train_start()


def spoil(file: Path, how: str) -> None:
    if how == "empty":
        file.write_bytes(b"")
    elif how == "cut off":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "a folder":
        file.unlink()
        file.mkdir()
    elif how == "a list":
        torch.save([1, 2], file)
    elif how == "no optimizer":
        checkpoint = torch.load(file, weights_only=False)
        del checkpoint["optimizer_state"]
        torch.save(checkpoint, file)
    elif how == "another network":
        checkpoint = torch.load(file, weights_only=False)
        checkpoint["network_weights"] = {"weight": torch.zeros(3)}
        torch.save(checkpoint, file)
    elif how == "another optimizer":
        checkpoint = torch.load(file, weights_only=False)
        checkpoint["optimizer_state"]["param_groups"] = []
        torch.save(checkpoint, file)
    else:
        torch.save({"network_weights": RunsCode(file.parent / "was_here")}, file)


@pytest.mark.parametrize(
    "how",
    ["empty", "cut off", "a folder", "a list", "no optimizer", "another network", "another optimizer", "runs code"],
)
def test_a_checkpoint_that_is_none_is_a_sentence(running, make_trainer, tiny, how):
    _, folder = running(LABELED_ONLY)
    file = folder / "checkpoint_latest.pth"
    spoil(file, how)
    before = contents(folder)
    with pytest.raises(UserError, match=rf"^nnunet_ssl: {file} .*(--c|trust)") as refused:
        resumed(make_trainer, tiny, folder, LABELED_ONLY)
    assert len(str(refused.value).splitlines()) == 1
    assert contents(folder) == before  # so no code was run


@pytest.mark.parametrize("missing", ["modules", "optimizer", "method"])
def test_a_training_state_of_something_else_is_a_sentence(running, make_trainer, tiny, missing):
    _, folder = running(NAME)
    file = folder / "checkpoint_latest_ssl.pth"
    state = torch.load(file, weights_only=True)
    if missing == "modules":
        state["modules"].popitem()
    else:
        del state[missing]
    torch.save(state, file)
    with pytest.raises(UserError, match=rf"{file} is not one of {NAME} .*-pretrained_weights"):
        resumed(make_trainer, tiny, folder).on_train_start()


def test_what_is_written_is_read_by_plain_torch(tmp_path):
    from nnunet_ssl.checkpoints import save_whole

    shared = torch.arange(6.0)
    save_whole({"a": shared, "b": shared[2:]}, tmp_path / "x.pth")
    read = torch.load(tmp_path / "x.pth", weights_only=True)
    assert read["b"].data_ptr() == read["a"].data_ptr() + 8
    assert os.listdir(tmp_path) == ["x.pth"]
