"""Who learns by which rule: optimizers, and how gradients reach them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

CLIP_NORM = 12  # nnU-Net's


class Optimizers(nnUNetTrainer):
    """nnU-Net's optimizer for the network, its twin for the modules that only training needs, and methods' own."""

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """nnU-Net's; its SGD on a GPU as one kernel, which reads by itself whether half precision overflowed."""
        optimizer, schedule = super().configure_optimizers()
        if self.device.type == "cuda" and type(optimizer) is torch.optim.SGD:
            optimizer = schedule.optimizer = fused(optimizer)
        return optimizer, schedule

    def _configure_training_optimizers(self) -> None:
        """The method's own optimizers; for the other modules that only training needs, nnU-Net's rule and schedule.

        Apart from the network's optimizer: what nnU-Net saves in its checkpoint stays what it saves for a plain
        trainer. (With half precision an overflow skips the step of the optimizer that it is in, not the others'.)
        Parameters marked ``no_weight_decay`` get none.
        """
        self.own_optimizers = self.build_own_optimizers()
        owned = {id(p) for optimizer in self.own_optimizers.values() for p in parameters_of(optimizer)}
        self.training_optimizer = self.training_lr_scheduler = None
        # without a teacher's, which follow and do not learn
        parameters = [p for p in self.training_modules.parameters() if p.requires_grad and id(p) not in owned]
        if not parameters:
            return
        network = self.network
        self.network = nn.ParameterList(p for p in parameters if not hasattr(p, "no_weight_decay"))
        try:
            self.training_optimizer, self.training_lr_scheduler = self.configure_optimizers()
        finally:
            self.network = network
        free = [p for p in parameters if hasattr(p, "no_weight_decay")]
        if free:
            self.training_optimizer.add_param_group({"params": free, "weight_decay": 0.0})

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        shared = [o for o in (self.optimizer, self.training_optimizer) if o is not None]
        return [*shared, *self.own_optimizers.values()]

    def _update(self) -> None:
        """Average over ranks, unscale, clip each module by itself as nnU-Net clips its network, step."""
        modules = [self.plans_network, *self.training_modules.values()]
        if self.is_ddp:
            average_gradients([p for module in modules for p in module.parameters()])
        # one without gradients in this step has nothing to do, and the scaler would not have it
        optimizers = [o for o in self._optimizers() if any(p.grad is not None for p in parameters_of(o))]
        if self.grad_scaler is not None:
            for optimizer in optimizers:
                self.grad_scaler.unscale_(optimizer)
        for module in modules:
            if parameters := list(module.parameters()):  # else torch warns
                torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        for optimizer in optimizers:
            if self.grad_scaler is None:
                optimizer.step()
            else:
                self.grad_scaler.step(optimizer)
        if self.grad_scaler is not None:
            self.grad_scaler.update()


def fused(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """The same optimizer, which steps by one kernel; it reads and writes the state of the plain one.

    Momentum begins at zero, before the first step, which is then the plain one's: torch would allocate it only, and
    where that step overflows the kernel writes nothing there.
    """
    plain = optimizer.defaults["fused"]
    one_kernel = torch.optim.SGD(
        [{**group, "fused": True} for group in optimizer.param_groups], **{**optimizer.defaults, "fused": True}
    )

    def begin_momentum(*_: Any) -> None:
        for parameter in parameters_of(one_kernel):
            if parameter.grad is not None and one_kernel.state[parameter].get("momentum_buffer") is None:
                one_kernel.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def stay_fused(*_: Any) -> None:
        for group in one_kernel.param_groups:
            group["fused"] = True

    def as_plain(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            group["fused"] = plain

    one_kernel.register_step_pre_hook(begin_momentum)
    one_kernel.register_load_state_dict_post_hook(stay_fused)
    one_kernel.register_state_dict_post_hook(as_plain)
    return one_kernel


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """What an optimizer moves."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def take_from_first_rank(module: nn.Module) -> None:
    """Make weights and buffers those of the first rank, in place, as DDP does it with nnU-Net's network."""
    for weights in module.state_dict().values():
        dist.broadcast(weights, src=0)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average gradients over the ranks, in one all-reduce for each dtype.

    By hand, once a step, rather than by DistributedDataParallel: a step has several forward and backward passes, and
    not every pass touches every parameter. Each rank has gradients for the same parameters, since each runs the same
    passes.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
