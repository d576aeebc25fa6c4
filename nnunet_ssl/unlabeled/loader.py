"""Serves labeled and unlabeled batches together, from one pool of workers, in an order that a seed fixes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.queues import SimpleQueue
from typing import Any

import numpy as np
from batchgenerators.dataloading.data_loader import SlimDataLoaderBase
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_ssl.augmentation.deferred import DeferredTransforms
from nnunet_ssl.pools import die_with_parent
from nnunet_ssl.randomness import seeded


class PreparedDataset:
    """Prepared cases, each read by nnU-Net's dataset for what the plans' preprocessor has written.

    ``places``: case -> the folder of its files, see ``store.PreparedFolder``.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self.identifiers = sorted(places)
        classes = {place: infer_dataset_class(place) for place in set(places.values())}
        self._datasets = {case: classes[place](place, [case]) for case, place in places.items()}

    def load_case(self, identifier: str) -> tuple[Any, Any, None, dict]:
        """As nnU-Net's."""
        return self._datasets[identifier].load_case(identifier)


class UnlabeledDataset(PreparedDataset):
    """Images without labels: the segmentation is nnU-Net's 0 / -1 mask of the nonzero region.

    That of an image whose labels are not to be used (MAE) has them too. Without ``masks`` it has no channels, for where
    nothing looks at it.
    """

    def __init__(self, places: Mapping[str, str], masks: bool = True) -> None:
        super().__init__(places)
        self.masks = masks

    def load_case(self, identifier: str) -> tuple[Any, Any, None, dict]:
        """As nnU-Net's; an unlabeled image knows of no class locations, which nnU-Net's loader asks for."""
        data, seg, seg_prev, properties = super().load_case(identifier)
        if not self.masks:
            seg = np.empty((0, *data.shape[1:]), np.int8)
        return data, seg, seg_prev, {**properties, "class_locations": {}}


class ImageTransforms(ComposeTransforms):
    """Transforms of images alone; the segmentation that nnU-Net's loader hands in goes back to it as it is."""

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """As ``ComposeTransforms``."""
        segmentation = data_dict.pop("segmentation")
        return {**super().apply(data_dict, **params), "segmentation": segmentation}


class UnlabeledLoader(nnUNetDataLoader):
    """nnU-Net's loader with patches drawn uniformly: there is no label that could steer it.

    The mask of an image is cropped and transformed only where intensities are normalized within it, for nnU-Net's
    transforms then set what is outside to 0; the random draws are the same without.

    Args:
        places: case -> the folder of its files.
        args, transforms: batch size, both patch sizes and label manager, as for nnU-Net's loader, and its transforms.
        use_mask_for_norm: of the configuration, a bool a channel.
    """

    def __init__(
        self,
        places: Mapping[str, str],
        *args: Any,
        use_mask_for_norm: Sequence[bool],
        transforms: ComposeTransforms,
    ) -> None:
        masks = any(use_mask_for_norm)
        super().__init__(
            UnlabeledDataset(places, masks),
            *args,
            oversample_foreground_percent=0.0,
            transforms=transforms if masks else ImageTransforms(transforms.transforms),
        )
        self.has_ignore = False  # or it would look for annotated voxels


class TwoStreamLoader(SlimDataLoaderBase):
    """Batch number k depends only on the seed and k, not on the worker that makes it.

    So a resumed run sees the batches that the killed one would have seen, and two trainers with one seed see the same
    labeled batches, with or without an unlabeled stream. Only the number of the batch, not the number of
    workers, matters; cases are drawn with replacement, as nnU-Net does.

    Args:
        labeled: gives ``data``, ``target`` and ``keys``.
        unlabeled: gives ``unlabeled``, ``[B, C, *patch]`` float32; None for none.
        seed: the run's seed.
        purpose: keeps the draws of different loaders apart, for example ``("train", rank)``.
        first_batch: number of the first batch, above 0 when a run is resumed.
        probabilities: number of the batch -> how often each labeled case is drawn; None for all alike.

    Attributes:
        tickets: numbers of batches to make, which workers share; None without workers.
    """

    tickets: SimpleQueue[int | None] | None = None

    def __init__(
        self,
        labeled: nnUNetDataLoader,
        unlabeled: UnlabeledLoader | None,
        seed: int,
        purpose: tuple[str | int, ...],
        first_batch: int,
        probabilities: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        super().__init__(labeled._data, labeled.batch_size)
        self.labeled = labeled
        self.unlabeled = unlabeled
        self.seed = seed
        self.purpose = purpose
        self.next_batch = first_batch
        self.probabilities = probabilities
        self.transforms = labeled.transforms  # nnU-Net writes it to debug.json

    def set_thread_id(self, thread_id: int) -> None:
        """Called once in each worker."""
        die_with_parent()
        super().set_thread_id(thread_id)

    def generate_train_batch(self) -> dict[str, Any]:
        """The next batch; in a worker the next ticket's, with its ``number``, or nothing after the last one."""
        if self.tickets is None:
            number, self.next_batch = self.next_batch, self.next_batch + 1
            return self.batch(number)
        ticket = self.tickets.get()
        return {} if ticket is None else {**self.batch(ticket), "number": ticket}

    def batch(self, number: int) -> dict[str, Any]:
        """Batch ``number``."""
        if self.probabilities is not None:
            self.labeled.sampling_probabilities = self.probabilities(number)
        with seeded(self.seed, *self.purpose, "labeled", number):
            batch = made_by(self.labeled)
        if self.unlabeled is not None:
            with seeded(self.seed, *self.purpose, "unlabeled", number):
                batch["unlabeled"] = made_by(self.unlabeled)["data"]
        return batch


def made_by(loader: nnUNetDataLoader) -> dict[str, Any]:
    """A batch of nnU-Net's loader; where its transforms leave the work to the device, ``data`` is a ``Deferred``."""
    batch = loader.generate_train_batch()
    if isinstance(loader.transforms, DeferredTransforms):
        return {**batch, "data": loader.transforms.take(), "target": None}
    return batch


class OrderedWorkers(NonDetMultiThreadedAugmenter):
    """nnU-Net's background workers, 1 or more, and the batches of ``loader`` in order, from ``loader.next_batch`` on.

    A worker that is free takes the next ticket, so a batch that takes long holds up no other worker. Tickets bound the
    memory: there is a new one when a batch is handed out, so each worker makes one batch and at most 12 are ready,
    about as many as nnU-Net's two queues of six hold.

    Raises:
        RuntimeError: by ``next``, when a worker has raised or was killed.
    """

    def __init__(self, loader: TwoStreamLoader, num_workers: int, pin_memory: bool) -> None:
        in_flight = num_workers + 12
        super().__init__(loader, None, num_workers, in_flight, pin_memory=pin_memory, wait_time=0.002)
        self._next = loader.next_batch
        self._last_ticket = self._next + in_flight - 1
        self._early: dict[int, dict[str, Any]] = {}  # batches whose turn has not come
        self._tickets: SimpleQueue[int | None] = multiprocessing.SimpleQueue()
        loader.tickets = self._tickets
        for ticket in range(self._next, self._last_ticket + 1):
            self._tickets.put(ticket)

    def __next__(self) -> dict[str, Any]:
        """The next batch, without its number."""
        while self._next not in self._early:
            batch = super().__next__()
            self._early[batch.pop("number")] = batch
        batch = self._early.pop(self._next)
        self._next += 1
        self._last_ticket += 1
        self._tickets.put(self._last_ticket)
        return batch

    def _finish(self, timeout: float = 10, force: bool = False) -> None:
        """As nnU-Net's; workers that wait for a ticket would not see that it is over."""
        if self._processes:
            self.abort_event.set()
            for _ in self._processes:
                self._tickets.put(None)
        super()._finish(timeout, force)


def start_workers(
    loader: TwoStreamLoader, num_workers: int, pin_memory: bool
) -> OrderedWorkers | SingleThreadedAugmenter:
    """The batches of ``loader``, which belongs to the workers afterwards, in order; 0 makes them in this process."""
    if num_workers == 0:
        return SingleThreadedAugmenter(loader, None)
    workers = OrderedWorkers(loader, num_workers, pin_memory)
    workers._start()
    return workers
