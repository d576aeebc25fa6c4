"""Steps of a trainer in this process, on one rank and on two."""

from __future__ import annotations

import dataclasses
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from helpers.datasets import TinyDataset
from nnunet_ssl.trainers import TRAINERS


def a_batch(trainer, seed=0):
    """A random batch with every class, in the form in which the loader gives it."""
    rng = torch.Generator().manual_seed(seed)
    patch = trainer.configuration_manager.patch_size
    shape = (trainer.batch_size, trainer.num_input_channels, *patch)
    heads, regions = trainer.label_manager.num_segmentation_heads, trainer.label_manager.has_regions
    labels = torch.randint(
        0, 2 if regions else heads, (trainer.batch_size, heads if regions else 1, *patch), generator=rng
    )
    scales = trainer._get_deep_supervision_scales()
    target = [
        torch.nn.functional.interpolate(
            labels.float(), size=[round(n * s) for n, s in zip(patch, scale, strict=True)]
        ).to(torch.int16)
        for scale in scales
    ]
    return {
        "data": torch.randn(shape, generator=rng),
        "target": target,
        "unlabeled": torch.randn(shape, generator=rng),
    }


@dataclasses.dataclass(frozen=True)
class WithStages(TinyDataset):
    """A tiny dataset whose plans have a network of another depth, as far as its patches allow it."""

    stages: int = 3

    @property
    def plans(self):
        """The plans of the dataset without its deepest stages, or with more like them; a fifth does not pool."""
        plans = super().plans
        kwargs = plans["configurations"][self.configuration]["architecture"]["arch_kwargs"]
        depth, kwargs["n_stages"] = kwargs["n_stages"], self.stages
        for key, value in kwargs.items():
            if isinstance(value, list):
                of_decoder = 1 if len(value) < depth else 0
                kwargs[key] = (value + value[-1:] * self.stages)[: self.stages - of_decoder]
        kwargs["strides"][4:] = [[1] * len(stride) for stride in kwargs["strides"][4:]]
        return plans


def with_stages(dataset, stages):
    """The dataset, with plans of a network of so many stages."""
    return WithStages(*(getattr(dataset, field.name) for field in dataclasses.fields(dataset)), stages)


def parameters(trainer):
    """What trains: the network that predicts, and what only training needs."""
    named = dict(trainer.plans_network.named_parameters())
    return named | {f"training.{n}": p for n, p in trainer.training_modules.named_parameters()}


def gradients(trainer, batch):
    """The gradients of one step, before clipping, by parameter."""
    trainer._update = lambda: None
    trainer.train_step(batch)
    return {n: p.grad for n, p in parameters(trainer).items()}


def gradients_by_passes(make, orders=("lean", "joint")):
    """Order of passes -> the gradients of one step of ``make(order)``, each from the same random numbers."""
    found = {}
    for order in orders:
        trainer = make(order)
        torch.manual_seed(0)
        found[order] = gradients(trainer, a_batch(trainer))
    return found


def who_learns(trainer, part):
    """Term -> parts, by ``part(name of a parameter)``, that have a gradient of that term which is not 0."""
    learns = {}
    for terms in trainer.losses(trainer._to_device(a_batch(trainer))):
        for name, term in terms.items():
            for p in parameters(trainer).values():
                p.grad = None
            term.backward(retain_graph=True)
            learns[name] = {part(n) for n, p in parameters(trainer).items() if p.grad is not None and p.grad.any()}
    return learns


def at_step(trainer, step):
    """A trainer at a later step, whose teacher has fallen behind its student."""
    trainer.global_step = step
    with torch.no_grad():
        for parameter in trainer.plans_network.parameters():
            parameter.mul_(1.3)
    return trainer


def stepped(trainer, steps: int = 2):
    """The weights after so many steps on the loaders' batches."""
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    for _ in range(steps):
        assert trainer.train_step(next(trainer.dataloader_train))["loss"].isfinite()
    return dict(trainer.plans_network.named_parameters()) | dict(trainer.training_modules.named_parameters("training"))


def _in_group(rank, folder, work, *arguments):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(work(rank, *arguments), os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


def on_two_ranks(folder, work, *arguments):
    """What ``work(rank, *arguments)`` gives on each of two ranks."""
    mp.start_processes(_in_group, (str(folder), work, *arguments), nprocs=2, start_method="fork")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def half_a_step(rank, trainer, batch):
    """The step of one of two ranks, with its half of the batch: new weights, buffers, loss, logged values."""
    trainer.is_ddp = True
    wrapped = nn.parallel.DistributedDataParallel(trainer.plans_network)  # as nnU-Net wraps it; a step goes around it
    assert wrapped.module is trainer.plans_network
    half = slice(rank, rank + 1)
    share = {k: [t[half] for t in v] if isinstance(v, list) else v[half] for k, v in batch.items()}
    loss = trainer.train_step(share)["loss"]
    values = trainer._mean_values()
    buffers = dict(trainer.training_modules.named_buffers())
    return {
        "weights": {n: p.detach() for n, p in all_weights(trainer)},
        "buffers": buffers,
        "loss": loss,
        "values": values,
    }


def all_weights(trainer):
    """Names and weights of what predicts and of what only trains."""
    yield from trainer.plans_network.named_parameters()
    yield from trainer.training_modules.named_parameters("training")


def ignoring(trainer, batch: dict) -> dict:
    """The batch with a quarter of each target ignored."""
    for target in batch["target"]:
        target[..., : target.shape[-1] // 4] = trainer.label_manager.ignore_label
    return batch


# of what the base does for every method alike; SHTA's branch does it the same way on each host
ONE_WITH_SHTA = sorted(name for name in TRAINERS if "SHTA" not in name or name == "nnUNetTrainerSHTA_CPS")


def spied(monkeypatch, of, name: str) -> list:
    """What a function of an object or a module gives from now on, call by call."""
    seen, real = [], getattr(of, name)
    monkeypatch.setattr(of, name, lambda *args, **kwargs: seen.append(real(*args, **kwargs)) or seen[-1])
    return seen
