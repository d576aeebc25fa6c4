"""torch.compile as nnU-Net uses it on a GPU; graphs are traced and run as they are, for inductor takes minutes here."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers.steps import a_batch, gradients
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.mark.parametrize("passes", ["paired", "joint"])
def test_compiled_networks_give_the_same_gradients_and_plain_names(tiny, make_trainer, monkeypatch, passes):
    settings = {"passes": passes, "cps_rampup": 0.0, "shta_attach": "all"}
    plain = make_trainer("nnUNetTrainerSHTA_CPS", tiny(), settings=settings)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(type(plain), "_do_i_compile", lambda self: True)
    compiled = make_trainer("nnUNetTrainerSHTA_CPS", tiny(), settings=settings)
    assert isinstance(compiled.network, torch._dynamo.OptimizedModule)
    expected, found = (gradients(trainer, a_batch(trainer)) for trainer in (plain, compiled))
    assert expected.keys() == found.keys()  # no _orig_mod in any name
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None or not found[name].any()
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert compiled.plans_network.state_dict().keys() == plain.plans_network.state_dict().keys()
    for seed in range(2):  # further batches of the same shape
        assert compiled.train_step(a_batch(compiled, seed))["loss"].isfinite()
    compiled.on_validation_epoch_start()
    with torch.no_grad():
        compiled.validation_step(a_batch(compiled))


@pytest.mark.parametrize("kind", ["3d", "2d", "regions", "ignore"])
def test_compiled_losses_give_the_same_values_and_gradients(tiny, make_trainer, monkeypatch, kind):
    """nnU-Net's loss of all outputs and of one, and URPC's consistency: each is traced, and tells the same."""
    plain = make_trainer("nnUNetTrainerURPC", tiny(kind))
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))
    monkeypatch.setattr(type(plain), "_do_i_compile", lambda self: True)
    compiled = make_trainer("nnUNetTrainerURPC", tiny(kind))
    target = a_batch(plain)["target"]
    if kind == "ignore":
        for t in target:
            t[..., :3] = plain.label_manager.ignore_label
    logits = [torch.randn(len(t), plain.label_manager.num_segmentation_heads, *t.shape[2:]) for t in target]

    def all_outputs(trainer, x):
        return trainer.loss(x, target)

    def one_output(trainer, x):
        return trainer.full_resolution_loss(x[0], target[0])

    def consistency(trainer, x):
        return trainer.consistency(x, "mean_to_scale", False, kind == "regions")

    for loss in (all_outputs, one_output, consistency):
        torch._dynamo.reset()
        values, found, graphs.frame_count = [], [], 0
        for trainer in (plain, compiled):
            x = [scale.clone().requires_grad_() for scale in logits]
            value = loss(trainer, x)
            values.append(value)
            found.append(torch.autograd.grad(value, x, allow_unused=True, materialize_grads=True))
        assert graphs.frame_count > 0
        torch.testing.assert_close(values[1], values[0])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-8)


def test_the_loss_of_many_outputs_is_one_graph(tiny, make_trainer, monkeypatch):
    """nnU-Net's weights of the outputs are NumPy's numbers, on which the compiler cannot branch."""
    trainer = make_trainer("nnUNetTrainerLabeledOnly", tiny())
    monkeypatch.setattr(trainer, "_get_deep_supervision_scales", lambda: [[1 / s] * 3 for s in (1, 2, 4)])
    graphs = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))
    monkeypatch.setattr(type(trainer), "_do_i_compile", lambda self: True)
    loss = trainer._build_loss()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    target = [torch.zeros(2, 1, n, n, n) for n in (16, 8, 4)]
    loss([torch.randn(2, trainer.label_manager.num_segmentation_heads, *t.shape[2:]) for t in target], target)
    assert graphs.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_nothing_is_compiled_on_a_cpu(tiny, make_trainer, monkeypatch):
    """As nnU-Net has it, whatever its variable says."""
    monkeypatch.setenv("nnUNet_compile", "true")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    trainer = make_trainer("nnUNetTrainerURPC", tiny())
    assert trainer.train_step(a_batch(trainer))["loss"].isfinite()
