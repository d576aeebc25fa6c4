"""An adversary that judges: gradients flow through it and it takes none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_ssl.networks.frozen import frozen


def test_what_it_is_shown_learns_and_it_does_not():
    module = nn.Linear(3, 1)
    module.bias.requires_grad_(False)
    shown = torch.randn(2, 3, requires_grad=True)
    with frozen(module):
        judged = module(shown).sum()
    (judged + module(shown.detach()).sum() * 0).backward()  # the backward may come after
    torch.testing.assert_close(shown.grad, module.weight.detach().expand(2, 3))
    assert not module.weight.grad.any()
    assert not module.bias.requires_grad


def test_it_learns_again_whatever_happens():
    module = nn.Linear(3, 1)
    with pytest.raises(ValueError, match="inside"), frozen(module):
        raise ValueError("inside")
    assert all(p.requires_grad for p in module.parameters())
