"""What an unlabeled image must be before anything learns from it: read whole, and of the dataset's kind.

nnU-Net checks none of this at preprocessing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.volumes import VolumeError, read_volume


class BadImageError(Exception):
    """An image that must not be learned from; the message names file, fault and remedy."""


class CheckingPlans(PlansManager):
    """Plans whose image reader refuses what must not be learned from.

    So the check happens where a preprocessor reads, no matter which preprocessor the plans name, and each image is read
    once.
    """

    def __init__(self, plans: dict, num_channels: int, configuration: str) -> None:
        super().__init__(plans)
        self.num_channels = num_channels
        self.dimensions = len(self.get_configuration(configuration).patch_size)

    @property
    def image_reader_writer_class(self) -> type:
        """nnU-Net's reader for the dataset, with the checks around it."""
        reader, plans = super().image_reader_writer_class, self

        class CheckingReader(reader):  # type: ignore[valid-type, misc]
            def read_images(
                self, image_fnames: Sequence[str], *args: object, **kwargs: object
            ) -> tuple[np.ndarray, dict]:
                try:
                    images, properties = read_volume(super().read_images, image_fnames)
                except VolumeError as error:
                    raise BadImageError(f"{error}. {error.remedy}") from error
                check_kind(images, properties, image_fnames, plans)
                return images, properties

        return CheckingReader


def check_kind(images: np.ndarray, properties: dict, files: Sequence[str], plans: CheckingPlans) -> None:
    """Refuse an image ``[channels, *spatial]`` that nnU-Net could not use with these plans.

    A 2D image has no thickness, so nnU-Net's readers say 999 pixels. In 3D nnU-Net would repeat it until it is as thick
    as that, and where it slices the dataset's images along another axis, it would cut a 2D image into lines. An image
    with a single slice says how thick this is, and a 3D image has slices for a 2D network: nnU-Net takes both.

    Raises:
        BadImageError: names the file and what is wrong with it.
    """
    if len(images) != plans.num_channels:
        raise BadImageError(
            f"{files[0]}: the image has {len(images)} channel(s), but dataset.json names {plans.num_channels}. "
            "Add or remove channel files, or remove the case."
        )
    if is_2d(properties) and (plans.dimensions == 3 or plans.transpose_forward[0] != 0):
        raise BadImageError(
            f"{files[0]}: the image is 2D, but the labeled images of this dataset are 3D. Convert or remove it."
        )


def is_2d(properties: dict) -> bool:
    """Tell a 2D file by the spacing that SimpleITK's readers keep; the others read 2D files only, or none at all."""
    return len(properties.get("sitk_stuff", {}).get("spacing", ())) == 2
