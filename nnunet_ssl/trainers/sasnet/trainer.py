"""SASNet: Scale-aware Adaptive Supervised Network (Li, Shan, Li, Kinahan, Hong)."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from pydantic import model_validator
from torch import Tensor, nn

from nnunet_ssl.checkpoints import read_checkpoint
from nnunet_ssl.declared import Angle, Positive, Share, Weight, Whole, declared, setting
from nnunet_ssl.errors import UserError
from nnunet_ssl.losses.branches import Branches
from nnunet_ssl.losses.consistency import pseudo_label_consistency, segmentation_regression_consistency
from nnunet_ssl.losses.masked import masked_mean
from nnunet_ssl.losses.pseudo_labels import likeliest_class
from nnunet_ssl.losses.sar import reweight, true_class_confidence
from nnunet_ssl.losses.sdm import signed_distance_maps
from nnunet_ssl.networks.dual_branch import DualBranchUNet, low_level_start_of
from nnunet_ssl.networks.regression_head import regression_head
from nnunet_ssl.ram import ram_limit
from nnunet_ssl.trainers.base import Batch, Stream, full_resolution, nnUNetTrainerSSL
from nnunet_ssl.trainers.sasnet.coordinates import CoordinateLoader, positions
from nnunet_ssl.trainers.sasnet.memory import ConfidenceMemory, moved
from nnunet_ssl.trainers.sasnet.validation import BranchValidation
from nnunet_ssl.trainers.sasnet.views import view_transform
from nnunet_ssl.trainers.settings import SSLSettings

SECONDS_PER_VOXEL = 0.6e-6  # to read and write the memory of confidence on one CPU thread, measured
LATEST = "checkpoint_latest.pth"  # nnU-Net's name of the checkpoint that --c resumes from


@declared
class SASNetSettings(SSLSettings):
    """Settings of SASNet."""

    sasnet_beta: Weight = setting(0.5, "Weight of SEG of each branch", symbol="beta")
    sasnet_gamma: Weight = setting(1.0, "Full weight of PLC and SRC", symbol="gamma")
    # the paper's: 6,000 of their 40,000 steps
    sasnet_rampup: Share = setting(
        0.4, "Share of the training over which gamma grows; `0` starts at its full value", paper=0.15
    )
    sasnet_low_level_start: Whole = setting(
        1,
        "Stages above the bottleneck where the low-level decoder starts; there is no such branch with `0`, nor with "
        "`1` in a network of two stages",
    )
    sasnet_sar: Literal["last_two", "running", "off"] = setting(
        "last_two",
        'Memory of confidence: `"last_two"` visits as in Eq. 4 and 5, `"running"` as in the code, `"off"`',
    )
    sasnet_alpha: Share = setting(0.5, "Factor in Eq. 4 and 5", symbol="alpha")
    sasnet_memory_share: Share = setting(
        0.25,
        "Share of the free GPU memory after the first step, otherwise of the RAM (of the container or job, if that is "
        "less), that the memory of confidence may use; if it needs more, it goes on disk",
    )
    sasnet_sdm: bool = setting(
        True, "Whether to use regression heads, distance maps and SRC; without them SAR has no effect"
    )
    sasnet_plc: Literal["sharpened", "plain", "off"] = setting(
        "sharpened", 'PLC with a sharpened target as in the code, `"plain"` as in Eq. 15, or `"off"`'
    )
    sasnet_temperature: Positive = setting(0.1, "Temperature of the sharpening", symbol="T")
    sasnet_detach_target: bool = setting(False, "No gradient through the sharpened target")
    sasnet_views: Literal["permute", "rotate", "off"] = setting(
        "permute",
        'View variance: exchange axes (or rotate every other sample, if none can be exchanged), `"rotate"` in the '
        'frequency domain, or `"off"`',
    )
    sasnet_view_angle: Angle = setting(
        30.0, "Largest rotation angle (Eq. 10), in degrees; nnU-Net's own rotations go as far", symbol="theta"
    )
    sasnet_validate_branches: bool = setting(
        False,
        "Whether the final validation also runs for each branch alone ([outputs](outputs.md#ssl_logcsv))",
    )

    @model_validator(mode="after")
    def _augmented_by_workers(self) -> SASNetSettings:
        if self.augment == "device":
            raise ValueError(
                "sets 'augment' to 'device', but nnUNetTrainerSASNet takes views and coordinates of its patches from "
                "the workers; leave it out"
            )
        return self


class nnUNetTrainerSASNet(BranchValidation, nnUNetTrainerSSL):  # noqa: N801
    """SASNet: two decoders of different depth on one encoder teach each other, and their fusion's distance map both.

    The network predicts the mean of the two branches' probabilities. Where the authors' code is wrong (confidences of
    another case or branch, labels that were turned another way than their images), this one is not; docs/methods.md
    lists what differs.
    """

    paper = "Li et al., Scale-aware Adaptive Supervised Network with Limited Medical Annotations"
    Settings = SASNetSettings
    supports_regions = False
    inference_trainer = "nnUNetTrainerSASNet"  # its network is not the plans' own
    settings: SASNetSettings
    plans_network: DualBranchUNet

    # ------------------------------------------------------------------ Section 3.1: dual-branch network

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The plans' network with a low-level decoder; weights that are loaded into it set how deep that one is."""
        return dual_branch_network(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )

    def initialize(self) -> None:
        """As the base, with the depth of the low-level decoder that the settings name.

        The default, one stage above the bottleneck, is none in a network of two stages, which has no such stage.
        """
        known = self._start_of_checkpoint
        start = self.settings.sasnet_low_level_start if known is None else known
        if type(self).build_network_architecture is nnUNetTrainerSASNet.build_network_architecture:
            build = functools.partial(dual_branch_network, low_level_start=None if start == 1 else start)
            self.build_network_architecture = build  # a class derived from this one may build another
        super().initialize()
        self.plc = self.compiled(pseudo_label_consistency)
        self.src = self.compiled(segmentation_regression_consistency)
        self._compiles = self._do_i_compile()  # which may write to the log, so not in each step
        if start and self.plans_network.low_decoder is None:
            self.print_to_log_file(
                f"WARNING: the network of '{self.configuration_name}' in {self.plans_manager.plans_name} has two "
                "stages, too few for a low-level branch: SASNet trains its one branch with SEG and SRC."
            )

    @property
    def has_low_branch(self) -> bool:
        """Whether there are two branches; the settings or two stages may leave one."""
        return self.plans_network.low_decoder is not None

    _start_of_checkpoint: int | None = None

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """As the base. With --val no settings are known: the network is built as the checkpoint's was."""
        if not self.was_initialized:
            checkpoint = read_checkpoint(
                filename_or_checkpoint, "Restore it, or start again without --c.", {"network_weights": dict}
            )
            self._start_of_checkpoint = low_level_start_of(checkpoint["network_weights"])
        super().load_checkpoint(filename_or_checkpoint)

    def build_training_modules(self) -> dict[str, nn.Module]:
        """A regression head for each branch, with a map a foreground class.

        Raises:
            UserError: a class derived from this one, or mixed in, builds a network with one decoder.
        """
        if not isinstance(self.plans_network, DualBranchUNet):
            raise UserError(
                f"{type(self).__name__} trains a {type(self.plans_network).__name__}, but SASNet needs two decoders: "
                "let build_network_architecture return nnunet_ssl.networks.dual_branch.DualBranchUNet(network)."
            )
        modules = super().build_training_modules()
        if self.settings.sasnet_sdm:
            for name, decoder in self.plans_network.decoders.named().items():
                num_maps = self.label_manager.num_segmentation_heads - 1
                modules[f"regression_{name}"] = regression_head(decoder.seg_layers[-1], num_maps)
        return modules

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Of both decoders."""
        self.plans_network.set_deep_supervision(enabled)

    # ------------------------------------------------------------------ Section 3.2: scale-aware adaptive reweight

    @property
    def uses_sar(self) -> bool:
        """SAR weighs two branches against each other, for the distance map alone: without either it is not needed."""
        settings = self.settings
        return settings.sasnet_sar != "off" and settings.sasnet_sdm and self.has_low_branch

    def labeled_loader(self) -> type[nnUNetDataLoader]:
        """For SAR each voxel of a patch says where in its case it comes from."""
        return CoordinateLoader if self.uses_sar else super().labeled_loader()

    memory: ConfidenceMemory | None = None
    _memory_may_move: bool = False

    def before_training_state(self) -> None:
        """Make room for the confidence of every labeled voxel."""
        super().before_training_state()
        self.memory = self._confidence_memory() if self.uses_sar else None
        self._memory_may_move = self.memory is not None and self.device.type == "cuda"

    def _confidence_memory(self) -> ConfidenceMemory:
        """In RAM, or on disk where it takes more than the settings' share of the RAM."""
        dataset = self.labeled_dataset()
        # str: where nnU-Net has just made the split, its names are numpy's, which no training state may hold
        shapes = {str(case): tuple(dataset.load_case(case)[0].shape[1:]) for case in dataset.identifiers}
        rule, folder = self.settings.sasnet_sar, None
        needed = ConfidenceMemory.bytes_needed(shapes, rule)
        if needed > self.settings.sasnet_memory_share * ram_limit() / (dist.get_world_size() if self.is_ddp else 1):
            folder = os.path.join(self.output_folder, f"confidence_memory_{self.local_rank}")
        voxels = self.batch_size * math.prod(self.configuration_manager.patch_size)
        self.print_to_log_file(
            f"SASNet remembers the confidence of {len(shapes)} labeled cases: {needed / 2**20:.0f} MiB "
            + (f"on disk in {folder}" if folder else "in RAM")
            + f". There it takes about {voxels * SECONDS_PER_VOXEL:.2g} s of a step"
            + (", unless the GPU has room for it after the first." if self.device.type == "cuda" else ".")
        )
        try:
            return ConfidenceMemory(shapes, rule, folder=folder)
        except OSError as error:
            raise UserError(
                f"SASNet's memory of confidence, {needed / 2**20:.0f} MiB, cannot be kept in {folder} ({error}); make "
                'room there, raise sasnet_memory_share to keep it in RAM, or set sasnet_sar to "off".'
            ) from None

    def after_step(self) -> None:
        """After the first step, the GPU holds all that a step needs: the memory moves there if there is room."""
        super().after_step()
        if self._memory_may_move:
            self._memory_may_move = False
            free, _ = torch.cuda.mem_get_info(self.device)
            if self.memory.nbytes <= self.settings.sasnet_memory_share * free:
                self.memory.to(self.device)
                self.print_to_log_file(f"SASNet's memory of confidence is on {self.device} from now on.")
            else:
                self.print_to_log_file(
                    f"The GPU has {free / 2**20:.0f} MiB left, so SASNet's memory of confidence stays where it is, and "
                    "each step waits for it; a larger sasnet_memory_share moves it to the GPU."
                )

    def _fused_labels(self, stream: Stream, prob: Branches) -> Tensor:
        """The class with the largest fused probability, ``[B, *patch]``, of probabilities ``[B, K, *patch]``.

        Labeled: the weighted sum of Eq. 4-6; the softmax of Eq. 6 does not change which is the largest. Unlabeled:
        the mean of both branches.
        """
        if prob.low is None:
            return likeliest_class(prob.high)[:, 0]
        plain = prob.high + prob.low
        if self.memory is None or stream.target is None:
            return likeliest_class(plain)[:, 0]
        labels = full_resolution(stream.target)[:, 0]
        now = Branches(*(true_class_confidence(p, labels) for p in prob))  # Eq. 7-8
        ignored = (labels < 0) | (labels >= prob.high.shape[1])
        for name, confidence in now.named().items():
            self.log_value(f"confidence_{name}", masked_mean(confidence, ~ignored))
        visit = torch.stack(now, 1).masked_fill_(ignored[:, None], float("nan"))  # which the memory does not write
        coordinates, visit = moved(self.memory.device, positions(stream.coordinates, plain.shape[2:]), visit)

        read = torch.stack([self.memory.read(c, x) for c, x in zip(stream.cases, coordinates, strict=True)])
        (before,) = moved(plain.device, read)
        fused = likeliest_class(reweight(prob, Branches(*before.unbind(1)), self.settings.sasnet_alpha))
        changed = (plain.gather(1, fused) < plain.amax(1, keepdim=True))[:, 0]
        self.log_value("sar_changed", masked_mean(changed.float(), ~ignored))
        for case, x, confidence in zip(stream.cases, coordinates, visit, strict=True):
            self.memory.write(case, x, confidence)
        return fused[:, 0]

    def training_state(self, filename: str) -> dict[str, Any]:
        """The memory of confidence, in the latest checkpoint alone.

        Nothing is trained after the final one. The best one is written up to once an epoch, and --c takes it only
        where there is no latest.
        """
        state = super().training_state(filename)
        if self.memory is not None and os.path.basename(filename) == LATEST:
            state["memory"] = self.memory.state()
        return state

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Load the memory, or start with an empty one if the checkpoint has none."""
        super().load_training_state(state)
        if self.memory is None or self.current_epoch >= self.num_epochs:
            return
        if "memory" not in state:
            self.print_to_log_file(
                f"WARNING: the memory of confidence is only kept with {LATEST}, so it starts empty: until a voxel has "
                "been seen again, SAR weighs both branches equally."
            )
            return
        try:
            self.memory.load_state(state["memory"])
        except ValueError as error:
            raise UserError(
                f"{self.output_folder} cannot be continued: {error}. Restore the split and the prepared images "
                "that the run was started with, or start again without --c."
            ) from None

    # ------------------------------------------------------------------ Section 3.3: view variance

    def view_transform(self) -> BasicTransform | None:
        """Axes exchanged, or the image turned in the frequency domain, which is also what is done if none can be."""
        plan, wanted = self.configuration_manager, self.settings.sasnet_views
        outside = self.label_manager.ignore_label or 0
        transform = view_transform(wanted, plan.patch_size, plan.spacing, self.settings.sasnet_view_angle, outside)
        patch = f"'{self.configuration_name}' (patch {list(plan.patch_size)}, spacing {list(plan.spacing)})"
        if wanted == "permute" and isinstance(transform, RandomTransform):
            self.print_to_log_file(
                f"SASNet: no two axes of {patch} can be exchanged, so every other sample is rotated."
            )
        elif wanted != "off" and transform is None:
            self.print_to_log_file(
                f"WARNING: no two axes of {patch} have the same spacing, so SASNet trains without view variance."
            )
        return transform

    # ------------------------------------------------------------------ Section 3.4: objectives

    def term_weights(self) -> dict[str, float]:
        """beta L_seg + gamma (L_plc + L_src), gamma along a sigmoid."""
        gamma = self.settings.sasnet_gamma * self.rampup(self.settings.sasnet_rampup)
        weights = {f"seg_{name}": self.settings.sasnet_beta for name in Branches._fields}
        return {**super().term_weights(), **weights, "plc": gamma, "src": gamma}

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """A pass for each stream. What is taken on the whole batch is the mean over the two streams."""
        uses_unlabeled = self.settings.sasnet_sdm or (self.has_low_branch and self.settings.sasnet_plc != "off")
        for stream in batch if uses_unlabeled else (batch.labeled,):
            yield self._terms(stream, self.forward("first", stream))  # no name here keeps logits alive

    def _terms(self, stream: Stream, branches: Branches) -> dict[str, Tensor]:
        terms, outputs = {}, branches.named()
        if stream.target is not None:  # L_seg, Eq. 12-14: nnU-Net's own Dice and cross-entropy
            for name, branch in outputs.items():
                terms[f"seg_{name}"] = self._segmentation_loss(branch.logits, stream.target)

        logits = Branches(**{name: full_resolution(branch.logits) for name, branch in outputs.items()})
        if self.settings.sasnet_plc != "off" and logits.low is not None:  # L_plc, Eq. 15
            temperature = self.settings.sasnet_temperature if self.settings.sasnet_plc == "sharpened" else None
            terms["plc"] = 0.5 * self.plc(logits, temperature, self.settings.sasnet_detach_target)

        if self.settings.sasnet_sdm:  # L_src, Eq. 16
            sdm, present = self._distance_maps(stream, logits)
            terms["src"] = 0.5 * sum(
                self.src(self.training_modules[f"regression_{name}"](branch.feature), sdm, present)
                for name, branch in outputs.items()
            )
        return terms

    def _segmentation_loss(self, logits: list[Tensor] | Tensor, target: list[Tensor] | Tensor) -> Tensor:
        """nnU-Net's. The weights of a branch's outputs sum to 1, also where it lacks the coarse ones."""
        loss = self.loss(logits, target)
        return loss / sum(self.loss.weight_factors[: len(logits)]) if self.enable_deep_supervision else loss

    @torch.no_grad()
    def _distance_maps(self, stream: Stream, logits: Branches) -> tuple[Tensor, Tensor]:
        """P_sdm of each foreground class, ``[B, K - 1, *patch]``, and which of them have a boundary, ``[B, K - 1]``."""
        prob = Branches(**{name: self.probabilities(x) for name, x in logits.named().items()})
        fused = self._fused_labels(stream, prob)
        return signed_distance_maps(fused, prob.high.shape[1], self.configuration_manager.spacing, self._compiles)


def dual_branch_network(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    enable_deep_supervision: bool = True,
    low_level_start: int | None = None,
) -> DualBranchUNet:
    """nnU-Net's network of the plans with two decoders; arguments as in nnU-Net and :class:`DualBranchUNet`."""
    network = nnUNetTrainer.build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
    )
    return DualBranchUNet(network, low_level_start)
