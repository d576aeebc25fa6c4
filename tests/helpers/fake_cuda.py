"""A training step on fake CUDA tensors: what it waits for, holds, moves and computes, at real size and without a GPU.

Torch's FakeTensors have a shape, a type and a device, but no memory; autocast, gradients and the scaler are torch's
own. ``fake_cuda.c`` stands for the CUDA runtime, which autograd asks for streams. No kernel runs, so this says nothing
of seconds, of cuDNN's workspaces, or of memory lost between tensors. An operation whose result has a shape that depends
on values, such as ``nonzero``, waits for the device too; on fake tensors it raises.

Functions that a trainer compiles count as what they must read and write: see ``Meter.compile``. Networks and nnU-Net's
loss count operation by operation, for every trainer alike.

The stand-in has to be there before torch is, so ``measure`` runs this file in a separate process.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry

from nnunet_ssl.augmentation.deferred import Deferred

HERE = Path(__file__).resolve()
BASELINE = "nnUNetTrainer"
CASES = {"a": (200, 200, 200), "b": (200, 200, 200)}  # that the patches of a batch come from, and their shapes
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "_unsafe_view")
NO_FAKE_GPU = 3  # an exit code


class NoFakeGPU(Exception):  # noqa: N818
    """This torch cannot be given a GPU that is not there."""


@dataclasses.dataclass
class Cost:
    """Of one step.

    Attributes:
        waits: how often the host waits for the device.
        peak: bytes of live tensors, where they are most.
        moved: bytes that the operations read and write, each by itself; a compiled function is one operation.
        flops: floating-point operations of convolutions and matrix products.
        places: where the host waits, and how often.
    """

    waits: int
    peak: int
    moved: int
    flops: int
    places: dict[str, int]


def compile_stand_in(folder: Path) -> Path:
    """The stand-in for the CUDA runtime as a library, by the name under which torch looks for it; needs gcc."""
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, HERE.with_suffix(".c")]
    subprocess.run(command, check=True)
    return library


def measure(
    trainers: list[str],
    plans: dict,
    dataset_json: dict,
    stand_in: Path,
    augment: str = "workers",
    memory: str = "cuda",
) -> dict[str, Cost]:
    """The cost of each trainer's second step, in the middle of its schedule, by the trainer's name.

    Args:
        trainers: ours, and ``nnUNetTrainer``.
        plans, dataset_json: of a dataset in nnU-Net's folders; patch, network and classes may be larger than its own.
        stand_in: from ``compile_stand_in``.
        augment: ``"device"`` for batches to which the step does all that nnU-Net's augmentation may do.
        memory: where SASNet keeps its own, ``"cuda"`` or ``"cpu"``.

    Raises:
        NoFakeGPU: torch does not take the stand-in, as one without CUDA or with the runtime linked into it.
    """
    job = {"trainers": trainers, "plans": plans, "dataset_json": dataset_json, "augment": augment, "memory": memory}
    done = subprocess.run(
        [sys.executable, "-m", "helpers.fake_cuda"],
        env={
            **os.environ,
            "LD_PRELOAD": str(stand_in),
            "nnUNet_compile": "t",
            "PYTHONPATH": f"{HERE.parents[2]}{os.pathsep}{HERE.parents[1]}",
        },
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    if done.returncode == NO_FAKE_GPU:
        raise NoFakeGPU
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-5000:]}"
    return {name: Cost(**cost) for name, cost in json.loads(done.stdout.splitlines()[-1]).items()}


# ------------------------------------------------------------------ in the other process


class Meter(TorchDispatchMode):
    """Sees every operation on fake tensors, those of the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.live: set[int] = set()
        self.held = 0
        self.sees: Literal["everything", "memory", "nothing"] = "everything"
        self.restart()

    def restart(self) -> None:
        """Count from here; what is held stays held."""
        self.peak, self.moved, self.flops = self.held, 0, 0
        self.places: Counter[str] = Counter()

    def cost(self) -> Cost:
        """Since ``restart``."""
        return Cost(sum(self.places.values()), self.peak, self.moved, self.flops, dict(self.places))

    def compile(self, function: Any, **_: Any) -> Any:
        """In place of ``torch.compile``: a function moves what it is given and gives, and so does its backward pass.

        What is between can stay in registers. How much is held for the backward pass instead of computed again is the
        compiler's choice, so the peak is the plain function's. A network stays as it is.
        """
        if isinstance(function, nn.Module):
            return function

        def compiled(*args: Any) -> Any:
            leaves, structure = tree_flatten(args)
            if torch.is_grad_enabled():
                entered = Enter.apply(self, *leaves)
                return Leave.apply(self, bytes_of(leaves), function(*tree_unflatten(entered, structure)))
            self.sees = "nothing"
            out = function(*args)
            self.sees = "everything"
            self._hold(out)
            self.moved += bytes_of((leaves, out))
            return out

        return compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if given and not any(isinstance(t, FakeTensor) for t in given) and name not in ("lift_fresh", "_to_copy"):
            with _disable_current_modes():  # numbers on the host, such as those that a loader has drawn
                return func(*args, **kwargs)
        if name == "_local_scalar_dense" and isinstance(args[0], FakeTensor):  # .item(), float(), if, an index
            if on_device(args[0]):
                self.places[f"value, {place()}"] += 1
            # no overflow on the device; on the host the number of a step, which Adam divides by
            number = 0.0 if on_device(args[0]) else 1.0
            return {torch.bool: False}.get(args[0].dtype, number if args[0].is_floating_point() else 1)
        in_place = name.startswith("_fused_")  # optimizers' kernels, which return nothing and have no fake counterpart
        out = None if in_place else func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], out)
            waits = not (args[2:] and args[2]) and not kwargs.get("non_blocking")
            if on_device(source) and target.device.type == "cpu":
                self.places[f"to the host, {place()}"] += 1
                with _disable_current_modes():  # nnU-Net makes an array of it, which a fake tensor cannot be
                    return torch.zeros(target.shape, dtype=target.dtype) if name == "_to_copy" else out
            if waits and source.device.type == "cpu" and on_device(target):
                self.places[f"to the device, {place()}"] += 1
        if self.sees == "everything":
            self._count(func, name, args, kwargs, out)
        elif self.sees == "memory":
            self._hold(out)
        return out

    def _count(self, func: Any, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        self._hold(out)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        if not func.is_view and name not in FREE and func.namespace != "prim":  # which asks a tensor where it is
            self.moved += bytes_of((args, {k: v for k, v in kwargs.items() if k != "out"}, out))

    def _hold(self, tensors: Any) -> None:
        for tensor in filter(on_device, tree_leaves(tensors)):
            self._hold_storage(tensor.untyped_storage())

    def _hold_storage(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.live:
            return
        self.live.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)

        def free() -> None:
            self.live.remove(key)
            self.held -= size

        weakref.finalize(storage, free)


class Enter(torch.autograd.Function):
    """What a compiled function is given; in the backward pass, what it gives."""

    @staticmethod
    def forward(ctx: Any, meter: Meter, *given: Any) -> tuple:
        ctx.meter = meter
        ctx.set_materialize_grads(False)
        meter.sees = "memory"
        meter.moved += bytes_of(given)
        return given

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        ctx.meter.sees = "everything"
        ctx.meter.moved += bytes_of(gradients)
        return None, *gradients


class Leave(torch.autograd.Function):
    """What a compiled function gives; in the backward pass, what it is given: its gradient, and all that it had."""

    @staticmethod
    def forward(ctx: Any, meter: Meter, bytes_given: int, out: Tensor) -> Tensor:
        ctx.meter, ctx.bytes_given = meter, bytes_given
        meter.sees = "everything"
        meter.moved += bytes_of(out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        ctx.meter.sees = "memory"
        ctx.meter.moved += ctx.bytes_given + bytes_of(gradient)
        return None, None, gradient


def bytes_of(values: Any) -> int:
    """Of all tensors on the fake GPU that there are in lists, tuples and dictionaries."""
    tensors = filter(on_device, tree_leaves(values))
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


def on_device(value: Any) -> bool:
    """Whether it is a tensor on the fake GPU."""
    return isinstance(value, FakeTensor) and value.fake_device.type == "cuda"


def place() -> str:
    """The line of this package or of nnU-Net that runs now."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/nnunet_ssl/" in file or "/nnunetv2/" in file:
            return f"{Path(file).parent.name}/{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


@contextmanager
def built_on_device() -> Iterator[None]:
    """Modules are made where they shall be: parameters that are fake cannot move."""
    plain = torch.tensor

    def tensor(value: Any, **kwargs: Any) -> Tensor:
        """Batch normalization's count of steps: ``torch.tensor`` would ask the driver."""
        return torch.full((), value, **kwargs) if isinstance(value, int) else plain(value, **kwargs)

    with (
        torch.device("cuda"),
        mock.patch.object(nn.Module, "to", lambda module, *args, **kwargs: module),
        mock.patch.object(torch, "tensor", tensor),
    ):
        yield


@contextmanager
def stand_ins(meter: Meter) -> Iterator[None]:
    """For ``torch.compile``, which nnU-Net's loss, compiled in place, does without; for what would ask the driver."""
    with (
        mock.patch.object(torch, "compile", meter.compile),
        mock.patch.object(nn.Module, "compile"),
        mock.patch.object(torch.cuda, "current_stream"),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
    ):
        yield


def build(name: str, plans: dict, dataset_json: dict, memory: str = "cuda") -> Any:
    """A trainer that is ready for its step, in the middle of its schedule."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    import nnunet_ssl.trainers

    cls = nnUNetTrainer if name == BASELINE else getattr(nnunet_ssl.trainers, name)
    configuration = next(iter(plans["configurations"]))
    trainer = cls({**plans, "continue_training": False}, configuration, 0, dataset_json, torch.device("cuda"))
    with built_on_device():
        trainer.initialize()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    if hasattr(trainer, "global_step"):
        trainer.global_step = trainer.total_steps // 2
    if getattr(trainer, "uses_sar", False):
        from nnunet_ssl.trainers.sasnet.memory import ConfidenceMemory

        with _disable_current_modes() if memory == "cpu" else nullcontext():
            trainer.memory = ConfidenceMemory(CASES, device=memory)
    return trainer


def to_augment(trainer: Any, stream: str) -> Deferred:
    """A stream's half of a batch, of which every image is changed by all that there is; draws have values."""
    rotation, dummy_2d, size, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    with _disable_current_modes():
        transforms = trainer.get_training_transforms(
            trainer.configuration_manager.patch_size,
            rotation,
            trainer._get_deep_supervision_scales() if stream == "labeled" else None,
            axes,
            dummy_2d,
            use_mask_for_norm=[True] * trainer.num_input_channels,
        )
        for transform in transforms.transforms:
            transform.p_rotation = transform.p_scaling = transform.apply_probability = 1
        loader = SimpleNamespace(transforms=transforms)
        trainer._leave_to_device(stream, loader)
        for _ in range(trainer.batch_size):
            crop = torch.zeros(1, *size)
            loader.transforms(image=crop.expand(trainer.num_input_channels, *size), segmentation=crop.short())
        drawn = loader.transforms.take()
    # a fake GPU has no generator to seed
    trainer.transforms_on_device[stream]._generator = SimpleNamespace(manual_seed=lambda seed: None)
    return Deferred(torch.empty(len(drawn[0])), torch.empty(len(drawn[1]), dtype=torch.int16), drawn.samples)


def read_draws(pickled: bytes) -> Any:
    """Draws with their values: they are on the host, and so not fake."""
    with _disable_current_modes():
        return pickle.Unpickler(io.BytesIO(pickled)).load()


def a_batch(trainer: Any, augment: str) -> dict:
    """What the loader gives, on the host."""
    if augment == "device":
        batch = {"data": to_augment(trainer, "labeled"), "target": None, "keys": list(CASES)[: trainer.batch_size]}
        return {**batch, "unlabeled": to_augment(trainer, "unlabeled")} if trainer.uses_unlabeled else batch
    patch, scales = trainer.configuration_manager.patch_size, trainer._get_deep_supervision_scales() or [[1.0] * 3]
    size = trainer.batch_size

    def images() -> Tensor:
        return torch.empty(size, trainer.num_input_channels, *patch)

    target = [
        torch.empty(size, 1, *(round(n * s) for n, s in zip(patch, scale, strict=True)), dtype=torch.int16)
        for scale in scales
    ]
    batch = {"data": images(), "target": target, "keys": list(CASES)[:size]}
    if getattr(trainer, "uses_unlabeled", False):
        batch["unlabeled"] = images()
    if getattr(trainer, "uses_sar", False):
        batch["coordinates"] = torch.empty(size, len(patch), len(patch) + 3)
    return batch


def main() -> None:
    """Two steps of each trainer, of which the second one counts; the last line that is printed has the costs."""
    if not torch.cuda.is_available():
        sys.exit(NO_FAKE_GPU)
    job = json.load(sys.stdin)
    costs = {}
    for name in job["trainers"]:
        with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter, stand_ins(meter):
            trainer = build(name, job["plans"], job["dataset_json"], job["memory"])
            batches = [a_batch(trainer, job["augment"]) for _ in range(2)]
            with mock.patch("pickle.loads", read_draws):
                trainer.train_step(batches.pop())
                meter.restart()
                trainer.train_step(batches.pop())
        costs[name] = dataclasses.asdict(meter.cost())
    print(json.dumps(costs))


if __name__ == "__main__":
    main()
