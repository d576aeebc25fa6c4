"""The method that CONTRIBUTING.md shows trains as it stands there."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nnunet_ssl import trainers

PAGE = Path(__file__).resolve().parent.parent / "CONTRIBUTING.md"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> type:
    """The class on the page, as a trainer of the package."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    module = ModuleType("nnunet_ssl.trainers.example")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(code, str(PAGE), "exec"), vars(module))
    monkeypatch.setattr(trainers, "nnUNetTrainerEntropy", module.nnUNetTrainerEntropy, raising=False)
    return module.nnUNetTrainerEntropy


def test_the_example_learns_from_both_streams(example: type, tiny: Callable, make_trainer: Callable) -> None:
    weights = {}
    for weight in (0.0, 1.0):
        trainer = make_trainer(
            "nnUNetTrainerEntropy", tiny("3d"), settings={"entropy_weight": weight, "entropy_rampup": 0.0}
        )
        assert isinstance(trainer, example)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        step = trainer.train_step(next(trainer.dataloader_train))
        assert torch.isfinite(step["loss"])
        weights[weight] = torch.cat([p.detach().flatten() for p in trainer.network.parameters()])
        assert {"loss_sup", "loss_entropy", "weight_entropy"} <= set(trainer._mean_values())
    assert not torch.equal(weights[0.0], weights[1.0])
