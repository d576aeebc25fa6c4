"""The step: what is trained, what it costs nothing to leave out, and that lean and joint passes agree."""

from __future__ import annotations

import pytest
import torch

TRAINERS = ["nnUNetTrainerLabeledOnly", "nnUNetTrainerCPS", "nnUNetTrainerSHTA_CPS"]


def a_batch(trainer, seed=0):
    """A random batch with every class, in the form in which the loader gives it."""
    rng = torch.Generator().manual_seed(seed)
    patch = trainer.configuration_manager.patch_size
    shape = (trainer.batch_size, trainer.num_input_channels, *patch)
    labels = torch.randint(0, trainer.label_manager.num_segmentation_heads, (trainer.batch_size, 1, *patch), generator=rng)
    scales = trainer._get_deep_supervision_scales()
    target = [
        torch.nn.functional.interpolate(labels.float(), size=[round(n * s) for n, s in zip(patch, scale, strict=True)]).to(
            torch.int16
        )
        for scale in scales
    ]
    return {
        "data": torch.randn(shape, generator=rng),
        "target": target,
        "unlabeled": torch.randn(shape, generator=rng),
    }


def parameters(trainer):
    named = dict(trainer.plans_network.named_parameters())
    return named | {f"training.{n}": p for n, p in trainer.training_modules.named_parameters()}


@pytest.mark.parametrize("kind", ["3d", "2d"])
@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_moves_every_parameter(tiny, make_trainer, name, kind):
    trainer = make_trainer(name, tiny(kind), settings={"cps_rampup": 0.0} if "CPS" in name else {})
    before = {n: p.detach().clone() for n, p in parameters(trainer).items()}
    loss = trainer.train_step(a_batch(trainer))["loss"]
    assert loss.isfinite()
    lowest = trainer.plans_network.decoder.seg_layers[0]  # nnU-Net gives the lowest resolution no weight
    still = [n for n, p in parameters(trainer).items() if torch.equal(p, before[n])]
    assert all("seg_layers.0." in n for n in still), still
    assert lowest is not None


def gradients(trainer, batch):
    """The gradients of one step, before clipping, by parameter."""
    trainer._update = lambda: None
    trainer.train_step(batch)
    return {n: p.grad for n, p in parameters(trainer).items()}


@pytest.mark.parametrize("settings", [{}, {"cps_on_labeled": False}, {"preset": "paper"}, {"shta_attach": "all"}])
def test_lean_and_joint_passes_give_the_same_gradients(tiny, make_trainer, settings):
    settings = {"cps_rampup": 0.0, **settings}
    lean, joint = (
        gradients(trainer, a_batch(trainer))
        for trainer in (
            make_trainer("nnUNetTrainerSHTA_CPS", tiny(), settings={**settings, "passes": passes})
            for passes in ("lean", "joint")
        )
    )
    assert lean.keys() == joint.keys()
    assert any(g is not None and g.abs().max() > 0 for n, g in lean.items() if "second" in n)
    for name in lean:
        torch.testing.assert_close(lean[name], joint[name], rtol=1e-4, atol=1e-6, msg=name)
