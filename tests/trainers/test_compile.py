"""torch.compile as nnU-Net uses it on a GPU; graphs are traced and run as they are, for inductor takes minutes here."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers.steps import a_batch, gradients


@pytest.mark.parametrize("passes", ["paired", "lean", "joint"])
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
