"""One step: the passes of a method, each backpropagated, then clipping and the optimizers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnunet_ssl.augmentation.deferred import Deferred


class Stream(NamedTuple):
    """One half of a batch."""

    images: Tensor  # [B, C, *patch]
    target: list[Tensor] | Tensor | None  # nnU-Net's target, full resolution first; None for unlabeled images
    cases: list[str] | None = None  # names of the labeled cases
    coordinates: Tensor | None = None  # where a method asks for them: see sasnet/coordinates.py


class Batch(NamedTuple):
    """What a method's ``losses`` takes."""

    labeled: Stream
    unlabeled: Stream | None


class Step(nnUNetTrainer):
    """``train_step``, which asks the method for ``losses`` and ``term_weights``."""

    def train_step(self, batch: dict) -> dict:
        """One step: the method's passes, each backpropagated, then clipping and the optimizers.

        Args:
            batch: ``data``, ``target`` and, for methods that use it, ``unlabeled``.

        Returns:
            ``{"loss": 0-dim tensor}``, the weighted sum of all terms, on its device: nothing waits for it here.
        """
        streams = self._to_device(batch)
        for optimizer in self._optimizers():
            optimizer.zero_grad(set_to_none=True)

        weights = self.term_weights()
        terms_of_step: dict[str, Tensor] = {}
        joint = self.settings.passes == "joint"
        held = []  # the losses of joint passes
        passes = self.losses(streams)
        while True:
            with self.autocast():
                terms = next(passes, None)
                if terms is None:
                    break
                terms = terms | self.take_terms_of_features()
                loss = sum(weights.get(name, 1.0) * term for name, term in terms.items())
            for name, term in terms.items():
                terms_of_step[name] = terms_of_step.get(name, 0.0) + term.detach().float()
            if joint:
                held.append(loss)
            else:
                self._backward(loss)
            del terms, loss
        if joint:
            self._backward(sum(held))

        self._update()
        self.after_step()
        if self.average is not None:
            self.average.update(self.plans_network, self.global_step)
        self.global_step += 1
        for name, term in terms_of_step.items():
            self.log_value(f"loss_{name}", term)
        for name, weight in weights.items():
            self.log_value(f"weight_{name}", weight)
        return {"loss": sum(weights.get(name, 1.0) * term for name, term in terms_of_step.items())}

    def autocast(self) -> AbstractContextManager:
        """nnU-Net's rule, half precision on CUDA and none elsewhere; with ``cpu_bfloat16`` on a CPU too."""
        half = self.device.type == "cuda" or (self.device.type == "cpu" and self.settings.cpu_bfloat16)
        # Without the cache of cast weights: one that a forward without gradient left behind would have no gradient.
        return torch.autocast(self.device.type, cache_enabled=False) if half else nullcontext()

    def warn_of_slow_bfloat16(self) -> None:
        """Say so where the CPU only emulates what ``cpu_bfloat16`` asks for."""
        asked = self.device.type == "cpu" and self.settings.cpu_bfloat16
        if asked and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.print_to_log_file(
                "WARNING: 'cpu_bfloat16' is on, but this CPU has no instructions for bfloat16: steps take several "
                "times as long as without it."
            )

    def _to_device(self, batch: dict) -> Batch:
        def move(x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
            return [move(i) for i in x] if isinstance(x, list) else x.to(self.device, non_blocking=True)

        def ready(stream: str, images: Any, target: Any) -> tuple[Tensor, list[Tensor] | Tensor | None]:
            if stream in self.transforms_on_device:
                return self.transforms_on_device[stream](Deferred(*images))
            return move(images), None if target is None else move(target)

        unlabeled = batch.get("unlabeled")
        return Batch(
            Stream(
                *ready("labeled", batch["data"], batch["target"]),
                [str(case) for case in batch.get("keys", ())],
                move(batch["coordinates"]) if "coordinates" in batch else None,
            ),
            None if unlabeled is None else Stream(ready("unlabeled", unlabeled, None)[0], None),
        )

    def _backward(self, loss: Tensor) -> None:
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()


def full_resolution(target: list[Tensor] | Tensor) -> Tensor:
    """The full-resolution entry of nnU-Net's outputs or target."""
    return target[0] if isinstance(target, (list, tuple)) else target
