"""One warped case: registered, judged, and saved as nnU-Net saves a labeled one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import SimpleITK as sitk
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import Stamp, file_digest, stamp
from nnunet_ssl.shapes.quality import volumes, why_not
from nnunet_ssl.shapes.registration import (
    Registration,
    Volume,
    array,
    one_thread,
    register,
    volume,
    warp,
    warp_labels,
)
from nnunet_ssl.unlabeled.case import Preparation
from nnunet_ssl.unlabeled.store import Outcome, disk_failure, memory_failure


@one_thread()
def warp_case(
    task: Preparation, channels: list[int], moving: str, fixed: str, fixed_folder: str, made_from: str, place: str
) -> Outcome:
    """Register one pair, and save the warped case into its own folder. Errors come back as values."""
    name = os.path.basename(place)
    entry: dict[str, Any] = {"moving": moving, "fixed": fixed, "made_from": made_from}
    try:
        there = prepared_volume(task, fixed_folder, fixed, False)
        here = prepared_volume(task, task.labeled_folder, moving, True)
        ignored = PlansManager(task.plans).get_label_manager(task.dataset_json).ignore_label
        found, labels, why = registered(there, here, channels or None, ignored)
        if found is not None:
            entry |= {key: round(value, 4) for key, value in found._asdict().items() if key != "transform"}
        if found is None or labels is None or why:
            return Outcome(name, entry, why)
        grid = there.channels[0]
        del there  # its other channels are not needed any more
        data = np.empty((len(here.channels), *array(labels).shape), np.float32)
        for channel, image in zip(data, here.channels, strict=True):
            channel[:] = array(warp(image, grid, found.transform))
        os.makedirs(place)
        _save(task.labeled_folder, moving, os.path.join(place, name), data, array(labels)[None])
    except Exception as error:
        less = "Warp with fewer at a time (nnUNetv2_ssl_warp -np 1)"
        if why := memory_failure(error, f"{moving} and {fixed} do", less):
            return Outcome(name, entry, why, fatal=True)
        if lost := disk_failure(error, place):
            return Outcome(name, entry, lost, fatal=True)
        return Outcome(name, entry, f"cannot be registered ({type(error).__name__}: {error})")
    return Outcome(name, entry)


def registered(
    there: Volume, here: Volume, channels: list[int] | None = None, ignored: int | None = None
) -> tuple[Registration | None, sitk.Image | None, str | None]:
    """Register a labeled case onto an image, and judge it.

    Args:
        there: the image without labels.
        here: the labeled case.
        channels: that are compared; None takes all of them.
        ignored: the label to ignore, if there is one: what lies outside the labeled image has it, since nobody has
            annotated that, and nnU-Net draws patches from what is annotated. Else it is padded as nnU-Net pads.

    Returns:
        The registration, the warped labels, and what stands against them; None where there is no such thing.
    """
    grid = there.channels[0]
    if grid.GetDimension() != here.channels[0].GetDimension():
        return None, None, "are a slice and a volume"
    assert here.labels is not None
    found = register(there, here, channels)
    labels = warp_labels(here.labels, grid, found.transform, -1 if ignored is None else ignored)
    before, after = (volumes(array(x), float(np.prod(x.GetSpacing())), here.structures) for x in (here.labels, labels))
    return found, labels, why_not(found, before, after)


def stamps_of(task: Preparation, case: str, kept: Iterable[Sequence], needed: bool = True) -> list[list[str | Stamp]]:
    """What tells that a prepared labeled case is another one: name and stamp of each of its files.

    Args:
        task: how it was prepared.
        case: its name.
        kept: what this said earlier; only files of another size or time are read.
        needed: whether it has to be there; else nothing is said of a case that is not.

    Raises:
        UserError: it is needed and not there, or cannot be read.
    """
    folder, earlier = task.labeled_folder, {name: entry for name, *entry in kept}
    files = [f"{case}{end}" for end in (".b2nd", "_seg.b2nd", ".npz", ".pkl")]
    try:
        there = [file for file in files if os.path.isfile(os.path.join(folder, file))]
        if not there and needed:
            raise UserError(f"{folder} has no case {case}. {task.again}.")
        return [[file, *stamp(os.path.join(folder, file), earlier.get(file), digest_of)] for file in there]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror or error}). {task.again}.") from error


def digest_of(file: str | Path) -> str:
    """SHA-256 of what a prepared file holds: nnU-Net compresses by several threads, in other bytes each time."""
    if os.fspath(file).endswith(".b2nd"):
        with suppress(RuntimeError, ValueError):  # damaged: reading it for training says so
            values = np.ascontiguousarray(blosc2.open(os.fspath(file), mode="r")[:])
            digest = sha256(repr((values.shape, values.dtype)).encode())
            digest.update(values.data)
            return digest.hexdigest()
    return file_digest(file)


def load(folder: str, case: str) -> tuple[np.ndarray, np.ndarray, dict]:
    """Images ``[C, z, y, x]``, segmentation ``[1, z, y, x]`` and properties of a prepared case."""
    data, seg, properties = _opened(folder, case)
    return data[:], seg[:], properties


def _opened(folder: str, case: str) -> tuple[Any, Any, dict]:
    """As ``load``, but nothing of the two arrays is read yet."""
    data, seg, _, properties = infer_dataset_class(folder)(folder, [case]).load_case(case)
    return data, seg, properties


def prepared_volume(task: Preparation, folder: str, case: str, labels: bool) -> Volume:
    """A prepared case for registration."""
    data, seg, properties = _opened(folder, case)
    spacing = spacing_of(task, properties)
    return volume(data[:], spacing, seg[:][0], structures_of(properties)) if labels else volume(data[:], spacing)


def structures_of(properties: dict) -> tuple[int, ...]:
    """The labels whose voxels nnU-Net has listed: its classes or regions, not everything that is annotated."""
    listed = [np.atleast_1d(key) for key in properties["class_locations"]]
    return tuple(sorted({int(label) for labels in listed if -1 not in labels for label in labels}))


def spacing_of(task: Preparation, properties: dict) -> tuple[float, ...]:
    """Of a prepared case, z, y, x in mm: a 2D configuration leaves that between slices as it was."""
    plans_manager = PlansManager(task.plans)
    spacing = list(plans_manager.get_configuration(task.configuration).spacing)
    if len(spacing) == 2:
        spacing.insert(0, properties["spacing"][plans_manager.transpose_forward[0]])
    return tuple(map(float, spacing))


def _save(moving_folder: str, moving: str, file: str, data: np.ndarray, seg: np.ndarray) -> None:
    """As nnU-Net's preprocessor saves the labeled case, with its own class locations."""
    dataset_class = infer_dataset_class(moving_folder)
    old_data, old_seg, properties = _opened(moving_folder, moving)
    seg = seg.astype(np.int16)
    classes = list(properties["class_locations"])
    locations = DefaultPreprocessor._sample_foreground_locations(seg, classes)
    properties = {**properties, "class_locations": locations}
    chunks: dict[str, tuple[int, ...]] = {}
    if issubclass(dataset_class, nnUNetDatasetBlosc2):
        for suffix, old, new in (("", old_data, data), ("_seg", old_seg, seg)):
            chunks[f"chunks{suffix}"] = tuple(map(min, old.chunks, new.shape))
            chunks[f"blocks{suffix}"] = tuple(map(min, old.blocks, chunks[f"chunks{suffix}"]))
    dataset_class.save_case(data, seg, properties, file, **chunks)
