"""The memory of confidence: SAR's Eq. 4 (SASNet, section 3.2).

Of each labeled case it keeps, for every voxel and both branches, how much probability the branch gave to the true
class when the voxel was last seen. The released code mixes cases and branches up; here each branch has its own values
of each case.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor

from nnunet_ssl.losses.sar import NEUTRAL

NEVER = -1.0  # not visited
BYTES_PER_VALUE = 2  # float16
SLOTS = {"last_two": 2, "running": 1}  # values kept per voxel and branch, by rule


class ConfidenceMemory:
    """How confident each branch has been in the true class, per voxel of each labeled case.

    It lives in the frame of the preprocessed cases. A patch, however it was augmented, comes with the position in the
    case that each of its voxels was taken from (``coordinates.py``).

    Each call touches only the voxels that the patch covers. Where memory and patch are on one device, nothing waits for
    that device; a memory on the CPU or on disk waits for what comes from a GPU. :func:`moved` moves a batch at once.

    Args:
        shapes: voxels along each axis of each case.
        rule: ``"last_two"`` averages the confidences of the last two visits (Eq. 4 and 5, where each epoch visits each
            voxel once). ``"running"`` is the released code's blend, half of the old value and half of the new one.
        branches: of the network; where values are stacked by branch, in the order of :class:`Branches`.
        device: where the values are kept.
        folder: keep them in files there instead, mapped into memory; made if it is missing. On POSIX the files have
            no name, and so vanish with the process, even with one that is killed.

    Raises:
        ValueError: for a folder with a device that is not the CPU.
        OSError: if the folder cannot be written or is too small.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        rule: Literal["last_two", "running"] = "last_two",
        branches: int = 2,
        device: torch.device | str = "cpu",
        folder: str | None = None,
    ) -> None:
        self.device = torch.device(device)
        if folder is not None and self.device.type != "cpu":
            raise ValueError(f"a memory in files is used on the CPU, not on {self.device}")
        self.rule = rule
        self._shapes = {case: tuple(int(n) for n in shape) for case, shape in shapes.items()}
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
        # [slots, branches, V + 1]: the last element is a bin for voxels of the patch that must not be written.
        # With two slots, 0 holds the visit before the last one, and 1 the last.
        self._values: dict[str, Tensor] = {}
        for case, shape in self._shapes.items():
            size = (SLOTS[rule], branches, prod(shape) + 1)
            if folder is None:
                self._values[case] = torch.full(size, NEVER, dtype=torch.float16, device=self.device)
            else:
                self._values[case] = _values_on_disk(size, folder)

    @staticmethod
    def bytes_needed(
        shapes: Mapping[str, Sequence[int]], rule: Literal["last_two", "running"] = "last_two", branches: int = 2
    ) -> int:
        """What a memory would take, without making it. The arguments are the constructor's."""
        return sum(SLOTS[rule] * branches * (prod(map(int, shape)) + 1) * BYTES_PER_VALUE for shape in shapes.values())

    @property
    def nbytes(self) -> int:
        """Bytes that the values take, in RAM, on the GPU or on disk."""
        return sum(values.nbytes for values in self._values.values())

    def to(self, device: torch.device | str) -> None:
        """Keep the values on ``device`` from now on."""
        self._values = {case: values.to(device) for case, values in self._values.items()}
        self.device = torch.device(device)

    @torch.no_grad()
    def read(self, case: str, coords: Tensor) -> Tensor:
        """The mean of brackets in Eq. 4 and 5, for a patch, by multilinear interpolation between voxel centers.

        A voxel that was never visited has the neutral 0.5, one that was visited once the value of that visit.

        Args:
            case: a name that the constructor was given.
            coords: ``[dim, *spatial]``, positions in voxels of the case, of which ``dim`` is the dimension; the patch
                may be a slice of it. Whole numbers are voxel centers, where the value is the stored one exactly.

        Returns:
            ``[branches, *spatial]`` float32 on the device of ``coords``. 0.5 where a coordinate is NaN or more than
            half a voxel outside the case; within that half voxel the border's value.

        Raises:
            KeyError: if there is no such case.
            ValueError: if ``coords`` do not have the case's dimension.
        """
        values, shape = self._values[case], self._shapes[case]
        (position,) = moved(self.device, coords)
        position = position.flatten(1).float()
        inside = _inside(position, shape)

        corners = [(0, 1)]  # offsets in the case, and weights; each axis gives every corner two neighbors
        for x, n, stride in zip(position, shape, _strides(shape), strict=True):
            x = x.nan_to_num(nan=0.0).clamp(0, n - 1)
            lower = x.floor()
            upper = (lower + 1).clamp(max=n - 1)
            part = x - lower
            pair = (lower.long() * stride, 1 - part), (upper.long() * stride, part)
            corners = [(offset + along, weight * share) for offset, weight in corners for along, share in pair]

        mean = torch.zeros(values.shape[1], position.shape[1], device=values.device)
        for offset, weight in corners:
            stored = values[..., offset].mean(0, dtype=torch.float32)
            mean += torch.where(stored < 0, NEUTRAL, stored) * weight
        mean = torch.where(inside, mean, NEUTRAL)
        return moved(coords.device, mean.unflatten(1, coords.shape[1:]))[0]

    @torch.no_grad()
    def write(self, case: str, coords: Tensor, values: Tensor) -> None:
        """One visit of the voxels nearest to ``coords``. Voxels of the patch that meet on one voxel are averaged.

        The first visit fills both slots of ``"last_two"``, so that the mean of the two is the value itself.

        Args:
            case: a name that the constructor was given.
            coords: as for :meth:`read`. What is NaN or outside the case is not written.
            values: ``[branches, *spatial]``, confidences in [0, 1]. What is not finite is not written.

        Raises:
            KeyError: if there is no such case.
            ValueError: if the shapes do not fit.
        """
        memory, shape = self._values[case], self._shapes[case]
        if values.shape != (memory.shape[1], *coords.shape[1:]):
            raise ValueError(
                f"values of shape {tuple(values.shape)} do not fit {memory.shape[1]} branches and coordinates of shape "
                f"{tuple(coords.shape)}"
            )
        position, values = (x.flatten(1).float() for x in moved(self.device, coords, values))
        wanted = _inside(position, shape) & values.isfinite().all(0)

        target = torch.zeros_like(wanted, dtype=torch.long)
        for x, n, stride in zip(position, shape, _strides(shape), strict=True):
            # not round(), which takes halves to even numbers: a patch that lies half a voxel off would meet only those
            target += (x.nan_to_num(nan=0.0) + 0.5).floor().clamp(0, n - 1).long() * stride
        target = torch.where(wanted, target, prod(shape))  # the bin

        # The mean over the voxels of the patch that meet: sorted by target these are runs of equal numbers. The sort
        # is stable, so on the CPU the sums are always taken in the same order. What is not written is a run each, for
        # a GPU adds to one place one after the other.
        target, order = target.sort(stable=True)
        values = values[:, order]
        begins = (target[1:] != target[:-1]) | (target[1:] == prod(shape))
        run = torch.cat([target.new_zeros(1), begins.cumsum(0)])[: len(target)]
        zeros = torch.zeros_like(values[0])
        count = zeros.index_add(0, run, torch.ones_like(zeros))
        mean = torch.stack([zeros.index_add(0, run, of_branch) for of_branch in values]) / count.clamp(min=1)
        now = mean[:, run]  # those that meet all carry the mean, so it does not matter which of them is written last

        last = memory[-1][:, target].float()
        visited = last >= 0
        if self.rule == "last_two":
            new = torch.stack([torch.where(visited, last, now), now])
        else:
            new = torch.where(visited, (last + now) / 2, now)[None]
        memory[..., target] = new.half()
        memory[..., -1] = NEVER

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by case: float16 ``[slots, branches, *shape]``, -1 where never visited.

        These are views of the memory itself; they change with it.
        """
        return {case: self._voxels(case) for case in self._values}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy what :meth:`state` gave into this memory.

        Raises:
            ValueError: if its cases, their shapes, the rule's slots or the branches are others. Nothing is copied then.
        """
        if state.keys() != self._values.keys():
            differ = sorted(state.keys() ^ self._values.keys())
            raise ValueError(f"the stored memory of confidence belongs to other cases: {', '.join(differ)}")
        for case, stored in state.items():
            if stored.shape != self._voxels(case).shape:
                raise ValueError(
                    f"the stored memory of confidence of {case} has the shape {tuple(stored.shape)}, "
                    f"not {tuple(self._voxels(case).shape)}"
                )
        for case, stored in state.items():
            self._voxels(case).copy_(stored)

    def _voxels(self, case: str) -> Tensor:
        """``[slots, branches, *shape]``, without the bin."""
        return self._values[case][..., :-1].unflatten(-1, self._shapes[case])


def moved(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """The tensors on ``device``; between CPU and CUDA one copy each, through pinned memory.

    All copies to the CPU are waited for together: what is read there too early is not there yet.
    """
    pinned = (x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x for x in tensors)
    here = [x.to(device, non_blocking=x.is_cuda or device.type == "cuda") for x in pinned]  # a CPU gets it pinned
    if device.type == "cpu":
        for source in {x.device for x in tensors if x.is_cuda}:
            torch.cuda.current_stream(source).synchronize()
    return here


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Voxels to the next one along each axis, in C order."""
    return [prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _inside(position: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Which of ``[dim, N]`` positions lie in a voxel of the case; a NaN does not. ``[N]`` bool."""
    inside = torch.ones_like(position[0], dtype=torch.bool)
    for x, n in zip(position, shape, strict=True):
        inside &= (x >= -0.5) & (x <= n - 0.5)
    return inside


def _values_on_disk(size: tuple[int, int, int], folder: str) -> Tensor:
    """float16 values of -1 in a file. Written, not only mapped: a full disk is an error here, not a crash later."""
    chunk = torch.full((2**20,), NEVER, dtype=torch.float16).numpy().tobytes()
    missing = prod(size) * BYTES_PER_VALUE
    handle, name = tempfile.mkstemp(suffix=".confidence", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            while missing:
                missing -= file.write(chunk[:missing])
        return torch.from_file(name, shared=True, size=prod(size), dtype=torch.float16).view(size)
    finally:
        with contextlib.suppress(OSError):  # Windows keeps the file while it is mapped
            os.remove(name)
