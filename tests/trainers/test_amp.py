"""Half precision as on a GPU: autocast and a GradScaler, here with bfloat16 on the CPU, for every trainer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from nnunet_ssl.trainers import TRAINERS

CASES = [(name, {}) for name in TRAINERS] + [
    ("nnUNetTrainerMagicNet", {"magicnet_cubes": [1, 1, 1]}),  # no module learns but the network
    ("nnUNetTrainerCPS", {"passes": "lean"}),
    ("nnUNetTrainerURPC", {"urpc_dropout": [0.5, 0.5]}),
    ("nnUNetTrainerAUSS", {"auss_share": 0.75}),  # else the autoencoder is frozen by then
]


@pytest.mark.parametrize(("asked", "supported"), [(True, True), (True, False), (False, False)])
def test_a_cpu_that_only_emulates_bfloat16_is_named(tiny, make_trainer, monkeypatch, asked, supported):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    trainer = make_trainer("nnUNetTrainerLabeledOnly", tiny(), settings={"cpu_bfloat16": asked})
    trainer.on_train_start()
    log = Path(trainer.log_file).read_text()
    assert ("no instructions for bfloat16" in log) == (asked and not supported)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_steps_in_half_precision_with_a_scaler(tiny, make_trainer, name, settings):
    trainer = make_trainer(name, tiny(), settings={**settings, "cpu_bfloat16": True})
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.global_step = trainer.total_steps // 2
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = {n: p.detach().clone() for n, p in trainer.plans_network.named_parameters()}
    modules = {n: copy.deepcopy(m.state_dict()) for n, m in trainer.training_modules.items()}
    for _ in range(2):
        loss = trainer.train_step(next(trainer.dataloader_train))["loss"]
        assert loss.dtype == torch.float32
        assert loss.isfinite()
    assert trainer.grad_scaler.get_scale() == 2.0**10  # nothing overflowed
    moved = [n for n, p in trainer.plans_network.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) > 0.8 * len(before)
    assert all(p.isfinite().all() for p in trainer.training_modules.parameters())
    for name, state in modules.items():  # a second network, a branch
        module = trainer.training_modules[name]
        now = module.state_dict()
        moved = [key for key, value in state.items() if not torch.equal(value, now[key])]
        assert moved or not state or not module.training, name
