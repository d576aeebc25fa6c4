"""The base of every trainer: two streams of batches, one step, and what is kept beside a checkpoint.

A method is a subclass with a ``Settings`` dataclass and a ``losses`` generator. Everything that nnU-Net does already
(plans, datasets, transforms, schedules, validation, export) is inherited.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import inspect
import math
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from filelock import BaseFileLock
from nnunetv2.configuration import default_num_processes
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunet_ssl import __version__
from nnunet_ssl.checkpoints import read_checkpoint, save_whole
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json, write_json, writing
from nnunet_ssl.locks import take
from nnunet_ssl.names import a_few
from nnunet_ssl.networks.average import WeightAverage
from nnunet_ssl.networks.feature_tap import FeatureTap
from nnunet_ssl.randomness import derived_seed, seeded
from nnunet_ssl.shapes.loader import JoinedDataset, WarpedShare
from nnunet_ssl.shapes.warped import WarpedFolder, Wish, prepare_warps, wait_until_warped
from nnunet_ssl.trainers.log import SSLLog
from nnunet_ssl.trainers.settings import ENVIRONMENT_VARIABLE, SSLSettings, load_settings, settings_from_dict
from nnunet_ssl.unlabeled.elastic import deform_elastically
from nnunet_ssl.unlabeled.folds import refuse_fold
from nnunet_ssl.unlabeled.loader import TwoStreamLoader, UnlabeledDataset, UnlabeledLoader, start_workers
from nnunet_ssl.unlabeled.prepare import prepare_unlabeled, wait_until_prepared
from nnunet_ssl.unlabeled.store import PreparedFolder

CLIP_NORM = 12  # nnU-Net's
LOCK = ".lock"  # in the fold's folder, held by who trains or validates there
PATIENCE = 10.0  # seconds for a run that was killed to be gone: it may still have to give its memory back

# what nnU-Net reads of a checkpoint to go on with it
CHECKPOINT = {
    "network_weights": dict,
    "optimizer_state": dict,
    "logging": dict,
    "init_args": dict,
    "current_epoch": int,
}


class Stream(NamedTuple):
    """One half of a batch."""

    images: Tensor  # [B, C, *patch]
    target: list[Tensor] | Tensor | None  # nnU-Net's target, full resolution first; None for unlabelled images
    cases: list[str] | None = None  # names of the labelled cases
    coordinates: Tensor | None = None  # [B, dim, *patch], where a method asks for them: see unlabeled/coordinates.py


class Batch(NamedTuple):
    """What a method's ``losses`` takes."""

    labeled: Stream
    unlabeled: Stream | None


class nnUNetTrainerSSL(nnUNetTrainer):  # noqa: N801
    """Base of the semi-supervised trainers; not for use by itself.

    A subclass writes ``losses``, and where it needs them ``build_training_modules``, ``term_weights`` and
    ``training_state``.

    What is repeatable: with the same seed, software and device, initial weights and the content and order of all
    batches are the same, whatever the number of workers and wherever a run was interrupted. So on the CPU, with the
    same number of threads, a resumed run ends with the weights of an uninterrupted one, bit for bit. On a GPU cuDNN
    chooses algorithms by speed, as nnU-Net wants it, and the last bits differ from run to run.

    Raises:
        UserError: at the start, if the settings, the plans, the unlabelled images or the training state cannot work, or
            another process works in the fold's folder.
    """

    paper: ClassVar[str] = ""
    Settings: ClassVar[type[SSLSettings]] = SSLSettings
    uses_unlabeled: ClassVar[bool] = True
    supports_regions: ClassVar[bool] = True
    inference_trainer: ClassVar[str | None] = None  # what a checkpoint says it is: see trainer_of_checkpoints
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
        # before nnU-Net's loggers, which replace files of a run that is going on, and before any of them is read
        self._fold_lock = self._lock_fold(PlansManager(plans), configuration, fold)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.settings = self._settings_in_force(override, continue_training)
        self.num_iterations_per_epoch = self.settings.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = self.settings.num_val_iterations_per_epoch
        self.save_every = self.settings.save_every
        if self.epochs is not None:
            self.num_epochs = self.epochs
        self.global_step = 0
        self.average: WeightAverage | None = None
        self.unlabeled: PreparedFolder | None = None
        self.warps: WarpedFolder | None = None
        self._resumed_from: str | None = None
        self._sums: dict[str, list] = {}
        self._terms_of_features: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ what a method writes

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """Yield the named terms of one pass after the other; the base backpropagates each before it asks for more.

        Each term is a 0-dim tensor, without its weight (see ``term_weights``). With ``passes: lean`` what is yielded is
        backpropagated and freed at once, with ``joint`` all of it at the end. A term may come in several passes; the
        parts add up.
        """
        raise NotImplementedError

    def term_weights(self) -> dict[str, float]:
        """The weights of terms at ``self.global_step``; a term that is not named has weight 1."""
        return {}

    def build_training_modules(self) -> dict[str, nn.Module]:
        """Modules that only training needs, by name. They are optimised, clipped each by itself, saved and resumed.

        Build each under ``self.seeded(name)``, so that one module does not change the initial weights of another.
        """
        return {}

    def networks(self) -> dict[str, nn.Module]:
        """The networks that ``forward`` may run, by name; ``first`` is the plans' own, which predicts."""
        return {"first": self.plans_network}

    def tapped_networks(self) -> set[str]:
        """Names of the networks whose last decoder feature ``on_labeled_feature`` wants to see."""
        return set()

    def on_labeled_feature(self, name: str, feature: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Terms to add to the current pass, from the last decoder feature of labelled images of a tapped network.

        Args:
            name: of the network.
            feature: ``[B, C, *patch]``.
            target: ``[B, 1, *patch]``, nnU-Net's full-resolution target.
        """
        return {}

    def before_training_state(self) -> None:
        """What a method makes at the start of a training, before ``load_training_state`` may fill it."""

    def after_step(self) -> None:
        """What follows each step, when all optimisers have stepped: a teacher's update, for instance."""

    def labeled_loader(self) -> type[nnUNetDataLoader]:
        """The class that serves labelled batches: nnU-Net's own, or one that says more of each patch."""
        return nnUNetDataLoader

    def view_transform(self) -> BasicTransform | None:
        """A spatial transform to end nnU-Net's own augmentation with, of labelled and unlabelled patches alike."""
        return None

    def training_state(self, filename: str) -> dict[str, Any]:
        """What a method wants to find again after ``--c``, beside modules and optimisers: tensors and plain types.

        Args:
            filename: of the checkpoint that it is kept beside.
        """
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take back what ``training_state`` gave."""

    # ------------------------------------------------------------------ what a method calls

    def forward(self, name: str, stream: Stream) -> list[Tensor] | Tensor:
        """Run a network on a stream, and let what hangs on labelled features see them.

        Args:
            name: a name of ``networks()``.
            stream: images, and their target if they are labelled.

        Returns:
            The network's outputs: with deep supervision a list, full resolution first.
        """
        if name not in self.tapped_networks():
            return self._runnable[name](stream.images)
        outputs, feature = self._runnable[name](stream.images)
        if stream.target is not None and torch.is_grad_enabled():
            for term, value in self.on_labeled_feature(name, feature, full_resolution(stream.target)).items():
                self._terms_of_features[term] = self._terms_of_features.get(term, 0.0) + value
        return outputs

    def log_value(self, name: str, value: Tensor | float) -> None:
        """Add ``value`` to the epoch's mean of ``name``. Tensors stay on their device until the epoch ends."""
        total = self._sums.setdefault(name, [0.0, 0])
        total[0] = total[0] + (value.detach().float() if isinstance(value, Tensor) else value)
        total[1] += 1

    def seeded(self, *purpose: str | int) -> AbstractContextManager[None]:
        """A context whose random draws follow from the run's seed and ``purpose``, on every rank alike."""
        return seeded(self.settings.seed, *purpose)

    @property
    def uses_warps(self) -> bool:
        """Whether some labelled patches are of warps."""
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

    def _settings_in_force(self, override: SSLSettings, continue_training: bool) -> SSLSettings:
        """``override``, or with ``--c`` what the run was started with; with a seed in any case."""
        if continue_training and os.path.isfile(self.settings_file):
            remedy = "Restore it, or start anew without --c."
            stored = read_json(self.settings_file, remedy, keys={"settings": dict})["settings"]
            stored = settings_from_dict(self.Settings, stored, self.settings_file)
            if os.environ.get(ENVIRONMENT_VARIABLE):
                if override.seed is None:
                    override = dataclasses.replace(override, seed=stored.seed)
                for field in dataclasses.fields(stored):
                    was, now = getattr(stored, field.name), getattr(override, field.name)
                    if was != now:
                        raise UserError(
                            f"{os.environ[ENVIRONMENT_VARIABLE]} sets '{field.name}' to {now!r}, but the run in "
                            f"{self.output_folder} was started with {was!r}; unset {ENVIRONMENT_VARIABLE} to continue "
                            "it, or start anew without --c."
                        )
            return stored
        if override.seed is not None:
            return override
        seed = [secrets.randbits(31)]
        if self.is_ddp:
            dist.broadcast_object_list(seed, src=0)
        return dataclasses.replace(override, seed=seed[0])

    def _lock_fold(self, plans_manager: PlansManager, configuration: str, fold: int | str) -> BaseFileLock | None:
        """Rank 0 keeps others out of the fold's folder until the process ends."""
        if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
            return None
        names = plans_manager.dataset_name, type(self).__name__, plans_manager.plans_name, configuration
        folder = get_output_folder(*names, fold)
        return take(
            os.path.join(folder, LOCK),
            f"another nnUNetv2_train works in {folder}; two would overwrite each other's files. Wait until it has "
            "ended, or stop it and go on from its last checkpoint with --c.",
            patience=PATIENCE,
            of_process=True,
        )

    @classmethod
    def _refuse_what_cannot_work(cls, plans_manager: PlansManager, configuration: str, dataset_json: dict) -> None:
        """Before nnU-Net makes any folder."""
        name = cls.__name__
        if cls.losses is nnUNetTrainerSSL.losses:
            raise UserError(f"{name} is the base of the trainers; choose one that nnUNetv2_ssl_trainers lists.")
        if plans_manager.get_configuration(configuration).previous_stage_name is not None:
            raise UserError(
                f"{name} cannot train '{configuration}': unlabelled images have no segmentation from the previous "
                "stage of the cascade; train '3d_fullres' or '3d_lowres'."
            )
        if plans_manager.get_label_manager(dataset_json).has_regions and not cls.supports_regions:
            raise UserError(
                f"{name} cannot train the region-based labels of {plans_manager.dataset_name}: it needs classes that "
                "exclude each other; write dataset.json with plain labels, or use nnUNetTrainerCPS."
            )

    # ------------------------------------------------------------------ the trainer that predicts

    @classmethod
    def trainer_of_checkpoints(cls) -> str:
        """The trainer that a checkpoint names, whose network nnU-Net then builds to predict.

        It is the ``inference_trainer`` of a class, unless one derived from it builds another network; nnU-Net's own
        trainer, where that is whose network it is; and else the class itself, which nnU-Net has found before.
        """

        def place(name: str) -> int:
            return next(place for place, base in enumerate(cls.__mro__) if name in vars(base))

        builder = place("build_network_architecture")
        if cls.inference_trainer is not None and place("inference_trainer") <= builder:
            return cls.inference_trainer
        owner = cls.__mro__[builder]
        return (owner if owner.__module__.startswith("nnunetv2.") else cls).__name__

    def _refuse_another_network(self) -> None:
        """Build the network as nnU-Net will to predict, and see that it is the one that trains.

        Raises:
            UserError: it is not.
        """
        name = self.trainer_of_checkpoints()
        if why := self._why_not_the_network_of(name):
            raise UserError(
                f"{type(self).__name__} trains another network than {name}.build_network_architecture builds, which is "
                f"what nnUNetv2_predict would use ({why}). Build the network there: in a static method, from its "
                "arguments alone."
            )

    def _why_not_the_network_of(self, name: str) -> str | None:
        if _unwrapped(self.network) is not self.plans_network:
            return "self.network was replaced after nnUNetTrainerSSL.initialize"
        named = [base for base in type(self).__mro__ if base.__name__ == name]
        try:
            with self.seeded("prediction"):
                built = self._built_by(named[0] if named else recursive_find_trainer_class_by_name(name))
        except Exception as error:  # whatever it is, it would be raised in prediction too
            return f"building it fails: {error}"
        try:
            built.load_state_dict(self.plans_network.state_dict())
        except RuntimeError:
            return "the weights do not fit"
        return None if _layers(built) == _layers(self.plans_network) else "their layers differ"

    def _built_by(self, trainer: type[nnUNetTrainer]) -> nn.Module:
        """As ``nnUNetPredictor.initialize_from_trained_model_folder`` builds it."""
        build = trainer.build_network_architecture
        plans_manager = PlansManager(deepcopy(self.plans_manager.plans))
        configuration = plans_manager.get_configuration(self.configuration_name)
        described = (plans_manager, configuration)
        if "plans_manager" not in inspect.signature(build).parameters:  # as before nnU-Net 2.7
            names = ("network_arch_class_name", "network_arch_init_kwargs", "network_arch_init_kwargs_req_import")
            described = tuple(getattr(configuration, name) for name in names)
        heads = self.label_manager.num_segmentation_heads
        network = build(*described, self.num_input_channels, heads, enable_deep_supervision=False)
        return nn.SyncBatchNorm.convert_sync_batchnorm(network) if self.is_ddp else network

    # ------------------------------------------------------------------ networks and optimisers

    def initialize(self) -> None:
        """Build what nnU-Net builds, then the modules that only training needs, and their optimiser."""
        with self.seeded("first"):
            super().initialize()
        compiled = self.network.module if self.is_ddp else self.network
        self.plans_network = _unwrapped(self.network)

        self.training_modules = nn.ModuleDict(self.build_training_modules()).to(self.device)
        if self.is_ddp:  # as nnU-Net does with its network
            self.training_modules = nn.SyncBatchNorm.convert_sync_batchnorm(self.training_modules)
        self.training_optimizer = self.training_lr_scheduler = None
        if any(p.requires_grad for p in self.training_modules.parameters()):
            self.training_optimizer, self.training_lr_scheduler = self._configure_training_optimizer()
        self._runnable = nn.ModuleDict()
        for name, network in self.networks().items():
            if name in self.tapped_networks():
                network = FeatureTap(network)
            elif name == "first":
                self._runnable[name] = compiled
                continue
            self._runnable[name] = torch.compile(network) if self._do_i_compile() else network

    def _build_loss(self) -> nn.Module:
        """nnU-Net's. Where the network has one output, of two stages, its weight is 1 and not nnU-Net's 0 / 0."""
        with np.errstate(invalid="ignore"):
            loss = super()._build_loss()
        if self.enable_deep_supervision and len(loss.weight_factors) == 1:
            loss.weight_factors = (1.0,)
        return loss

    def _configure_training_optimizer(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """nnU-Net's optimiser and schedule, for the modules that only training needs.

        An optimiser of their own, with the same rule: what nnU-Net saves in its checkpoint stays what it saves for a
        plain trainer. (With half precision an overflow skips the step of the optimiser that it is in, not the other's.)
        Parameters marked ``no_weight_decay`` get none.
        """
        parameters = [p for p in self.training_modules.parameters() if p.requires_grad]  # a teacher's are not
        network = self.network
        self.network = nn.ParameterList(p for p in parameters if not hasattr(p, "no_weight_decay"))
        try:
            optimizer, scheduler = self.configure_optimizers()
        finally:
            self.network = network
        free = [p for p in parameters if hasattr(p, "no_weight_decay")]
        if free:
            optimizer.add_param_group({"params": free, "weight_decay": 0.0})
        return optimizer, scheduler

    # ------------------------------------------------------------------ data

    def on_train_start(self) -> None:
        """Check and prepare all that can fail, then start as nnU-Net does."""
        self._refuse_epochs_that_will_not_be()
        if not self.was_initialized:
            self.initialize()
        self._refuse_another_network()
        if type(self).do_split is nnUNetTrainer.do_split:
            cases = self.dataset_class.get_identifiers(self.preprocessed_dataset_folder)
            refuse_fold(self.fold, cases, self.preprocessed_dataset_folder_base)
        if self.uses_unlabeled or self.uses_warps:
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
            record = {
                "trainer": type(self).__name__,
                "version": __version__,
                "settings": dataclasses.asdict(self.settings),
                "unlabeled_cases": {} if self.unlabeled is None else self.unlabeled.contents,
                "warped_cases": {} if self.warps is None else self.warps.contents,
            }
            with self._writing():
                write_json(self.settings_file, record)
            self.ssl_log = SSLLog(self.output_folder, self.current_epoch)
        self.print_to_log_file(f"nnunet_ssl {__version__}: {self.settings}")

    def _refuse_epochs_that_will_not_be(self) -> None:
        """Only here, since a class derived from this one may have set the number of epochs after our ``__init__``."""
        if beyond := [epoch for epoch in self.settings.keep_epochs if epoch > self.num_epochs]:
            raise UserError(
                f"{os.environ.get(ENVIRONMENT_VARIABLE) or self.settings_file} sets 'keep_epochs' to "
                f"{list(self.settings.keep_epochs)}, but this training ends with epoch {self.num_epochs}; leave out "
                f"{beyond[0]}, or train longer with -tr <trainer>_<N>epochs."
            )

    def _prepared_unlabeled(self) -> PreparedFolder:
        """Rank 0 prepares what is missing; the others wait without a collective, which would time out.

        Raises:
            UserError: this run has learnt from other images so far.
        """
        what = (
            self.plans_manager.dataset_name,
            self.plans_manager,
            self.configuration_name,
            self.dataset_json,
            self.dataset_class.get_identifiers(self.preprocessed_dataset_folder),
        )
        if self.local_rank == 0:
            prepared = prepare_unlabeled(*what, default_num_processes, reading=True)
        else:
            prepared = wait_until_prepared(*what)
        self.print_to_log_file(f"Learning from {len(prepared.cases)} unlabelled images in {prepared.folder}")
        return prepared

    def _prepared_warps(self) -> WarpedFolder:
        """The warps of the fold's training cases; rank 0 makes what is missing.

        Raises:
            UserError: too few pairs of images register well.
        """
        train, validation = self.do_split()
        wish = Wish(
            self.plans_manager.dataset_name,
            self.plans_manager.plans,
            self.configuration_name,
            self.dataset_json,
            tuple(map(str, train)),
            tuple(str(case) for case in validation if case not in train),
            self.unlabeled,
        )
        if self.local_rank == 0:
            warps = prepare_warps(wish, default_num_processes, reading=True)
        else:
            warps = wait_until_warped(wish)
        self.print_to_log_file(f"Learning from {len(warps.cases)} warps in {warps.folder}")
        return warps

    def labeled_dataset(self) -> Any:
        """The fold's training cases as nnU-Net's dataset, and their warps where the settings ask for them."""
        dataset, _ = self.get_tr_and_val_datasets()
        return dataset if self.warps is None else JoinedDataset(dataset, self.warps.places)

    def _refuse_other_images(self, what: str, now: dict[str, str], then: dict[str, str]) -> None:
        """Refuse to go on with ``--c`` where images, case -> digest, are others than those of the run."""
        differences = {
            "added": sorted(now.keys() - then.keys()),
            "removed": sorted(then.keys() - now.keys()),
            "changed": sorted(case for case in now.keys() & then.keys() if now[case] != then[case]),
        }
        told = [f"{len(cases)} {how} ({a_few(cases)})" for how, cases in differences.items() if cases]
        if told:
            raise UserError(
                f"{self._resumed_from} was trained with other {what} than there are now: {', '.join(told)}. "
                "Put them back as they were to continue it, or start anew without --c (-pretrained_weights "
                f"{self._resumed_from} keeps what was learned)."
            )

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's loaders and transforms, with an unlabelled stream beside the labelled one."""
        patch_size = self.configuration_manager.patch_size
        scales = self._get_deep_supervision_scales()
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        view = self.view_transform()
        labels = {
            "is_cascaded": self.is_cascaded,
            "foreground_labels": self.label_manager.foreground_labels,
            "regions": self.label_manager.foreground_regions if self.label_manager.has_regions else None,
            "ignore_label": self.label_manager.ignore_label,
        }

        def training_transforms(scales: list | None, **labels: Any) -> ComposeTransforms:
            transforms = self.get_training_transforms(
                patch_size,
                rotation,
                scales,
                mirror_axes,
                dummy_2d,
                use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
                **labels,
            )
            if self.settings.elastic_deformation:
                deform_elastically(transforms, self.settings.elastic_deformation, type(self).__name__)
            if view is not None:  # before the target is scaled down for deep supervision
                transforms.transforms.insert(len(transforms.transforms) - (scales is not None), view)
            return transforms

        _, dataset_val = self.get_tr_and_val_datasets()
        foreground = {
            "oversample_foreground_percent": self.oversample_foreground_percent,
            "probabilistic_oversampling": self.probabilistic_oversampling,
        }
        labeled = self.labeled_loader()(
            self.labeled_dataset(),
            self.batch_size,
            initial_patch_size,
            patch_size,
            self.label_manager,
            transforms=training_transforms(scales, **labels),
            **foreground,
        )
        unlabeled = None
        if self.uses_unlabeled:
            unlabeled = UnlabeledLoader(
                UnlabeledDataset(self.unlabeled.places),
                self.batch_size,
                initial_patch_size,
                patch_size,
                self.label_manager,
                transforms=training_transforms(None),
            )
        validation = nnUNetDataLoader(
            dataset_val,
            self.batch_size,
            patch_size,
            patch_size,
            self.label_manager,
            transforms=self.get_validation_transforms(scales, **labels),
            **foreground,
        )
        workers = get_allowed_n_proc_DA()
        return (
            self._start(labeled, unlabeled, "train", self.num_iterations_per_epoch, workers),
            self._start(validation, None, "val", self.num_val_iterations_per_epoch, workers and max(1, workers // 2)),
        )

    def _start(
        self, labeled: nnUNetDataLoader, unlabeled: UnlabeledLoader | None, purpose: str, per_epoch: int, workers: int
    ) -> Any:
        loader = TwoStreamLoader(
            labeled,
            unlabeled,
            self.settings.seed,
            (purpose, self.local_rank),
            first_batch=self.current_epoch * per_epoch,
            num_workers=workers,
            probabilities=self._probabilities() if purpose == "train" else None,
        )
        return start_workers(loader, workers, pin_memory=self.device.type == "cuda")

    def _probabilities(self) -> WarpedShare | None:
        """How often warps are drawn; None where there are none."""
        if self.warps is None:
            return None
        first, last = self.settings.warped_share, self.settings.warped_share_last
        last = first if last is None else last
        train = self.get_tr_and_val_datasets()[0].identifiers
        return WarpedShare(train, self.warps.moving, first, last, self.total_steps)

    def run_training(self) -> None:
        """As nnU-Net; and however it ends, the workers are stopped, whose threads would complain after our message."""
        try:
            super().run_training()
        finally:
            for loader in (self.dataloader_train, self.dataloader_val):
                if isinstance(loader, MultiThreadedAugmenter):
                    loader._finish()

    # ------------------------------------------------------------------ the step

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

    def train_step(self, batch: dict) -> dict:
        """One step: the method's passes, each backpropagated, then clipping and the optimisers.

        Args:
            batch: ``data``, ``target`` and, for methods that use it, ``unlabeled``.

        Returns:
            ``{"loss": 0-dim tensor}``, the weighted sum of all terms, on its device: nothing waits for it here.
        """
        streams = self._to_device(batch)
        for optimizer in self._optimizers():
            optimizer.zero_grad(set_to_none=True)

        weights = self.term_weights()
        terms_of_step: dict[str, Tensor] = {}
        joint = self.settings.passes == "joint"
        held = []  # the losses of joint passes
        passes = self.losses(streams)
        while True:
            with self.autocast():
                terms = next(passes, None)
                if terms is None:
                    break
                terms = terms | self._terms_of_features
                self._terms_of_features = {}
                loss = sum(weights.get(name, 1.0) * term for name, term in terms.items())
            for name, term in terms.items():
                terms_of_step[name] = terms_of_step.get(name, 0.0) + term.detach().float()
            if joint:
                held.append(loss)
            else:
                self._backward(loss)
            del terms, loss
        if joint:
            self._backward(sum(held))

        self._update()
        if self.average is not None:
            self.average.update(self.plans_network, self.global_step)
        self.after_step()
        self.global_step += 1
        for name, term in terms_of_step.items():
            self.log_value(f"loss_{name}", term)
        for name, weight in weights.items():
            self.log_value(f"weight_{name}", weight)
        return {"loss": sum(weights.get(name, 1.0) * term for name, term in terms_of_step.items())}

    def autocast(self) -> AbstractContextManager:
        """nnU-Net's rule, half precision on CUDA and none elsewhere; with ``cpu_bfloat16`` on a CPU too."""
        half = self.device.type == "cuda" or (self.device.type == "cpu" and self.settings.cpu_bfloat16)
        # Without the cache of cast weights: one that a forward without gradient left behind would have no gradient.
        return torch.autocast(self.device.type, cache_enabled=False) if half else nullcontext()

    def _to_device(self, batch: dict) -> Batch:
        def move(x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
            return [move(i) for i in x] if isinstance(x, list) else x.to(self.device, non_blocking=True)

        unlabeled = batch.get("unlabeled")
        return Batch(
            Stream(
                move(batch["data"]),
                move(batch["target"]),
                [str(case) for case in batch.get("keys", ())],
                move(batch["coordinates"]) if "coordinates" in batch else None,
            ),
            None if unlabeled is None else Stream(move(unlabeled), None),
        )

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [o for o in (self.optimizer, self.training_optimizer) if o is not None]

    def _backward(self, loss: Tensor) -> None:
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()

    def _update(self) -> None:
        """Average over ranks, unscale, clip each module by itself as nnU-Net clips its network, step."""
        modules = [self.plans_network, *self.training_modules.values()]
        if self.is_ddp:
            average_gradients([p for module in modules for p in module.parameters()])
        if self.grad_scaler is not None:
            for optimizer in self._optimizers():
                self.grad_scaler.unscale_(optimizer)
        for module in modules:
            torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
        for optimizer in self._optimizers():
            if self.grad_scaler is None:
                optimizer.step()
            else:
                self.grad_scaler.step(optimizer)
        if self.grad_scaler is not None:
            self.grad_scaler.update()

    # ------------------------------------------------------------------ once an epoch

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
            + f". The training ends here; checkpoints of earlier epochs stay. Look at {self.settings_file}, and start "
            "anew with smaller weights of the terms, or with a smaller initial_lr in a trainer of your own."
        )
        self.print_to_log_file(message)
        raise UserError(message)

    def on_validation_epoch_start(self) -> None:
        """As nnU-Net, with the weights that predict; they stay until training goes on."""
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

    # ------------------------------------------------------------------ checkpoints

    def save_checkpoint(self, filename: str) -> None:
        """Write a plain nnU-Net checkpoint of the plans' network, and the training state in a file beside it.

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
            "settings": dataclasses.asdict(self.settings),
            "epoch": self.current_epoch + 1,
            "network": fingerprint(self.plans_network),
            "unlabeled": None if self.unlabeled is None else self.unlabeled.contents,
            "warps": None if self.warps is None else self.warps.contents,
            "modules": self.training_modules.state_dict(),
            "optimizer": None if self.training_optimizer is None else self.training_optimizer.state_dict(),
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
        with writing("The last checkpoint is kept: make room or make it writable, and go on with --c."):
            try:
                yield
            except OSError as error:
                error.filename = error.filename or self.output_folder
                raise

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """As nnU-Net. The training state is read when training goes on, so ``--val`` needs the checkpoint alone.

        Raises:
            UserError: it is damaged, could run code, or is of another network.
        """
        remedy = "Restore it, or move it away: --c goes on from the first that there is of checkpoint_final.pth, "
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

    def _load_training_state(self, filename: str) -> None:
        """Take the training state that was written with the checkpoint that has been loaded.

        Raises:
            UserError: if there is none, or only that of another checkpoint.
        """
        # on the CPU: a GPU may not have room for all of it twice
        candidate, state = find_training_state(filename, self.plans_network, "cpu")
        if state is None:
            what = "is of another checkpoint or damaged" if os.path.isfile(filename) else "is missing"
            raise UserError(
                f"the training state {filename} {what}, so {self._resumed_from} cannot be continued; restore the file, "
                f"or start anew without --c (-pretrained_weights {self._resumed_from} keeps what was learned). "
                "Validating with --val does not need it."
            )
        stored = settings_from_dict(self.Settings, state.get("settings"), filename)  # new ones have their defaults
        if stored != self.settings:
            names = [
                field.name
                for field in dataclasses.fields(stored)
                if getattr(stored, field.name) != getattr(self.settings, field.name)
            ]
            raise UserError(
                f"{self._resumed_from} was trained with other settings than {self.settings_file} says "
                f"({', '.join(names)}): a run was started anew in this folder and left no checkpoint; start it again "
                f"without --c, or delete {self.settings_file} and set {ENVIRONMENT_VARIABLE} to the old settings."
            )
        if self.current_epoch < self.num_epochs:  # else only validation is left
            for what, key, prepared in (
                ("unlabelled images", "unlabeled", self.unlabeled if self.uses_unlabeled else None),
                ("warps", "warps", self.warps),
            ):
                if state.get(key) is not None and prepared is not None:
                    self._refuse_other_images(what, prepared.contents, state[key])
        if self.is_ddp:
            dist.barrier()  # all have read
        if candidate != filename and self.local_rank == 0:
            os.replace(candidate, filename)  # finish what a kill cut off
        try:
            self.training_modules.load_state_dict(state["modules"])
            if self.average is not None:
                self.average.in_network = True  # as the checkpoint was saved
            if self.training_optimizer is not None:
                # copied: what it keeps as it is must not be a view of the file, which the next save replaces
                self.training_optimizer.load_state_dict(deepcopy(state["optimizer"]))
            self.load_training_state(state["method"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"the training state {filename} is not one of {type(self).__name__} in nnunet_ssl {__version__} "
                f"({_first_line(error)}). Go on with the version that wrote it, or start anew without "
                f"--c (-pretrained_weights {self._resumed_from} keeps what was learned)."
            ) from error

    def on_train_end(self) -> None:
        """As nnU-Net, which removes checkpoint_latest.pth; its training state goes with it."""
        super().on_train_end()
        if self.local_rank == 0:
            for file in glob.glob(os.path.join(glob.escape(self.output_folder), "checkpoint_latest*")):
                os.remove(file)


def full_resolution(target: list[Tensor] | Tensor) -> Tensor:
    """The full-resolution entry of nnU-Net's outputs or target."""
    return target[0] if isinstance(target, (list, tuple)) else target


def _first_line(error: Exception) -> str:
    """Of what torch says in many, without the stop that a sentence around it has."""
    return next(iter(str(error).splitlines()), type(error).__name__).strip().rstrip(".:")


def _unwrapped(network: nn.Module) -> nn.Module:
    """Without what DistributedDataParallel and ``torch.compile`` put around it."""
    network = network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
    return getattr(network, "_orig_mod", network)


def _layers(network: nn.Module) -> list[tuple[str, str, str]]:
    """Name, type and parameters of all modules, less what tells nothing of prediction: rates of dropout, addresses."""
    return [
        (name, kind, "" if "Drop" in kind else re.sub(r" at 0x[0-9a-f]+", "", module.extra_repr()))
        for name, module in network.named_modules()
        for kind in [type(module).__name__]
    ]


def training_state_file(checkpoint_file: str) -> str:
    """``checkpoint_latest.pth`` -> ``checkpoint_latest_ssl.pth``."""
    return f"{checkpoint_file.removesuffix('.pth')}_ssl.pth"


def find_training_state(
    filename: str, network: nn.Module, device: torch.device | str
) -> tuple[str | None, dict[str, Any] | None]:
    """The training state that was written with a checkpoint, and the file that holds it.

    Tensors on the CPU are views of the file: what is large is read when it is used, and never whole into RAM.

    Args:
        filename: of ``training_state_file``; after a kill in ``save_checkpoint`` the state may still end in ``.new``.
        network: the plans' network with the checkpoint's weights.
        device: where the state's tensors go.

    Returns:
        ``(file, state)``; ``(None, None)`` where none fits: missing, damaged, or of another checkpoint.
    """
    expected = fingerprint(network)
    for candidate in (filename, filename + ".new"):
        try:
            state = torch.load(candidate, map_location=device, weights_only=True, mmap=os.name != "nt")
            if state["network"] == expected:
                return candidate, state
        except MemoryError:
            raise
        except Exception:  # missing, cut short, or something else altogether
            continue
    return None, None


def fingerprint(module: nn.Module) -> str:
    """A digest of all parameters and buffers of ``module``."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average gradients over the ranks, in one all-reduce for each dtype.

    By hand, once a step, rather than by DistributedDataParallel: a step has several forward and backward passes, and
    not every pass touches every parameter. Each rank has gradients for the same parameters, since each runs the same
    passes.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
