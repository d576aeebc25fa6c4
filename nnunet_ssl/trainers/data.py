"""What a training learns from: labeled cases and their warps, unlabeled images, and the loaders that serve them."""

from __future__ import annotations

from typing import Any

from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.configuration import default_num_processes
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunet_ssl.augmentation.deferred import DeferredTransforms
from nnunet_ssl.augmentation.device import DeviceTransforms
from nnunet_ssl.shapes.loader import JoinedDataset, WarpedShare
from nnunet_ssl.shapes.warped import prepare_warps, wait_until_warped
from nnunet_ssl.shapes.wish import WarpedFolder, Wish, labeled_images
from nnunet_ssl.unlabeled.case import Preparation
from nnunet_ssl.unlabeled.elastic import deform_elastically
from nnunet_ssl.unlabeled.loader import OrderedWorkers, TwoStreamLoader, UnlabeledLoader, start_workers
from nnunet_ssl.unlabeled.prepare import prepare_unlabeled, wait_until_prepared
from nnunet_ssl.unlabeled.store import PreparedFolder


class Data(nnUNetTrainer):
    """The two streams of batches."""

    transforms_on_device: dict[str, DeviceTransforms]  # by stream; none where the workers augment

    def _prepared_unlabeled(self) -> PreparedFolder:
        """Rank 0 prepares what is missing; the others wait without a collective, which would time out.

        Raises:
            UserError: this run has learned from other images so far.
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
        self.print_to_log_file(f"Learning from {len(prepared.cases)} unlabeled images in {prepared.folder}")
        return prepared

    def _prepared_warps(self) -> WarpedFolder:
        """The warps of the fold's training cases; rank 0 makes what is missing.

        Raises:
            UserError: too few pairs of images register well.
        """
        what = (
            self.plans_manager.dataset_name, self.plans_manager.plans, self.configuration_name, self.dataset_json
        )  # fmt: skip
        onto = self.unlabeled
        if self.settings.warp_onto == "labeled":
            cases = self.dataset_class.get_identifiers(self.preprocessed_dataset_folder)
            onto = labeled_images(Preparation(*what), cases)
        train, validation = self.do_split()
        train = tuple(map(str, train))
        wish = Wish(*what, train, tuple(str(case) for case in validation if case not in train), onto)
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

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's loaders and transforms, with an unlabeled stream in addition to the labeled one."""
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
            for transform in getattr(transforms, "transforms", ()):
                blur = getattr(transform, "transform", None)
                if isinstance(blur, GaussianBlurTransform):
                    blur.benchmark = False  # or a clock chooses between two ways that round differently
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
        drawn = self.batch_size, initial_patch_size, patch_size, self.label_manager
        labeled = self.labeled_loader()(
            self.labeled_dataset(), *drawn, transforms=training_transforms(scales, **labels), **foreground
        )
        unlabeled = None
        if self.uses_unlabeled:
            unlabeled = UnlabeledLoader(
                self.unlabeled.places,
                *drawn,
                use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
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
        if purpose == "train" and self.settings.augment == "device":
            for stream, made in (("labeled", labeled), ("unlabeled", unlabeled)):
                if made is not None:
                    self._leave_to_device(stream, made)
        loader = TwoStreamLoader(
            labeled,
            unlabeled,
            self.settings.seed,
            (purpose, self.local_rank),
            first_batch=self.current_epoch * per_epoch,
            probabilities=self._probabilities() if purpose == "train" else None,
        )
        return start_workers(loader, workers, pin_memory=self.device.type == "cuda")

    def _leave_to_device(self, stream: str, loader: nnUNetDataLoader) -> None:
        """The loader's transforms are drawn by its workers, and computed in the step."""
        loader.transforms = DeferredTransforms(loader.transforms, type(self).__name__)
        ignored = () if self.label_manager.ignore_label is None else (self.label_manager.ignore_label,)
        labels = [int(label) for label in (*self.label_manager.all_labels, *ignored)]
        self.transforms_on_device[stream] = DeviceTransforms(loader.transforms.steps, labels, self.device)

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
                if isinstance(loader, OrderedWorkers):
                    loader._finish()
