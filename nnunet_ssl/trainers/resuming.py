"""Checkpoints and ``--c``: nnU-Net's own file, and the training state next to it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_ssl import __version__
from nnunet_ssl.checkpoints import read_checkpoint, save_whole
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json, writing
from nnunet_ssl.names import a_few
from nnunet_ssl.trainers.settings import ENVIRONMENT_VARIABLE, SSLSettings, settings_from_dict

# the keys of a checkpoint that nnU-Net reads to resume
CHECKPOINT = {
    "network_weights": dict,
    "optimizer_state": dict,
    "logging": dict,
    "init_args": dict,
    "current_epoch": int,
}


TAKEN_BY_C = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")  # the first that exists


class Resuming(nnUNetTrainer):
    """A run that was stopped resumes as if it had not been."""

    run_id: str | None = None  # tells a run from others in its folder, whose checkpoints stay when it is begun anew

    def places_before(self) -> list[dict[str, str]]:
        """The machines and versions that this run was made with until now."""
        remedy = "Restore it, or start again without --c."
        return read_json(self.settings_file, remedy, keys={"settings": dict}).get("made_on", [])

    def _settings_in_force(self, override: SSLSettings, continue_training: bool) -> SSLSettings:
        """``override``, or with ``--c`` what the run was started with; with a seed in any case."""
        if continue_training and (stored := self._settings_of_the_run()) is not None:
            if os.environ.get(ENVIRONMENT_VARIABLE):
                if override.seed is None:
                    override = dataclasses.replace(override, seed=stored.seed)
                for field in dataclasses.fields(stored):
                    was, now = getattr(stored, field.name), getattr(override, field.name)
                    if was != now:
                        raise UserError(
                            f"{os.environ[ENVIRONMENT_VARIABLE]} sets '{field.name}' to {now!r}, but the run in "
                            f"{self.output_folder} was started with {was!r}; unset {ENVIRONMENT_VARIABLE} to continue "
                            "it, or start again without --c."
                        )
            return stored
        drawn = [secrets.token_hex(8), secrets.randbits(31)]
        if self.is_ddp:
            dist.broadcast_object_list(drawn, src=0)
        self.run_id, seed = drawn
        return override if override.seed is not None else dataclasses.replace(override, seed=seed)

    def _settings_of_the_run(self) -> SSLSettings | None:
        """Of the run that ``--c`` continues: the one whose checkpoint nnU-Net takes; None where there is none.

        A run that was begun anew in the folder has replaced ``ssl_settings.json``, but no checkpoint before its own.

        Raises:
            UserError: it has left a checkpoint since, and nnU-Net takes that of the earlier run.
        """
        files = [os.path.join(self.output_folder, name) for name in TAKEN_BY_C]
        files = [file for file in files if os.path.isfile(file)]
        record = {}
        if os.path.isfile(self.settings_file):
            remedy = "Restore it, or start again without --c."
            record = read_json(self.settings_file, remedy, keys={"settings": dict})
        state = _peek(files[0]) if files else None
        self.run_id = (record if state is None else state).get("run")
        if state is None or (record and self.run_id == record.get("run")):
            return settings_from_dict(self.Settings, record["settings"], self.settings_file) if record else None
        for file in files[1:] if record else ():
            if (later := _peek(file)) is not None and later.get("run") == record.get("run"):
                raise UserError(
                    f"{files[0]} is of an earlier run than {os.path.basename(file)}, and --c takes it first. To "
                    f"continue the later run, move it and {os.path.basename(training_state_file(files[0]))} away."
                )
        self.print_to_log_file(
            f"nnunet_ssl: continuing the run of {files[0]}, with its settings"
            + ("; a later one has left no checkpoint." if record else ".")
        )
        return settings_from_dict(self.Settings, state["settings"], training_state_file(files[0]))

    def _refuse_other_images(self, what: str, now: dict[str, str], then: dict[str, str]) -> None:
        """Refuse ``--c`` if the images, case -> digest, differ from the images of the run."""
        differences = {
            "added": sorted(now.keys() - then.keys()),
            "removed": sorted(then.keys() - now.keys()),
            "changed": sorted(case for case in now.keys() & then.keys() if now[case] != then[case]),
        }
        told = [f"{len(cases)} {how} ({a_few(cases)})" for how, cases in differences.items() if cases]
        if told:
            raise UserError(
                f"{self._resumed_from} was trained with other {what} than are there now: {', '.join(told)}. "
                "Put them back to continue it, or start again without --c (-pretrained_weights "
                f"{self._resumed_from} keeps what was learned)."
            )

    def save_checkpoint(self, filename: str) -> None:
        """Write a plain nnU-Net checkpoint of the plans' network, and the training state in a file next to it.

        Either file is replaced whole. A kill between the two leaves the new checkpoint and, under a temporary name, the
        new state; resuming finds it.

        Raises:
            UserError: there is no room, or no right to write. The last checkpoint of this name and its state are kept.
        """
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        with nullcontext() if self.average is None else self.average.predicting(self.plans_network):
            self._save_pair(filename)

    def _save_pair(self, filename: str) -> None:
        checkpoint = {
            "network_weights": self.plans_network.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            "trainer_name": self.trainer_of_checkpoints(),
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
        }
        state = {
            "trainer": type(self).__name__,
            "run": self.run_id,
            "settings": dataclasses.asdict(self.settings),
            "epoch": self.current_epoch + 1,
            "network": fingerprint(self.plans_network),
            "unlabeled": None if self.unlabeled is None else self.unlabeled.contents,
            "warps": None if self.warps is None else self.warps.contents,
            "modules": self.training_modules.state_dict(),
            "optimizer": None if self.training_optimizer is None else self.training_optimizer.state_dict(),
            "own_optimizers": {name: own.state_dict() for name, own in self.own_optimizers.items()},
            "method": self.training_state(filename),
        }
        state_file = training_state_file(filename)
        with self._writing():
            save_whole(state, state_file + ".new")
            try:
                save_whole(checkpoint, filename)
            except OSError:
                os.remove(state_file + ".new")  # the old checkpoint stays, with its state
                raise
            os.replace(state_file + ".new", state_file)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Around what writes into the fold's folder."""
        with writing("The last checkpoint is kept: make room or make it writable, and resume with --c."):
            try:
                yield
            except OSError as error:
                error.filename = error.filename or self.output_folder
                raise

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """As nnU-Net. The training state is read only when training resumes, so ``--val`` needs only the checkpoint.

        Raises:
            UserError: it is damaged, could run code, or is of another network.
        """
        remedy = "Restore it, or move it away: --c resumes from the first that exists of checkpoint_final.pth, "
        remedy += "checkpoint_latest.pth and checkpoint_best.pth."
        # before nnU-Net reads it, which runs what a stranger may have put into it
        read_checkpoint(filename_or_checkpoint, remedy, CHECKPOINT)
        if not self.was_initialized:  # what may fail there is not the checkpoint's fault
            self.initialize()
        try:
            super().load_checkpoint(filename_or_checkpoint)
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"{filename_or_checkpoint} does not fit the network that {type(self).__name__} trains with "
                f"{self.plans_manager.plans_name} ({_first_line(error)}). {remedy}"
            ) from error
        self._resumed_from = filename_or_checkpoint
        # nnU-Net compares an epoch with the best one after it has saved the latest checkpoint
        if values := self.logger.get_value("ema_fg_dice", step=None):
            self._best_ema = functools.reduce(lambda best, value: value if value > best else best, values)

    def _load_training_state(self, filename: str) -> None:
        """Take the training state that was written with the checkpoint that has been loaded.

        Raises:
            UserError: if there is none, or it belongs to another checkpoint.
        """
        candidate, state = find_training_state(filename, self.plans_network)
        if state is None:
            what = "belongs to another checkpoint or is damaged" if os.path.isfile(filename) else "is missing"
            raise UserError(
                f"the training state {filename} {what}, so {self._resumed_from} cannot be continued; restore the file, "
                f"or start again without --c (-pretrained_weights {self._resumed_from} keeps what was learned). "
                "Validating with --val does not need it."
            )
        self.run_id = state.get("run")
        stored = settings_from_dict(self.Settings, state.get("settings"), filename)  # new ones have their defaults
        if stored != self.settings:
            names = [
                field.name
                for field in dataclasses.fields(stored)
                if getattr(stored, field.name) != getattr(self.settings, field.name)
            ]
            raise UserError(
                f"{self._resumed_from} was trained with other settings than {self.settings_file} has "
                f"({', '.join(names)}): undo the change of that file, or start again without --c."
            )
        for what, key, prepared in (
            ("unlabeled images", "unlabeled", self.unlabeled if self.uses_unlabeled else None),
            ("warps", "warps", self.warps),
        ):
            if state.get(key) is None or prepared is None:
                continue
            if self.current_epoch < self.num_epochs:
                self._refuse_other_images(what, prepared.contents, state[key])
            else:  # only validation is left: what the run learned from stays on record
                setattr(self, key, dataclasses.replace(prepared, contents=state[key]))
        if self.is_ddp:
            dist.barrier()  # all have read
        if candidate != filename and self.local_rank == 0:
            os.replace(candidate, filename)  # finish what a kill cut off
        try:
            self.training_modules.load_state_dict(state["modules"])
            if self.average is not None:
                self.average.in_network = True  # as the checkpoint was saved
            # copied: what they keep as it is must not be a view of the file, which the next save replaces
            if self.training_optimizer is not None:
                self.training_optimizer.load_state_dict(deepcopy(state["optimizer"]))
            for name, own in self.own_optimizers.items():
                own.load_state_dict(deepcopy(state["own_optimizers"][name]))
            self.load_training_state(state["method"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"the training state {filename} is not one of {type(self).__name__} in nnunet_ssl {__version__} "
                f"({_first_line(error)}). Continue with the version that wrote it, or start again without "
                f"--c (-pretrained_weights {self._resumed_from} keeps what was learned)."
            ) from error

    def on_train_end(self) -> None:
        """As nnU-Net, which removes checkpoint_latest.pth; its training state goes with it."""
        super().on_train_end()
        if self.local_rank == 0:
            state_file = training_state_file(os.path.join(self.output_folder, "checkpoint_latest.pth"))
            for file in (state_file, state_file + ".new"):
                Path(file).unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    """Of what torch says in many, without the stop that a sentence around it has."""
    return next(iter(str(error).splitlines()), type(error).__name__).strip().rstrip(".:")


def training_state_file(checkpoint_file: str) -> str:
    """``checkpoint_latest.pth`` -> ``checkpoint_latest_ssl.pth``."""
    return f"{checkpoint_file.removesuffix('.pth')}_ssl.pth"


def _states(filename: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The training states that can be read: the one of this name, and what a kill has left under its temporary name."""
    for candidate in (filename, filename + ".new"):
        try:
            state = torch.load(candidate, map_location="cpu", weights_only=True, mmap=os.name != "nt")
        except MemoryError:
            raise
        except Exception:  # missing, cut short, or something else altogether
            continue
        if isinstance(state, dict):
            yield candidate, state


def _peek(checkpoint_file: str) -> dict[str, Any] | None:
    """The training state beside a checkpoint, to look at its run and settings; None where none can be read."""
    states = (state for _, state in _states(training_state_file(checkpoint_file)))
    return next((state for state in states if isinstance(state.get("settings"), dict)), None)


def find_training_state(filename: str, network: nn.Module) -> tuple[str | None, dict[str, Any] | None]:
    """The training state that was written with a checkpoint, and the file that holds it.

    Its tensors are on the CPU, where they are views of the file: what is large is read when it is used, and never whole
    into RAM. A GPU may not have room for all of it twice.

    Args:
        filename: of ``training_state_file``; after a kill in ``save_checkpoint`` the state may still end in ``.new``.
        network: the plans' network with the checkpoint's weights.

    Returns:
        ``(file, state)``; ``(None, None)`` where none fits: missing, damaged, or of another checkpoint.
    """
    expected = fingerprint(network)
    fitting = ((file, state) for file, state in _states(filename) if state.get("network") == expected)
    return next(fitting, (None, None))


def fingerprint(module: nn.Module) -> str:
    """A digest of all parameters and buffers of ``module``."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
