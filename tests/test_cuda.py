"""On a GPU: every trainer trains in half precision with compiled networks, and its steps wait for nothing.

    make test-slow TESTS="tests/test_cuda.py" PARALLEL="-n 8"

Skipped without a GPU. The other tests run on the CPU whether there is one or not, but for those that say ``cuda``.
"""

from __future__ import annotations

import csv
import math
import re

import pytest
import torch
from helpers.runs import weights

from nnunet_ssl.trainers import TRAINERS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
COMPILED = {"nnUNet_compile": "t", "TORCH_LOGS": "graph_breaks,recompiles"}


@pytest.mark.parametrize("name", TRAINERS)
def test_trains_with_amp_and_compiled(tiny_copy, run_nnunet, name):
    """Two epochs by nnU-Net's command: every value is a number, and every graph is whole."""
    dataset = tiny_copy()
    job = [dataset.id, dataset.configuration, 0, "-tr", f"{name}_2epochs", "-device", "cuda"]
    printed = run_nnunet("nnUNetv2_train", *job, env=COMPILED, settings={"num_iterations_per_epoch": 4})
    fold = next(dataset.folders.results.glob(f"{dataset.name}/{name}_2epochs__*/fold_0"))
    assert "Using torch.compile" in printed.stdout
    assert not re.findall(r".*[Gg]raph break.*", printed.stderr)
    print(*re.findall(r".*Recompiling.*", printed.stderr), sep="\n")  # to look at: a few for other shapes are right
    with open(fold / "ssl_log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    values = {(row["epoch"], term): float(value) for row in rows for term, value in row.items() if value}
    assert all(math.isfinite(value) for value in values.values()), values
    assert all(w.isfinite().all() for w in weights(fold).values() if w.is_floating_point())


@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_waits_for_nothing(tiny, make_trainer, name):
    """Once under way, no step asks the GPU for a value: CUDA itself would say so."""
    trainer = make_trainer(name, tiny(), device="cuda", settings={"num_iterations_per_epoch": 40})
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    for _ in range(25):  # some methods look at their sums every 20 steps
        trainer.train_step(next(trainer.dataloader_train))
    batches = [next(trainer.dataloader_train) for _ in range(2)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
