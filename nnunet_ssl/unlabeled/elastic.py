"""Elastic deformation of training patches, by nnU-Net's own spatial transform, which can do it and is not asked to."""

from __future__ import annotations

from typing import Any

import numpy as np
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

from nnunet_ssl.errors import UserError

# Displacements along each axis are white noise that a Gaussian has smoothed. Up to half of its sigma they do not fold.
# Both ranges are from batchgenerators' augment_spatial_2, without sigmas below a twentieth of the patch, whose
# displacements are of about a voxel.
SCALE = (0.05, 0.25)  # sigma of the Gaussian, as share of the patch
LARGEST = (1 / 8, 1 / 2)  # the largest displacement, in sigmas


def deform_elastically(transforms: BasicTransform, probability: float, trainer: str) -> None:
    """Have nnU-Net's training transforms deform patches with this probability, all that goes with an image alike.

    Rotation and scaling work as before, after it and in one interpolation with it. Where nnU-Net augments slice by
    slice (anisotropic patches), so does this: all slices of a patch are deformed alike, and within their plane. The
    transforms, as ``get_training_transforms`` of ``trainer`` returns them, are changed.

    Raises:
        UserError: there is no ``SpatialTransform`` among them.
    """
    spatial = [t for t in getattr(transforms, "transforms", ()) if isinstance(t, SpatialTransform)]
    if not spatial:
        raise UserError(
            f"elastic_deformation is {probability}, but the training transforms of {trainer} have no SpatialTransform, "
            "which would deform; set it to 0, or keep nnU-Net's in get_training_transforms."
        )
    for transform in spatial:
        transform.p_elastic_deform = probability
        transform.p_synchronize_def_scale_across_axes = 1  # one scale a patch
        transform.elastic_deform_scale = SCALE
        transform.elastic_deform_magnitude = largest_displacement


def largest_displacement(*, deformation_scale: float, patch_size: Any, dim: int, **_: Any) -> float:
    """Voxels along axis ``dim`` of a patch of this size; batchgeneratorsv2 asks for it patch by patch."""
    return np.random.uniform(*LARGEST) * deformation_scale * patch_size[dim]
