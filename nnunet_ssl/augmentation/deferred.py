"""The workers' part of nnU-Net's augmentation: all draws, and the crop that the device needs."""

from __future__ import annotations

import copy
import pickle
from typing import Any, NamedTuple

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTransform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from torch import Tensor

from nnunet_ssl.augmentation.spatial import reach
from nnunet_ssl.errors import UserError

# each by its exact type: a derived one may do something else
INTENSITY = (
    GaussianNoiseTransform,
    GaussianBlurTransform,
    MultiplicativeBrightnessTransform,
    ContrastTransform,
    SimulateLowResolutionTransform,
    GammaTransform,
)
SLICES = Convert3DTo2DTransform, Convert2DTo3DTransform  # around SpatialTransform, of anisotropic patches
ON_DEVICE = (
    *INTENSITY,
    MirrorTransform,
    MaskImageTransform,
    RemoveLabelTransform,
    ConvertSegmentationToRegionsTransform,
    DownsampleSegForDSTransform,
)
# what spatial.py computes; the rest of a SpatialTransform are probabilities, ranges and the patch
SPATIAL = {
    "p_elastic_deform": 0,
    "random_crop": False,
    "mode_image": "bilinear",
    "padding_mode_image": "zeros",
    "mode_seg": "bilinear",
    "border_mode_seg": "constant",
    "seg_tiebreak": "nearest",
    "align_corners": False,
}


class Deferred(NamedTuple):
    """A batch that is still to be augmented; two tensors, since each one takes a file of shared memory."""

    images: Tensor  # float32, the samples' crops one after the other
    segmentations: Tensor  # int16 likewise; empty where nothing needs them
    # a pickled list of (shape of the image, of the segmentation or None, draws); draws are pairs of the number of a
    # transform and what it has drawn
    samples: bytes


class DeferredTransforms:
    """In place of nnU-Net's training transforms in a loader: draws all that they would, and leaves the rest.

    The draws are nnU-Net's own, in its order. A patch that is neither rotated nor scaled is cropped here, any other to
    the voxels that it is resampled from.

    Attributes:
        steps: the transforms one after the other, without what makes them random.

    Raises:
        UserError: there is a transform that is not one of nnU-Net's own training transforms, or not as nnU-Net has it.
    """

    def __init__(self, transforms: Any, trainer: str) -> None:
        self.transforms = transforms
        every = getattr(transforms, "transforms", [transforms])
        self.steps: list[BasicTransform] = [t.transform if type(t) is RandomTransform else t for t in every]
        self._random = [t if type(t) is RandomTransform else None for t in every]
        for step in self.steps:
            if not runs_on_device(step):
                raise UserError(
                    f"augment is 'device', but the training transforms of {trainer} have a {type(step).__name__} that "
                    "only workers can run; set augment to 'workers'."
                )
        self._samples: list[tuple[Tensor, Tensor | None, list[tuple[int, dict[str, Any]]]]] = []

    def __call__(self, image: Tensor, segmentation: Tensor) -> dict[str, Tensor]:
        """Draw for one sample, and keep it; what goes back to nnU-Net's loader is empty."""
        sample = {"image": image}
        if len(segmentation):  # else nothing needs it: see unlabeled/loader.py
            sample["segmentation"] = segmentation
        draws: list[tuple[int, dict[str, Any]]] = []
        for number, (random, step) in enumerate(zip(self._random, self.steps, strict=True)):
            if random is not None and not random.get_parameters()["apply_transform"]:
                continue
            if type(step) in SLICES:
                sample = step(**sample)
            elif type(step) is SpatialTransform:
                sample, drawn = crop(step, sample)
                if drawn is not None:
                    draws.append((number, drawn))
            elif type(step) in INTENSITY:
                draws.append((number, draw(step, sample["image"])))
            else:
                draws.append((number, step.get_parameters(**sample)))
        self._samples.append((sample["image"], sample.get("segmentation"), draws))
        return {"image": torch.empty(0), "segmentation": torch.empty(0)}

    def take(self) -> Deferred:
        """The samples since the last call, as one batch."""
        samples, self._samples = self._samples, []
        shapes = [
            (tuple(image.shape), None if segmentation is None else tuple(segmentation.shape), draws)
            for image, segmentation, draws in samples
        ]
        images = [image for image, _, _ in samples]
        segmentations = [segmentation for _, segmentation, _ in samples if segmentation is not None]
        return Deferred(joined(images, torch.float32), joined(segmentations, torch.int16), pickle.dumps(shapes))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.transforms!r})"


def runs_on_device(step: BasicTransform) -> bool:
    """Whether the device can do what a transform does."""
    if type(step) is SpatialTransform:
        return all(getattr(step, name) == value for name, value in SPATIAL.items())
    return type(step) in (*SLICES, *ON_DEVICE)


def draw(transform: BasicTransform, image: Tensor) -> dict[str, Any]:
    """What one of ``INTENSITY`` draws for an image of this shape, as tensors on the CPU and Python's numbers.

    Noise itself is left to the device: for it there is a ``seed`` beside its standard deviation.
    """
    drawn = transform.get_parameters(image=image)
    if isinstance(transform, GaussianNoiseTransform):
        drawn["seed"] = int(torch.randint(2**63 - 1, ()))
    return drawn


def crop(spatial: SpatialTransform, sample: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Draw an affine matrix and take the voxels that it needs of a sample, image and labels ``[C, *spatial]``.

    Returns:
        The cropped sample, and ``{"affine": rows of numbers}``; or the patch itself, and None.
    """
    draws_alone = copy.copy(spatial)
    draws_alone.patch_size, draws_alone._grid_cache = [1] * len(spatial.patch_size), {}  # or it makes a grid
    drawn = draws_alone.get_parameters(**sample)
    if drawn["affine"] is None:
        return spatial.apply(sample, **drawn), None
    affine = drawn["affine"].tolist()
    needed = [slice(None)]
    for n, far in zip(sample["image"].shape[1:], reach(affine, spatial.patch_size), strict=True):
        beside = max(0, int((n - 1) / 2 - far))
        needed.append(slice(beside, n - beside))
    tensors = {name: x[tuple(needed)] for name, x in sample.items() if isinstance(x, Tensor)}
    return {**sample, **tensors}, {"affine": affine}


def joined(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """All values of ``tensors`` one after the other; cropped ones are copied once."""
    values = torch.empty(sum(t.numel() for t in tensors), dtype=dtype)
    for part, tensor in zip(values.split([t.numel() for t in tensors]), tensors, strict=True):
        part.view(tensor.shape).copy_(tensor)
    return values
