"""The teacher of every mean-teacher method: an exponential moving average of the student."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def noisy(images: Tensor, sigma: float) -> Tensor:
    """The images of any shape with Gaussian noise, cut at twice its standard deviation: what a teacher is shown."""
    return images + (sigma * torch.randn_like(images)).clamp(-2 * sigma, 2 * sigma)


class EMATeacher(nn.Module):
    """A copy of a network whose weights follow it: ``teacher = a teacher + (1 - a) student`` after each step.

    ``a = min(1 - 1 / (step + 1), decay)``, so after the first step (number 0) the teacher is the student, and the first
    ``1 / (1 - decay)`` steps weigh alike. Parameters are averaged; buffers, which are batch norm's running statistics
    where there are any, are copied, for they are averages already. The copy gives the full resolution alone, also where
    the student has deep supervision. It never gives or takes a gradient. Its mode follows ``train()``, as any module's.

    (torch's ``AveragedModel`` counts the steps on the device and asks it at each of them, so a GPU would wait.)

    Source: Tarvainen and Valpola, "Mean teachers are better role models" (NeurIPS 2017), Eq. 1 and its warm-up.

    Args:
        student: the network that is followed, neither compiled nor tapped. Its weights may still change before the
            first step (``-pretrained_weights``): see :meth:`start`.
        decay: the largest a, in [0, 1).
    """

    def __init__(self, student: nn.Module, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.network = copy.deepcopy(student).requires_grad_(False)
        for module in self.network.modules():
            if hasattr(module, "deep_supervision"):
                module.deep_supervision = False  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """The teacher's full-resolution output, without gradient: ``[B, C, *spatial]`` -> ``[B, K, *spatial]``."""
        with torch.no_grad():
            return self.network(x)

    def start(self, student: nn.Module) -> None:
        """Take the student's weights as they are; call it at the first step, when they are final."""
        self.update(student, 0)

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """Follow the student.

        Args:
            student: the network that was given to the constructor.
            step: number of the step that the student has just made, from 0.
        """
        average = get_ema_multi_avg_fn(min(1 - 1 / (step + 1), self.decay))
        average(list(self.network.parameters()), list(student.parameters()), None)
        for own, its in zip(self.network.buffers(), student.buffers(), strict=True):
            own.copy_(its)
