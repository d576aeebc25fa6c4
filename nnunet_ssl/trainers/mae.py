"""MAE: masked pretraining of the plans' network, without labels (He et al., CVPR 2022; Wald et al., CVPR 2025)."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from dynamic_network_architectures.building_blocks.helper import convert_dim_to_conv_op
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from pydantic import Field, model_validator
from torch import Tensor, nn

from nnunet_ssl.declared import Counts, declared, setting
from nnunet_ssl.errors import UserError
from nnunet_ssl.losses.masked import masked_mean
from nnunet_ssl.trainers.base import Batch, Stream, nnUNetTrainerSSL
from nnunet_ssl.trainers.settings import SSLSettings
from nnunet_ssl.unlabeled.elastic import deform_elastically
from nnunet_ssl.unlabeled.loader import UnlabeledLoader

LARGEST_BLOCK = 16  # voxels along an axis by default, in He et al. and in Wald et al.'s code

Ratio = Annotated[float, Field(gt=0, lt=1, description="a number above 0 and below 1")]


@declared
class MAESettings(SSLSettings):
    """Settings of MAE."""

    mae_mask_ratio: Ratio = setting(
        0.75, "Share of a patch's blocks that is hidden, as in both papers; at least one block, but not all"
    )
    mae_block_size: Counts = setting(
        (),
        "Voxels per block along each axis, divisors of the patch size; `[]` is the network's total stride, at most 16",
    )

    @model_validator(mode="after")
    def _no_warps(self) -> MAESettings:
        if self.warped_share or self.warped_share_last:
            raise ValueError(
                "sets 'warped_share' or 'warped_share_last', but nnUNetTrainerMAE sees only images; leave it out"
            )
        return self


class nnUNetTrainerMAE(nnUNetTrainerSSL):  # noqa: N801
    """MAE: the plans' network learns, without any label, to fill in hidden blocks of images; for -pretrained_weights.

    It sees the images of the fold's training cases and of ``imagesUn``, all drawn equally often. A patch is
    moved, scaled, rotated and mirrored as nnU-Net does it; its intensities stay, since noise cannot be foretold. Most
    blocks are then set to 0 in all channels, and a convolution of one voxel on the last decoder feature, which only
    training needs, tells what they were. The heads that segment learn nothing.

    Departures from the papers: the network and its size are the plans'; it is a dense CNN, which sees the hidden voxels
    as zeros, and its whole decoder is kept, for -pretrained_weights takes all but the heads.

    The checkpoint names this class, whose ``build_network_architecture`` refuses: nobody can predict with it unawares.

    Raises:
        UserError: at the start, for a network without encoder and ``decoder.seg_layers``, or blocks that do not divide
            the patch; wherever somebody asks for the network to predict with.
    """

    paper = (
        "He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022; Wald et al., Revisiting MAE "
        "Pre-training for 3D Medical Image Segmentation, CVPR 2025"
    )
    Settings = MAESettings
    settings: MAESettings

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """What nnU-Net, export and figures call to predict.

        Raises:
            UserError: always.
        """
        raise UserError(
            "a model of nnUNetTrainerMAE fills in hidden blocks of images and has not learned to segment. Train "
            "another trainer with -pretrained_weights and its checkpoint_final.pth, and use that model."
        )

    @classmethod
    def trainer_of_checkpoints(cls) -> str:
        """This class, which refuses, also where one derived from it trains another network."""
        return "nnUNetTrainerMAE"

    def _refuse_another_network(self) -> None:
        """Nothing predicts with it."""

    # ------------------------------------------------------------------ what is built

    def initialize(self) -> None:
        """As the base; without deep supervision, for it has no use for the heads."""
        self.enable_deep_supervision = False
        if type(self).build_network_architecture is nnUNetTrainerMAE.build_network_architecture:
            self.build_network_architecture = nnUNetTrainer.build_network_architecture  # to train; this class's refuses
        super().initialize()

    def build_training_modules(self) -> dict[str, nn.Module]:
        """The head that fills in: from the last decoder feature to the image's channels."""
        network = self.plans_network
        self.require_decoder(network, "to fill in what is hidden from")
        self._choose_blocks()
        patch_size, last = self.configuration_manager.patch_size, network.decoder.seg_layers[-1]
        with self.seeded("reconstruction"):
            head = convert_dim_to_conv_op(len(patch_size))(last.in_channels, self.num_input_channels, 1)
        return {**super().build_training_modules(), "reconstruction": head}

    def _choose_blocks(self) -> None:
        patch_size, wanted = list(self.configuration_manager.patch_size), list(self.settings.mae_block_size)
        if not wanted:
            wanted = [math.gcd(int(s), LARGEST_BLOCK) for s in np.prod(self.plans_network.encoder.strides, axis=0)]
        divides = len(wanted) == len(patch_size) and not any(n % b for n, b in zip(patch_size, wanted, strict=True))
        if not divides or wanted == patch_size:
            raise UserError(
                f"mae_block_size {wanted} does not suit the patch {patch_size} of '{self.configuration_name}'; give a "
                "divisor for each axis, so that there are two blocks or more, or [] for the default."
            )
        self.block_size = wanted
        blocks = math.prod(patch_size) // math.prod(wanted)
        self.print_to_log_file(
            f"MAE: {number_hidden(blocks, self.settings.mae_mask_ratio)} of {blocks} blocks of "
            f"{' x '.join(map(str, wanted))} voxels are hidden in each patch. Where nnU-Net's log and progress.png say "
            "pseudo Dice, read the negative error on hidden voxels of validation patches."
        )

    def tapped_networks(self) -> set[str]:
        """The head reads the last decoder feature."""
        return {"first"}

    # ------------------------------------------------------------------ data

    def get_dataloaders(self) -> tuple[Any, Any]:
        """One stream of patches, drawn uniformly from all images that may be seen, and one for validation.

        Images of labeled cases are read as if they had no labels: what comes beside them is where they are nonzero,
        for nnU-Net's masking, and their labels change nothing.
        """
        patch_size = self.configuration_manager.patch_size
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        mask_for_norm = self.configuration_manager.use_mask_for_norm
        transforms = self.get_training_transforms(
            patch_size, rotation, None, mirror_axes, dummy_2d, use_mask_for_norm=mask_for_norm
        )
        if self.settings.elastic_deformation:
            deform_elastically(transforms, self.settings.elastic_deformation, type(self).__name__)
        training, validation = (
            dict.fromkeys(cases, self.preprocessed_dataset_folder) for cases in map(sorted, self.do_split())
        )

        def loader(places: dict[str, str], size: Sequence[int], transforms: ComposeTransforms) -> UnlabeledLoader:
            sizes = self.batch_size, size, patch_size
            return UnlabeledLoader(
                places, *sizes, self.label_manager, use_mask_for_norm=mask_for_norm, transforms=transforms
            )

        workers = get_allowed_n_proc_DA()
        train = loader(training | self.unlabeled.places, initial_patch_size, without_intensities(transforms))
        val = loader(validation, patch_size, self.get_validation_transforms(None))
        return (
            self._start(train, None, "train", self.num_iterations_per_epoch, workers),
            self._start(val, None, "val", self.num_val_iterations_per_epoch, workers and max(1, workers // 2)),
        )

    # ------------------------------------------------------------------ the step

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """One pass; no target is looked at."""
        yield {"masked": self._error_on_hidden(batch.labeled.images)}

    def _error_on_hidden(self, images: Tensor) -> Tensor:
        """Mean squared error on hidden voxels of images ``[B, C, *patch]`` float32, which are masked and the target."""
        hidden = hidden_voxels(
            len(images), images.shape[2:], self.block_size, self.settings.mae_mask_ratio, images.device
        )
        _, feature = self.forward_with_feature("first", Stream(images.masked_fill(hidden, 0.0), None))
        filled_in = self.training_modules["reconstruction"](feature).float()
        return masked_mean((filled_in - images).square(), hidden.expand_as(images))

    # ------------------------------------------------------------------ validation

    def validation_step(self, batch: dict) -> dict:
        """The error on a patch of validation cases: ``{"loss": 0-dim tensor}``."""
        with self.autocast():
            return {"loss": self._error_on_hidden(batch["data"].to(self.device, non_blocking=True))}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Log the error; its negative where nnU-Net has a Dice, so that checkpoint_best.pth has the lowest error."""
        error = torch.stack([output["loss"] for output in val_outputs]).mean()
        if self.is_ddp:
            dist.all_reduce(error)
            error /= dist.get_world_size()
        self.log_value("loss_masked_validation", error)
        self.logger.log("val_losses", error.item(), self.current_epoch)
        self.logger.log("mean_fg_dice", -error.item(), self.current_epoch)
        self.logger.log("dice_per_class_or_region", [], self.current_epoch)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """There is nothing to segment with; say what comes next."""
        words = ["nnUNetv2_train", self.plans_manager.dataset_name, self.configuration_name, str(self.fold)]
        words += ["-p", self.plans_manager.plans_name, "-tr", "TRAINER"]
        words += ["-pretrained_weights", os.path.join(self.output_folder, "checkpoint_final.pth")]
        self.print_to_log_file(
            f"No validation: {type(self).__name__} has not learned to segment. Next: {shlex.join(words)}"
        )


def number_hidden(blocks: int, ratio: float) -> int:
    """The number of hidden blocks: at least one, and not all."""
    return min(max(1, round(ratio * blocks)), blocks - 1)


def hidden_voxels(
    batch_size: int, patch_size: Sequence[int], block_size: Sequence[int], ratio: float, device: torch.device
) -> Tensor:
    """Blocks drawn without replacement for each image, by torch's generator of ``device``.

    Args:
        batch_size: B.
        patch_size, block_size: in voxels along each axis; blocks divide the patch.
        ratio: share of the blocks that is hidden; their number is the same in each image.

    Returns:
        bool ``[B, 1, *patch]``, true where a voxel is hidden.
    """
    grid = [length // block for length, block in zip(patch_size, block_size, strict=True)]
    order = torch.rand(batch_size, math.prod(grid), device=device).argsort(1)  # a permutation for each image
    hidden = (order < number_hidden(math.prod(grid), ratio)).view(batch_size, 1, *grid)
    for axis, block in enumerate(block_size, 2):
        hidden = hidden.repeat_interleave(block, axis)
    return hidden


def without_intensities(transforms: ComposeTransforms) -> ComposeTransforms:
    """nnU-Net's training transforms less those that draw other intensities; where voxels lie still changes."""
    return ComposeTransforms(
        [
            transform
            for transform in transforms.transforms
            if not (isinstance(transform, RandomTransform) and isinstance(transform.transform, ImageOnlyTransform))
        ]
    )
