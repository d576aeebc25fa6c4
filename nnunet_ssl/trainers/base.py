"""The base of every trainer: two streams of batches, one step, and the training state next to a checkpoint.

A method is a subclass with a ``Settings`` dataclass and a ``losses`` generator. Everything that nnU-Net does already
(plans, datasets, transforms, schedules, validation, export) is inherited.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from filelock import BaseFileLock
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunet_ssl import __version__
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import write_json
from nnunet_ssl.locks import take
from nnunet_ssl.losses.ramps import sigmoid_rampup
from nnunet_ssl.networks.average import WeightAverage
from nnunet_ssl.networks.feature_tap import FeatureTap
from nnunet_ssl.randomness import derived_seed, seeded
from nnunet_ssl.shapes.wish import WarpedFolder
from nnunet_ssl.surroundings import surroundings
from nnunet_ssl.trainers.data import Data
from nnunet_ssl.trainers.epoch import Epoch
from nnunet_ssl.trainers.log import SSLLog
from nnunet_ssl.trainers.optimizers import Optimizers, take_from_first_rank
from nnunet_ssl.trainers.prediction import Prediction, unwrapped
from nnunet_ssl.trainers.resuming import Resuming, training_state_file
from nnunet_ssl.trainers.settings import ENVIRONMENT_VARIABLE, SSLSettings, load_settings
from nnunet_ssl.trainers.step import Batch, Step, Stream, full_resolution
from nnunet_ssl.unlabeled.folds import refuse_fold
from nnunet_ssl.unlabeled.store import PreparedFolder

LOCK = ".lock"  # in the fold's folder, held by who trains or validates there
PATIENCE = 10.0  # seconds for a run that was killed to be gone: it may still have to give its memory back


class nnUNetTrainerSSL(Step, Epoch, Optimizers, Data, Resuming, Prediction):  # noqa: N801
    """Base of the semi-supervised trainers; not for use by itself.

    A subclass writes ``losses``, and where it needs them ``term_weights``, ``build_training_modules``,
    ``build_own_optimizers`` and ``training_state``.

    Reproducibility: with the same seed, software and device, initial weights and the content and order of all
    batches are the same, no matter how many workers there are and where a run was interrupted. So on the CPU, with the
    same number of threads, a resumed run ends with the weights of an uninterrupted one, bit for bit. On a GPU cuDNN
    chooses algorithms by speed, as nnU-Net wants it, and the last bits differ from run to run.

    Raises:
        UserError: at the start, if the settings, the plans, the unlabeled images or the training state cannot work, or
            another process works in the fold's folder.
    """

    paper: ClassVar[str] = ""
    Settings: ClassVar[type[SSLSettings]] = SSLSettings
    uses_unlabeled: ClassVar[bool] = True
    supports_regions: ClassVar[bool] = True
    epochs: ClassVar[int | None] = None  # set by the <trainer>_<N>epochs classes

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  (nnU-Net's own signature)
    ) -> None:
        self._refuse_what_cannot_work(PlansManager(plans), configuration, dataset_json)
        continue_training = plans["continue_training"]  # nnU-Net removes it
        override = load_settings(self.Settings, os.environ.get(ENVIRONMENT_VARIABLE))
        # before nnU-Net's loggers, which replace files of a running training, and before any of them is read
        self._fold_lock = self._lock_fold(PlansManager(plans), configuration, fold)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.settings = self._settings_in_force(override, continue_training)
        self.num_iterations_per_epoch = self.settings.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = self.settings.num_val_iterations_per_epoch
        self.save_every = self.settings.save_every
        self.global_step = 0
        self.average: WeightAverage | None = None
        self.unlabeled: PreparedFolder | None = None
        self.warps: WarpedFolder | None = None
        self.transforms_on_device = {}
        self._resumed_from: str | None = None
        self._sums: dict[str, list] = {}
        self._terms_of_features: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ what a method writes

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """Yield the named terms of one pass after the other; the base backpropagates each before it asks for more.

        Each term is a 0-dim tensor, without its weight (see ``term_weights``). What is yielded is backpropagated and
        freed at once, so no two passes may share a graph; only with ``passes: joint`` is all of it held to the end. A
        term may come in several passes; the parts add up.
        """
        raise NotImplementedError

    def term_weights(self) -> dict[str, float]:
        """The weights of terms at ``self.global_step``; a term that is not named has weight 1."""
        return {}

    def build_training_modules(self) -> dict[str, nn.Module]:
        """Modules that only training needs, by name, in ``self.training_modules`` from then on.

        They go to the device, learn by nnU-Net's rule unless ``build_own_optimizers`` says otherwise, are clipped each
        by itself, saved next to the checkpoint and resumed. Prediction never sees them. Build each under
        ``self.seeded(name)``, so that one module does not change the initial weights of another.
        """
        return {}

    def build_own_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Optimizers of parameters of ``self.training_modules`` that shall not have nnU-Net's, by a name for each.

        The base steps them with its own, after the same clipping and under the same scaler, saves and resumes them. It
        leaves out one whose parameters got no gradient in a step. Learning rates stay as they are built, unless the
        method changes them. An adversary that judges takes no gradient: see :func:`nnunet_ssl.networks.frozen.frozen`.
        """
        return {}

    def networks(self) -> dict[str, nn.Module]:
        """The networks that ``forward`` may run, by name, compiled where nnU-Net compiles its own.

        ``first`` is the plans' own, which predicts, or runs it together with what only trains; others, twins and
        teachers, are of ``self.training_modules``.
        """
        return {"first": self.plans_network}

    def tapped_networks(self) -> set[str]:
        """Names of the networks whose last decoder feature is wanted: see ``forward_with_feature``, ``on_feature``."""
        return set()

    def on_feature(self, name: str, stream: Stream, feature: Tensor) -> dict[str, Tensor]:
        """Terms that depend on the last decoder feature of a tapped network, in any method that runs it.

        For what is added to a method, as SHTA is; a method itself calls ``forward_with_feature``.

        Args:
            name: of the network.
            stream: what it ran on, in a pass with gradient; with a target if the images are labeled.
            feature: ``[B, C, *patch]``.

        Returns:
            Terms, which are added to those that the method yields next.
        """
        return {}

    def before_training_state(self) -> None:
        """What a method makes at the start of a training, before ``load_training_state`` may fill it."""

    def after_step(self) -> None:
        """What follows each step, when all optimizers have stepped: a teacher's update, for instance."""

    def labeled_loader(self) -> type[nnUNetDataLoader]:
        """The class that serves labeled batches: nnU-Net's own, or one that says more of each patch."""
        return nnUNetDataLoader

    def view_transform(self) -> BasicTransform | None:
        """A spatial transform to end nnU-Net's own augmentation with, of labeled and unlabeled patches alike."""
        return None

    def training_state(self, filename: str) -> dict[str, Any]:
        """State that must survive ``--c``, in addition to modules and optimizers: tensors and plain types.

        Args:
            filename: of the checkpoint that it belongs to.
        """
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take back what ``training_state`` gave."""

    # ------------------------------------------------------------------ what a method calls

    def forward(self, name: str, stream: Stream) -> list[Tensor] | Tensor:
        """Run a network on a stream. With gradient, the terms of ``on_feature`` join those that are yielded next.

        Args:
            name: a name of ``networks()``.
            stream: images, and their target if they are labeled.

        Returns:
            The network's outputs: with deep supervision a list, full resolution first.
        """
        return self.forward_with_feature(name, stream)[0]

    def forward_with_feature(self, name: str, stream: Stream) -> tuple[list[Tensor] | Tensor, Tensor | None]:
        """As ``forward``; and the last decoder feature ``[B, C, *patch]``, None if the network is not tapped."""
        if name not in self.tapped_networks():
            return self._runnable[name](stream.images), None
        outputs, feature = self._runnable[name](stream.images)
        if torch.is_grad_enabled():
            for term, value in self.on_feature(name, stream, feature).items():
                self._terms_of_features[term] = self._terms_of_features.get(term, 0.0) + value
        return outputs, feature

    def take_terms_of_features(self) -> dict[str, Tensor]:
        """The terms that would join those yielded next, for a method that runs another network before it yields."""
        terms, self._terms_of_features = self._terms_of_features, {}
        return terms

    def probabilities(self, outputs: list[Tensor] | Tensor) -> Tensor:
        """What a network's outputs say at full resolution, float32 ``[B, K, *patch]``: softmax, of regions sigmoid."""
        logits = full_resolution(outputs)
        return logits.float().sigmoid() if self.label_manager.has_regions else logits.softmax(1, dtype=torch.float32)

    @property
    def full_resolution_loss(self) -> nn.Module:
        """nnU-Net's loss of one output ``[B, K, *patch]`` and its target, without deep supervision."""
        return self.loss.loss if self.enable_deep_supervision else self.loss

    def compiled(self, function: Callable) -> Callable:
        """``function``, compiled where nnU-Net compiles its network; call this once, in ``initialize``.

        For networks, and for losses of some length, which then write and keep few of their maps.
        """
        return torch.compile(function) if self._do_i_compile() else function

    def log_value(self, name: str, value: Tensor | float) -> None:
        """Add ``value`` to the epoch's mean of ``name``. Tensors stay on their device until the epoch ends."""
        total = self._sums.setdefault(name, [0.0, 0])
        total[0] = total[0] + (value.detach().float() if isinstance(value, Tensor) else value)
        total[1] += 1

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all GPUs, in place; without others the values as they are."""
        if self.is_ddp:
            dist.all_reduce(values)
        return values

    def seeded(self, *purpose: str | int) -> AbstractContextManager[None]:
        """A context whose random draws follow from the run's seed and ``purpose``, on every rank alike."""
        return seeded(self.settings.seed, *purpose)

    def draws(self, *purpose: str | int) -> np.random.Generator:
        """Random numbers on the host that follow from the run's seed, this step, this rank and ``purpose``."""
        return np.random.default_rng(derived_seed(self.settings.seed, *purpose, self.global_step, self.local_rank))

    def require_decoder(self, network: nn.Module, what_for: str) -> None:
        """Refuse a network without the parts of nnU-Net's U-Nets.

        Args:
            network: of ``networks()``.
            what_for: "to ...", for the message.

        Raises:
            UserError: it has no ``encoder``, or no ``decoder.seg_layers``.
        """
        if not (hasattr(network, "encoder") and hasattr(getattr(network, "decoder", None), "seg_layers")):
            raise UserError(
                f"{type(self).__name__} cannot train the {type(network).__name__} of {self.plans_manager.plans_name}: "
                f"it has no encoder and decoder.seg_layers {what_for}; use plans with one of nnU-Net's U-Nets, or "
                "nnUNetTrainerCPS."
            )

    def rampup(self, share: float) -> float:
        """What a weight is multiplied with at this step, when it grows over so much of the training: up to 1."""
        return sigmoid_rampup(self.global_step, share * self.total_steps)

    @property
    def uses_warps(self) -> bool:
        """Whether some labeled patches are of warps."""
        return max(self.settings.warped_share, self.settings.warped_share_last or 0.0) > 0

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return self.num_epochs * self.num_iterations_per_epoch

    # ------------------------------------------------------------------ settings

    @property
    def settings_file(self) -> str:
        """Where the settings in force are written."""
        return os.path.join(self.output_folder or "", "ssl_settings.json")

    def _lock_fold(self, plans_manager: PlansManager, configuration: str, fold: int | str) -> BaseFileLock | None:
        """Rank 0 keeps others out of the fold's folder until the process ends; other ranks wait until it has."""
        parallel, lock = dist.is_available() and dist.is_initialized(), None
        if not parallel or dist.get_rank() == 0:
            names = plans_manager.dataset_name, type(self).__name__, plans_manager.plans_name, configuration
            folder = get_output_folder(*names, fold)
            busy = f"another nnUNetv2_train works in {folder}; two would overwrite each other's files. Wait until it "
            busy += "has ended, or stop it and resume it from its last checkpoint with --c."
            lock = take(os.path.join(folder, LOCK), busy, patience=PATIENCE, of_process=True)
        if parallel:
            dist.barrier()
        return lock

    @classmethod
    def _refuse_what_cannot_work(cls, plans_manager: PlansManager, configuration: str, dataset_json: dict) -> None:
        """Before nnU-Net makes any folder."""
        name = cls.__name__
        if cls.losses is nnUNetTrainerSSL.losses:
            raise UserError(f"{name} is the base of the trainers; choose one that nnUNetv2_ssl_trainers lists.")
        if plans_manager.get_configuration(configuration).previous_stage_name is not None:
            raise UserError(
                f"{name} cannot train '{configuration}': unlabeled images have no segmentation from the previous "
                "stage of the cascade; train '3d_fullres' or '3d_lowres'."
            )
        if plans_manager.get_label_manager(dataset_json).has_regions and not cls.supports_regions:
            raise UserError(
                f"{name} cannot train the region-based labels of {plans_manager.dataset_name}: it needs classes that "
                "exclude each other; write dataset.json with plain labels, or use nnUNetTrainerCPS."
            )

    # ------------------------------------------------------------------ networks

    def initialize(self) -> None:
        """Build what nnU-Net builds, then the modules that only training needs, and what trains them."""
        if self.epochs is not None:  # here, where a derived class's __init__ has said what else it wants
            self.num_epochs = self.epochs
        with self.seeded("first"):
            super().initialize()
        compiled = self.network.module if self.is_ddp else self.network
        self.plans_network = unwrapped(self.network)

        self.training_modules = nn.ModuleDict(self.build_training_modules()).to(self.device)
        if self.is_ddp:  # as nnU-Net does with its network
            self.training_modules = nn.SyncBatchNorm.convert_sync_batchnorm(self.training_modules)
            take_from_first_rank(self.training_modules)
        self._configure_training_optimizers()
        self._runnable = nn.ModuleDict()
        for name, network in self.networks().items():
            if name in self.tapped_networks():
                network = FeatureTap(network)
            elif network is self.plans_network:
                self._runnable[name] = compiled
                continue
            self._runnable[name] = self.compiled(network)

    def _build_loss(self) -> nn.Module:
        """nnU-Net's, compiled as a whole where nnU-Net compiles its Dice alone.

        Where the network has one output, of two stages, its weight is 1 and not nnU-Net's 0 / 0.
        """
        with np.errstate(invalid="ignore"):
            loss = super()._build_loss()
        if self.enable_deep_supervision:
            # floats, since NumPy's numbers are tensors to the compiler, which then cannot branch on them
            weights = loss.weight_factors
            loss.weight_factors = tuple(map(float, weights)) if len(weights) > 1 else (1.0,)
        if self._do_i_compile():  # in place: with deep supervision, and that of one output, see full_resolution_loss
            loss.compile()
            if self.enable_deep_supervision:
                loss.loss.compile()
        return loss

    # ------------------------------------------------------------------ data

    def on_train_start(self) -> None:
        """Check and prepare all that can fail, then start as nnU-Net does."""
        if not self.was_initialized:
            self.initialize()
        self._refuse_epochs_that_will_not_be()
        self._refuse_another_network()
        if type(self).do_split is nnUNetTrainer.do_split:
            cases = self.dataset_class.get_identifiers(self.preprocessed_dataset_folder)
            refuse_fold(self.fold, cases, self.preprocessed_dataset_folder_base)
        if self.uses_unlabeled or (self.uses_warps and self.settings.warp_onto == "unlabeled"):
            self.unlabeled = self._prepared_unlabeled()
        if self.uses_warps:
            self.warps = self._prepared_warps()
        if self.settings.predict_with == "ema":  # only here, where -pretrained_weights are in
            self.average = WeightAverage(self.plans_network, self.settings.ema_share)
            self.training_modules["average"] = self.average
        self.before_training_state()
        if self._resumed_from is not None:
            self._load_training_state(training_state_file(self._resumed_from))
        super().on_train_start()
        if self.local_rank == 0:
            places = self.places_before() if self._resumed_from is not None else []
            here = surroundings(self.device)
            record = {
                "trainer": type(self).__name__,
                "run": self.run_id,
                "version": __version__,
                "made_on": [*(place for place in places if place != here), here],
                "settings": dataclasses.asdict(self.settings),
                "unlabeled_cases": {} if self.unlabeled is None else self.unlabeled.contents,
                "warped_cases": {} if self.warps is None else self.warps.contents,
            }
            with self._writing():
                write_json(self.settings_file, record)
            self.ssl_log = SSLLog(self.output_folder, self.current_epoch)
        self.print_to_log_file(f"nnunet_ssl {__version__}: {self.settings}")
        self.warn_of_slow_bfloat16()
