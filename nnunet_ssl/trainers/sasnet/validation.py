"""Validation of SASNet: its two branches together, which is what predicts, and each of them alone."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor
from torch.utils._pytree import tree_map

from nnunet_ssl.losses.branches import Branches
from nnunet_ssl.networks.dual_branch import mean_of_branches


class BranchValidation(nnUNetTrainer):
    """nnU-Net's validation, run once and scored for high, low, and both."""

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's, for both branches together, and for each alone, to be logged; the network runs once."""
        if not self.has_low_branch:
            return super().validation_step(batch)
        network = self.network
        images, target = tree_map(lambda x: x.to(self.device, non_blocking=True), (batch["data"], batch["target"]))
        with self._branch("each"), self.autocast():
            logits = network(images)
        results = {}
        try:
            for name, outputs in {**logits.named(), "both": mean_of_branches(logits)}.items():
                self.network = functools.partial(_already, outputs)
                own = deepcopy(target)  # nnU-Net overwrites ignored voxels of it
                results[name] = super().validation_step({**batch, "data": images, "target": own})
        finally:
            self.network = network
        alone = {
            f"{key}_{name}": results[name][key]
            for name in Branches._fields
            for key in ("tp_hard", "fp_hard", "fn_hard")
        }
        return {**results["both"], **alone}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """As nnU-Net; and log the Dice of high, low and both."""
        super().on_validation_epoch_end(val_outputs)
        self.log_value("dice_both", float(self.logger.get_value("mean_fg_dice", step=-1)))
        if self.has_low_branch:
            for name in Branches._fields:
                counts = [sum(out[f"{key}_hard_{name}"] for out in val_outputs) for key in ("tp", "fp", "fn")]
                counts = torch.as_tensor(np.stack(counts), device=self.device)
                if self.is_ddp:
                    dist.all_reduce(counts)
                tp, fp, fn = counts
                self.log_value(f"dice_{name}", (2 * tp / (2 * tp + fp + fn)).nanmean())

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's, of both branches together; if asked for, of each alone before, in ``validation_<branch>``."""
        if not (self.has_low_branch and self.settings.sasnet_validate_branches):
            return super().perform_actual_validation(save_probabilities)
        folder, plan, dice = self.output_folder, self.configuration_manager, {}
        for name in Branches._fields:
            self.output_folder = os.path.join(folder, f"validating_{name}")  # not to touch what ``validation`` holds
            # the next stage of a cascade learns from both together
            self.configuration_manager = ConfigurationManager({**plan.configuration, "next_stage": None})
            try:
                with self._branch(name):
                    super().perform_actual_validation(False)
            finally:
                self.output_folder, done, self.configuration_manager = folder, self.output_folder, plan
            if self.local_rank == 0:  # nnU-Net has waited until all have written
                dice[name] = _foreground_dice(os.path.join(done, "validation"))
                kept = os.path.join(folder, f"validation_{name}")
                shutil.rmtree(kept, ignore_errors=True)
                os.replace(os.path.join(done, "validation"), kept)
                os.rmdir(done)
        super().perform_actual_validation(save_probabilities)
        if self.local_rank == 0:
            dice["both"] = _foreground_dice(os.path.join(folder, "validation"))
            self.print_to_log_file("Validation Dice: " + ", ".join(f"{k} {v:.4f}" for k, v in dice.items()))

    @contextmanager
    def _branch(self, name: str) -> Iterator[None]:
        self.plans_network.branch = name
        try:
            yield
        finally:
            self.plans_network.branch = "both"


def _already(outputs: list[Tensor], _images: Tensor) -> list[Tensor]:
    """What stands for the network where its outputs are known."""
    return outputs


def _foreground_dice(folder: str) -> float:
    """The mean that nnU-Net's validation wrote."""
    with open(os.path.join(folder, "summary.json"), encoding="utf-8") as file:
        return json.load(file)["foreground_mean"]["Dice"]
