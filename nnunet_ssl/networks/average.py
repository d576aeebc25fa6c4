"""The average of a network's weights over the last part of a training, to predict with in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage(nn.Module):
    """A running average of a network's parameters, which can change places with them.

    ``average = a average + (1 - a) weights`` after each step, with ``1 - a = min(1, 1 / (share (step + 1)))``: it spans
    the last ``share`` of the steps made so far, be they 5,000 or 250,000, and where it starts is forgotten. In the
    long run step i weighs as ``i ** (1 / share - 1)``; for the first ``1 / share`` steps it is the network itself, and
    with ``share`` 1 it is the mean of all steps.

    The two change places in the network's own tensors, so anything that holds the network (an optimizer, a compiled or
    distributed wrapper) need not know. Buffers, which are batch norm's running statistics where there are any, are
    averages already and stay as they are.

    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (CVPR 2024), section 3.1,
    with gamma = 1 / share - 1 and their decay to first order in 1 / step.

    Args:
        network: the network, with the weights that training begins with.
        share: of the steps so far, above 0 and at most 1.

    Attributes:
        in_network: whether the average is in the network, and the weights that train here. So it is in a checkpoint.
    """

    def __init__(self, network: nn.Module, share: float) -> None:
        super().__init__()
        self.share = share
        self.other = nn.ParameterList(
            nn.Parameter(p.detach().clone(), requires_grad=False) for p in network.parameters()
        )
        self.in_network = False

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Follow the network, whose step number ``step``, from 0, has just been made. Nothing waits for a device."""
        average = get_ema_multi_avg_fn(1 - min(1.0, 1 / (self.share * (step + 1))))
        average(list(self.other), list(network.parameters()), None)

    @torch.no_grad()
    def exchange(self, network: nn.Module, in_network: bool) -> None:
        """Have the average in the network, or the weights that train."""
        if in_network == self.in_network:
            return
        for own, its in zip(self.other, network.parameters(), strict=True):
            held = its.clone()
            its.copy_(own)
            own.copy_(held)
        self.in_network = in_network

    @contextmanager
    def predicting(self, network: nn.Module) -> Iterator[None]:
        """A context with the average in the network; before and after, it may be on either side."""
        before = self.in_network
        self.exchange(network, True)
        try:
            yield
        finally:
            self.exchange(network, before)
