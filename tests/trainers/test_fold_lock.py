"""One process at a time works in a fold's folder, and it is free as soon as that process is gone."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers import base

NAME = "nnUNetTrainerLabeledOnly"


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, "the training ended"
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


def contents(folder: Path) -> dict[str, str]:
    """Digests of the files that a training would not want to lose."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith("training_log")
    }


def test_a_second_one_is_refused_and_a_killed_one_leaves_the_folder_free(
    tiny_copy, make_trainer, own_results, monkeypatch
):
    """Real workers: they inherit what the training has open, and must neither keep the lock nor live on."""
    monkeypatch.setattr(base, "PATIENCE", 0.1)
    dataset = tiny_copy()
    command = [Path(sys.executable).parent / "nnUNetv2_train", dataset.name, dataset.configuration, "0", "-tr", NAME]
    environment = {
        **os.environ,
        "nnUNet_n_proc_DA": "2",
        "PYTHONPATH": str(base.__file__).rpartition("/nnunet_ssl/")[0],
    }
    fold = own_results / dataset.name / f"{NAME}__nnUNetPlans__{dataset.configuration}" / "fold_0"
    with subprocess.Popen(
        [*map(str, command), "-device", "cpu"], env=environment, stdout=subprocess.DEVNULL
    ) as process:
        log = lambda: "".join(file.read_text() for file in fold.glob("training_log*"))  # noqa: E731
        wait_for(lambda: "Epoch 0" in log(), process)
        before = contents(fold)
        with pytest.raises(UserError, match=rf"another nnUNetv2_train works in {fold}"):
            make_trainer(NAME, dataset)
        assert contents(fold) == before

        workers = [w for w in psutil.Process(process.pid).children() if "nnUNetv2_train" in " ".join(w.cmdline())]
        assert len(workers) == 3  # two that make training batches, one for validation
        process.send_signal(signal.SIGKILL)  # the training alone, as for want of memory
        process.wait()
    monkeypatch.setattr(base, "PATIENCE", 10.0)
    make_trainer(NAME, dataset, initialize=False)
    _, alive = psutil.wait_procs(workers, timeout=10)
    alive = [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]
    for worker in alive:
        worker.kill()
    assert alive == []


def test_in_one_process_trainers_follow_each_other(tiny, make_trainer):
    first = make_trainer(NAME, tiny(), initialize=False)
    second = make_trainer(NAME, tiny(), initialize=False)
    assert first._fold_lock is second._fold_lock
    make_trainer(NAME, tiny(), fold=1, initialize=False)
