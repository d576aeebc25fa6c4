"""What happens once an epoch: seeds, the log, and the end of a training that is lost."""

from __future__ import annotations

import math
import os

import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnunet_ssl.errors import UserError
from nnunet_ssl.randomness import derived_seed
from nnunet_ssl.trainers.settings import ENVIRONMENT_VARIABLE


class Epoch(nnUNetTrainer):
    """nnU-Net's epoch, with the terms of the losses in its log."""

    def _refuse_epochs_that_will_not_be(self) -> None:
        """Only here, since a class derived from this one may have set the number of epochs after our ``__init__``."""
        if beyond := [epoch for epoch in self.settings.keep_epochs if epoch > self.num_epochs]:
            raise UserError(
                f"{os.environ.get(ENVIRONMENT_VARIABLE) or self.settings_file} sets 'keep_epochs' to "
                f"{list(self.settings.keep_epochs)}, but this training ends with epoch {self.num_epochs}; leave out "
                f"{beyond[0]}, or train longer with -tr <trainer>_<N>epochs."
            )

    def on_train_epoch_start(self) -> None:
        """As nnU-Net; and seed what the step itself may draw, such as dropout."""
        super().on_train_epoch_start()
        self.training_modules.train()
        if self.average is not None:
            self.average.exchange(self.plans_network, in_network=False)
        if self.training_lr_scheduler is not None:
            self.training_lr_scheduler.step(self.current_epoch)
        self.global_step = self.current_epoch * self.num_iterations_per_epoch
        torch.manual_seed(derived_seed(self.settings.seed, "epoch", self.current_epoch, self.local_rank))

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Read the epoch's losses from the device, all at once, and give them to nnU-Net's log."""
        losses = torch.stack([output["loss"] for output in train_outputs])
        self._end_if_lost(losses)
        super().on_train_epoch_end([{"loss": loss} for loss in losses.cpu().numpy()])

    def _end_if_lost(self, losses: Tensor) -> None:
        """End a training that will not recover, before it overwrites a checkpoint.

        With half precision a step may overflow, and is left out; a whole epoch of them is no training, and weights that
        are not finite stay so.

        Raises:
            UserError: on all ranks, if it is lost on any.
        """
        parameters = [*self.plans_network.parameters(), *self.training_modules.parameters()]
        broken = ~torch.stack([p.detach().isfinite().all() for p in parameters]).all()
        lost = torch.stack([~losses.isfinite().any(), broken]).int()
        if self.is_ddp:
            dist.all_reduce(lost, dist.ReduceOp.MAX)
        no_loss, broken = lost.tolist()
        if not (no_loss or broken):
            return
        terms = [name for name, value in self._mean_values().items() if not math.isfinite(value)]
        message = (
            f"{self.output_folder}: in epoch {self.current_epoch} "
            + ("no step had a finite loss" if no_loss else "the weights became NaN or infinite")
            + (f" ({', '.join(terms)})" if terms else "")
            + f". The training ends here; checkpoints of earlier epochs are kept. Look at {self.settings_file}, and "
            "start again with smaller weights of the terms, or with a smaller initial_lr in your own trainer."
        )
        self.print_to_log_file(message)
        raise UserError(message)

    def on_validation_epoch_start(self) -> None:
        """As nnU-Net, with the weights that predict; they stay until training continues."""
        super().on_validation_epoch_start()
        if self.average is not None:
            self.average.exchange(self.plans_network, in_network=True)

    def on_epoch_end(self) -> None:
        """Log the terms; let nnU-Net log, save and draw; keep the checkpoints that the settings name."""
        epoch, values = self.current_epoch, self._mean_values()
        if self.local_rank == 0:
            with self._writing():
                self.ssl_log.add(epoch, values)
            for logger in self.logger.loggers:
                for name, value in values.items():
                    logger.log(name, value, epoch)
            self.print_to_log_file(", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        if epoch + 1 in self.settings.keep_epochs:  # before the latest one, or a kill in between would skip it
            self.save_checkpoint(os.path.join(self.output_folder, f"checkpoint_epoch{epoch + 1}.pth"))
        with self._writing():  # nnU-Net's own curves
            super().on_epoch_end()

    def _mean_values(self) -> dict[str, float]:
        """The means of what ``log_value`` was given in this epoch, over the ranks as well."""
        sums = [torch.as_tensor(total / count, device=self.device) for total, count in self._sums.values()]
        names, self._sums = list(self._sums), {}
        means = torch.stack([s.float() for s in sums])
        if self.is_ddp:
            dist.all_reduce(means)
            means /= dist.get_world_size()
        return dict(zip(names, means.tolist(), strict=True))
