"""The device's part of nnU-Net's augmentation: what the workers have drawn is done to their crops."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from torch import Tensor

from nnunet_ssl.augmentation import intensity
from nnunet_ssl.augmentation.deferred import INTENSITY, Deferred
from nnunet_ssl.augmentation.spatial import resample_image, resample_labels, sampling_grid


class DeviceTransforms:
    """What ``DeferredTransforms`` has left. Nothing here waits for the device, and noise follows from the draws alone.

    Args:
        steps: of the ``DeferredTransforms``.
        labels: all that a segmentation may hold, beside what nnU-Net pads it with.
        device: that computes.
    """

    def __init__(self, steps: list[BasicTransform], labels: Sequence[int], device: torch.device) -> None:
        self.steps = steps
        self.labels = labels
        self.device = device
        self._generator = torch.Generator(device)

    def __call__(self, batch: Deferred) -> tuple[Tensor, list[Tensor] | Tensor | None]:
        """Augment a batch, which is not changed.

        Returns:
            Images ``[B, C, *patch]`` float32, and the target as nnU-Net's transforms make it: with deep supervision a
            list, full resolution first; None where the batch has no segmentations.
        """
        samples = pickle.loads(batch.samples)
        images, segmentations = (x.to(self.device, non_blocking=True, copy=True) for x in batch[:2])
        done: list[dict[str, Any]] = [{"image": x} for x in parted(images, [image for image, _, _ in samples])]
        if len(segmentations):
            shapes = [segmentation for _, segmentation, _ in samples]
            for sample, segmentation in zip(done, parted(segmentations, shapes), strict=True):
                sample["segmentation"] = segmentation
        for i, (_, _, draws) in enumerate(samples):
            for number, drawn in draws:
                done[i] = self._apply(self.steps[number], done[i], drawn)
        return torch.stack([sample["image"] for sample in done]), stacked([s.get("segmentation") for s in done])

    def _apply(self, step: BasicTransform, sample: dict[str, Any], drawn: dict[str, Any]) -> dict[str, Any]:
        if type(step) in INTENSITY:
            return {**sample, "image": intensity.apply(step, sample["image"], drawn, self._generator)}
        if type(step) is SpatialTransform:
            return self._resample(step, sample, drawn["affine"])
        if type(step) is ConvertSegmentationToRegionsTransform:
            return {**sample, "segmentation": regions_of(step, sample["segmentation"])}
        return step.apply(sample, **drawn)

    def _resample(
        self, spatial: SpatialTransform, sample: dict[str, Tensor], affine: list[list[float]]
    ) -> dict[str, Tensor]:
        """Slices of an anisotropic patch are resampled alike, as if they were channels."""
        dim = len(affine)
        source = sample["image"].shape[-dim:]
        grid = sampling_grid(affine, spatial.patch_size, source, self.device)
        outside = spatial.padding_value_seg
        labels = sorted({*self.labels, outside})
        resampled = {}
        for name, tensor in sample.items():
            flat = tensor.reshape(-1, *source)
            new = resample_image(flat, grid) if name == "image" else resample_labels(flat, grid, labels, outside)
            resampled[name] = new.view(*tensor.shape[:-dim], *spatial.patch_size)
        return resampled


def parted(values: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Tensors of these shapes, whose values lie one after the other."""
    parts = values.split([math.prod(shape) for shape in shapes])
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]


def regions_of(step: ConvertSegmentationToRegionsTransform, segmentation: Tensor) -> Tensor:
    """bool ``[regions, *patch]``, as the transform, whose labels are on the CPU."""
    segmentation = segmentation[step.channel_in_seg]
    regions = [[segmentation == label for label in region.tolist()] for region in step.regions]
    return torch.stack([torch.stack(region).any(0) for region in regions])


def stacked(targets: list[Any]) -> list[Tensor] | Tensor | None:
    """The targets of samples as that of a batch."""
    if targets[0] is None:
        return None
    if isinstance(targets[0], list):
        return [torch.stack(scale) for scale in zip(*targets, strict=True)]
    return torch.stack(targets)
