"""SASNet in training: what learns from what, what each part's absence costs, validation of the branches, export."""

from __future__ import annotations

import pytest
import torch

NAME = "nnUNetTrainerSASNet"


def stepped(trainer, steps=1):
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return [trainer.train_step(next(trainer.dataloader_train)) for _ in range(steps)]


@pytest.mark.parametrize("kind", ["3d", "2d", "anisotropic", "multichannel", "resenc", "ignore"])
def test_a_step_moves_every_parameter(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind), settings={"sasnet_rampup": 0.0})
    parameters = dict(trainer.plans_network.named_parameters()) | dict(trainer.training_modules.named_parameters())
    before = {n: p.detach().clone() for n, p in parameters.items()}
    assert all(out["loss"].isfinite() for out in stepped(trainer, 2))  # a residual block starts to learn in the second
    still = [n for n, p in parameters.items() if torch.equal(p, before[n])]
    assert all(n.startswith("decoder.seg_layers.0.") for n in still), still  # nnU-Net gives it no weight
