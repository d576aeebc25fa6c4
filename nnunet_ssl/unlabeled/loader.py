"""Serves labelled and unlabelled batches together, from one pool of workers, in an order that a seed fixes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.data_loader import SlimDataLoaderBase
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_ssl.pools import die_with_parent
from nnunet_ssl.randomness import seeded


class PreparedDataset:
    """Prepared cases, each read by nnU-Net's dataset for what the plans' preprocessor has written.

    Args:
        places: case -> the folder of its files, see ``store.PreparedFolder``.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self.identifiers = sorted(places)
        classes = {place: infer_dataset_class(place) for place in set(places.values())}
        self._datasets = {case: classes[place](place, [case]) for case, place in places.items()}

    def load_case(self, identifier: str) -> tuple[Any, Any, None, dict]:
        """As nnU-Net's."""
        return self._datasets[identifier].load_case(identifier)


class UnlabeledDataset(PreparedDataset):
    """Images without labels: the segmentation is nnU-Net's 0 / -1 mask of the nonzero region, which transforms use.

    That of an image whose labels are not to be used (MAE) has them too.
    """

    def load_case(self, identifier: str) -> tuple[Any, Any, None, dict]:
        """As nnU-Net's; an unlabelled image knows of no class locations, which nnU-Net's loader asks for."""
        data, seg, seg_prev, properties = super().load_case(identifier)
        return data, seg, seg_prev, {**properties, "class_locations": {}}


class UnlabeledLoader(nnUNetDataLoader):
    """nnU-Net's loader with patches drawn uniformly: there is no label that could steer it.

    Args:
        As nnU-Net's loader, less what concerns foreground.
    """

    def __init__(self, data: UnlabeledDataset, *args: Any, **kwargs: Any) -> None:
        super().__init__(data, *args, oversample_foreground_percent=0.0, **kwargs)
        self.has_ignore = False  # or it would look for annotated voxels


class TwoStreamLoader(SlimDataLoaderBase):
    """Batch number k is a function of the seed and k alone, whichever worker makes it.

    So a resumed run sees the batches that the killed one would have seen, and two trainers with one seed see the same
    labelled batches, with or without an unlabelled stream beside them. Only the number of the batch, not the number of
    workers, matters; cases are drawn with replacement, as nnU-Net does.

    Args:
        labeled: gives ``data``, ``target`` and ``keys``.
        unlabeled: gives ``unlabeled``, ``[B, C, *patch]`` float32; None for none.
        seed: the run's seed.
        purpose: keeps the draws of different loaders apart, for example ``("train", rank)``.
        first_batch: number of the first batch, above 0 when a run is resumed.
        num_workers: processes that share this loader, 0 for none.
        probabilities: number of the batch -> how often each labelled case is drawn; None for all alike.
    """

    def __init__(
        self,
        labeled: nnUNetDataLoader,
        unlabeled: UnlabeledLoader | None,
        seed: int,
        purpose: tuple[str | int, ...],
        first_batch: int,
        num_workers: int,
        probabilities: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        super().__init__(labeled._data, labeled.batch_size, max(1, num_workers))
        self.labeled = labeled
        self.unlabeled = unlabeled
        self.seed = seed
        self.purpose = purpose
        self.next_batch = first_batch
        self.probabilities = probabilities
        self.transforms = labeled.transforms  # nnU-Net writes it to debug.json

    def set_thread_id(self, thread_id: int) -> None:
        """Called once in each worker: worker i of n makes the batches i, i + n, i + 2n, ..."""
        die_with_parent()
        self.next_batch += thread_id
        super().set_thread_id(thread_id)

    def generate_train_batch(self) -> dict[str, Any]:
        """The next batch of this worker."""
        number, self.next_batch = self.next_batch, self.next_batch + self.number_of_threads_in_multithreaded
        if self.probabilities is not None:
            self.labeled.sampling_probabilities = self.probabilities(number)
        with seeded(self.seed, *self.purpose, "labeled", number):
            batch = self.labeled.generate_train_batch()
        if self.unlabeled is not None:
            with seeded(self.seed, *self.purpose, "unlabeled", number):
                batch["unlabeled"] = self.unlabeled.generate_train_batch()["data"]
        return batch


def start_workers(
    loader: TwoStreamLoader, num_workers: int, pin_memory: bool
) -> MultiThreadedAugmenter | SingleThreadedAugmenter:
    """Hand ``loader`` to nnU-Net's kind of background workers, the one that keeps the order of the batches.

    Args:
        loader: made for the same ``num_workers``.
        num_workers: 0 makes batches in this process.
        pin_memory: whether batches go to a GPU.
    """
    if num_workers == 0:
        return SingleThreadedAugmenter(loader, None)
    workers = MultiThreadedAugmenter(
        loader,
        None,
        num_workers,
        num_cached_per_queue=max(1, math.ceil(6 / num_workers)),  # in all six, or one each: memory as with nnU-Net
        seeds=[int(s) for s in np.arange(num_workers)],
        pin_memory=pin_memory,
        wait_time=0.002,
    )
    # A forked worker inherits how many threads its parent has, but not the threads: once OpenMP has run here with two,
    # an FFT (of nnU-Net's blur) in the worker would wait for the second one for ever. Workers are to have one anyway.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        workers._start()
    finally:
        torch.set_num_threads(threads)
    return workers
