"""Unlabelled images through nnU-Net's own preprocessing, each once, and again only when it has to be.

The prepared folder is ``<nnUNet_preprocessed>/<dataset>/<data_identifier>_unlabeled``, files as nnU-Net's own:

* ``manifest.json`` lists the cases that are finished, each with the raw files it was made from, and what in the plans
  it was made with. A case is current if its entry says what is true now; everything else is made again.
* ``.work`` holds what is being made. A finished case is moved out of it and then entered in the manifest, so that a
  killed run leaves nothing that looks finished and is not.

Where nnU-Net writes ``<case>_seg``, an image without a label gets nnU-Net's nonzero mask: 0 inside, -1 outside. It is
kept, since nnU-Net's augmentation masks with it where the plans normalise within the mask.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from tqdm import tqdm

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import stamp, write_json
from nnunet_ssl.pools import outcomes
from nnunet_ssl.unlabeled.check import BadImageError, CheckingPlans
from nnunet_ssl.unlabeled.find import channel_names, find_unlabeled, refuse_labeled_names, required_folder

FORMAT = 1
MANIFEST = "manifest.json"
WORK = ".work"
SAVE_EVERY = 2.0  # seconds between two writes of the manifest
POLL_EVERY = 2.0  # seconds between two looks of a waiting rank

Stamps = dict[str, list[list]]  # case -> [file name, size in bytes, mtime in ns] of each raw file


class PreparedFolder(NamedTuple):
    """Where the prepared unlabelled cases are, and which."""

    folder: str
    cases: list[str]


def prepare_unlabeled(
    dataset_name: str,
    plans_manager: PlansManager,
    configuration: str,
    dataset_json: dict,
    labeled_cases: Collection[str],
    num_processes: int,
) -> PreparedFolder:
    """Make or complete the folder of prepared unlabelled images, and say what is made again and why.

    Where the raw dataset is absent, as on a cluster that has the preprocessed data alone, a folder that was prepared
    with the same plans is taken as it is.

    Args:
        dataset_name: for instance ``Dataset004_Hippocampus``.
        plans_manager: the plans.
        configuration: nnU-Net configuration, for instance ``3d_fullres``.
        dataset_json: the dataset's ``dataset.json``.
        labeled_cases: labelled and validation cases; no unlabelled image may bear one of these names.
        num_processes: images prepared at a time, where there is enough to do; 1 prepares in this process.

    Returns:
        The folder and its cases, sorted.

    Raises:
        UserError: an image, the plans or the disk stands in the way. What was finished is kept.
    """
    task = _Task(plans_manager.plans, configuration, dataset_json)
    folder = prepared_folder(dataset_name, task.configuration_manager)
    images = _raw_images(dataset_name, dataset_json)
    if images is None:
        return _take_as_it_is(folder, task, dataset_name, labeled_cases)
    refuse_labeled_names(images, labeled_cases)
    stamps = image_stamps(images)
    prepared = PreparedFolder(folder, list(images))
    if not _Manifest.read(folder).difference(stamps, task.preprocessing):
        return prepared
    try:
        os.makedirs(os.path.join(folder, WORK), exist_ok=True)
        with _one_at_a_time(folder):
            manifest = _Manifest.read(folder)  # again: another process may have done it meanwhile
            difference = manifest.difference(stamps, task.preprocessing)
            if difference:
                _announce(difference, folder, len(images))
                todo = sorted(set(itertools.chain(*difference.values())) & set(images))
                # What is not current is struck off first: a raw file may be put back as it was before we are done.
                current = {case: manifest.cases[case] for case in images if case not in todo}
                _complete(_Manifest(folder, task.preprocessing, current), images, stamps, task, num_processes)
    except OSError as error:
        raise UserError(_cannot_write(folder, error.strerror or str(error))) from error
    return prepared


def wait_until_prepared(
    dataset_name: str,
    plans_manager: PlansManager,
    configuration: str,
    dataset_json: dict,
    labeled_cases: Collection[str],
    timeout: float = 24 * 3600,
) -> PreparedFolder:
    """Wait until another process has prepared the unlabelled images, doing nothing else.

    For the ranks of a distributed run beside the first. They look at the folder rather than wait in a collective,
    which would time out.

    Args:
        dataset_name, plans_manager, configuration, dataset_json, labeled_cases: as for ``prepare_unlabeled``.
        timeout: seconds after which to give up.

    Returns:
        The folder and its cases, sorted.

    Raises:
        UserError: not prepared in time.
        SystemExit: the images cannot be prepared; the rank that prepares them says why.
    """
    task = _Task(plans_manager.plans, configuration, dataset_json)
    folder = prepared_folder(dataset_name, task.configuration_manager)
    end = time.monotonic() + timeout
    while True:
        try:
            images = _raw_images(dataset_name, dataset_json)
            if images is None:
                return _take_as_it_is(folder, task, dataset_name, labeled_cases)
            refuse_labeled_names(images, labeled_cases)
        except UserError:
            raise SystemExit(1) from None
        if not _Manifest.read(folder).difference(image_stamps(images), task.preprocessing):
            return PreparedFolder(folder, list(images))
        if time.monotonic() > end:
            raise UserError(
                f"{folder} was not ready after {timeout:.0f} s. Prepare the images ahead with "
                f"nnUNetv2_ssl_preprocess -d {dataset_name} -c {configuration}."
            )
        time.sleep(POLL_EVERY)


def prepared_folder(dataset_name: str, configuration_manager: ConfigurationManager) -> str:
    """The folder of a configuration's prepared unlabelled images."""
    return os.path.join(
        required_folder("nnUNet_preprocessed"), dataset_name, f"{configuration_manager.data_identifier}_unlabeled"
    )


def preprocessing_of(plans_manager: PlansManager, configuration: str, dataset_json: dict) -> dict:
    """What in the plans and ``dataset.json`` determines a prepared image. Patch size, batch size and network do not.

    Returns:
        By name, in plain JSON types.
    """
    plans = plans_manager.plans
    of_configuration = plans_manager.get_configuration(configuration).configuration
    decisive = {
        **{
            key: of_configuration.get(key)
            for key in (
                "data_identifier",
                "preprocessor_name",
                "spacing",
                "normalization_schemes",
                "use_mask_for_norm",
                "resampling_fn_data",
                "resampling_fn_data_kwargs",
                "resampling_fn_seg",
                "resampling_fn_seg_kwargs",
            )
        },
        "transpose_forward": plans_manager.transpose_forward,
        "foreground_intensity_properties": plans_manager.foreground_intensity_properties_per_channel,
        "image_reader_writer": plans["image_reader_writer"],
        "channel_names": channel_names(dataset_json),
        "file_ending": dataset_json["file_ending"],
    }
    return json.loads(json.dumps(decisive))


@dataclass
class _Task:
    """How to prepare, in what a spawned worker can be sent."""

    plans: dict
    configuration: str
    dataset_json: dict
    preprocessing: dict = field(init=False)

    def __post_init__(self) -> None:
        plans_manager = PlansManager(self.plans)
        if self.configuration not in plans_manager.available_configurations:
            raise UserError(
                f"the plans {plans_manager.plans_name} have no configuration {self.configuration}, but "
                f"{', '.join(plans_manager.available_configurations)}."
            )
        self.preprocessing = preprocessing_of(plans_manager, self.configuration, self.dataset_json)

    @property
    def configuration_manager(self) -> ConfigurationManager:
        return PlansManager(self.plans).get_configuration(self.configuration)


@dataclass
class _Manifest:
    """The finished cases of a prepared folder.

    Attributes:
        folder: the prepared folder.
        preprocessing: what determined them, see ``preprocessing_of``.
        cases: case -> {"raw": stamps of its raw files, "files": size of each prepared file}.
    """

    folder: str
    preprocessing: dict
    cases: dict[str, dict]

    @classmethod
    def read(cls, folder: str) -> _Manifest:
        """Read the manifest; an unreadable or foreign one counts as none."""
        try:
            with open(os.path.join(folder, MANIFEST), encoding="utf-8") as file:
                content = json.load(file)
            if content["format"] == FORMAT:
                return cls(folder, content["preprocessing"], content["cases"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return cls(folder, {}, {})

    def write(self) -> None:
        """Write the manifest in one step: whoever reads it sees the old one or the new one."""
        write_json(
            os.path.join(self.folder, MANIFEST),
            {"format": FORMAT, "preprocessing": self.preprocessing, "cases": self.cases},
        )

    def difference(self, stamps: Stamps, preprocessing: dict) -> dict[str, list[str]]:
        """What has to be done, by reason: reason -> cases; empty if the folder is current."""
        reasons: dict[str, list[str]] = {}
        changed = [key for key, value in preprocessing.items() if self.preprocessing.get(key) != value]
        for case, raw in stamps.items():
            entry = self.cases.get(case)
            if entry is None:
                reason = "not yet prepared"
            elif changed:
                reason = f"plans changed: {', '.join(changed)}"
            elif entry["raw"] != raw:
                reason = "image changed"
            elif not self._files_are_there(entry):
                reason = "prepared files missing or damaged"
            else:
                continue
            reasons.setdefault(reason, []).append(case)
        if gone := sorted(set(self.cases) - set(stamps)):
            reasons["no longer there, removed"] = gone
        return reasons

    def is_complete(self, preprocessing: dict) -> bool:
        """Whether all that is listed is there and was made with this preprocessing."""
        return (
            bool(self.cases)
            and self.preprocessing == preprocessing
            and all(map(self._files_are_there, self.cases.values()))
        )

    def _files_are_there(self, entry: dict) -> bool:
        with contextlib.suppress(OSError):
            return all(os.path.getsize(os.path.join(self.folder, f)) == size for f, size in entry["files"].items())
        return False


class _Outcome(NamedTuple):
    """What became of a case. ``fatal``: the next ones would fare no better."""

    case: str
    problem: str | None = None
    fatal: bool = False


def _raw_images(dataset_name: str, dataset_json: dict) -> dict[str, list[str]] | None:
    """The unlabelled images, or None where the raw dataset is not on this machine."""
    raw = os.path.join(nnUNet_raw.get() or os.devnull, dataset_name)
    return find_unlabeled(raw, dataset_json) if os.path.isdir(raw) else None


def _take_as_it_is(folder: str, task: _Task, dataset_name: str, labeled_cases: Collection[str]) -> PreparedFolder:
    manifest = _Manifest.read(folder)
    if not manifest.is_complete(task.preprocessing):
        raise UserError(
            f"the raw dataset {dataset_name} is not in nnUNet_raw={nnUNet_raw.get()}, and {folder} does "
            "not hold its unlabelled images prepared with these plans. Bring one of the two."
        )
    cases = sorted(manifest.cases)
    refuse_labeled_names({case: [os.path.join(folder, case)] for case in cases}, labeled_cases)
    return PreparedFolder(folder, cases)


def image_stamps(images: dict[str, list[str]]) -> Stamps:
    """What tells that a raw image has changed; with it the file that nnU-Net's TIFF reader takes the spacing from."""
    stamps: Stamps = {}
    for case, files in images.items():
        spacing_file = os.path.join(os.path.dirname(files[0]), f"{case}.json")
        stamps[case] = []
        for file in [*files, *([spacing_file] if os.path.isfile(spacing_file) else [])]:
            stamps[case].append([os.path.basename(file), *stamp(file)])
    return stamps


@contextlib.contextmanager
def _one_at_a_time(folder: str) -> Iterator[None]:
    """Let one process work in a folder: the folds of a cross-validation like to be started together."""
    lock = FileLock(os.path.join(folder, WORK, "lock"))  # the system frees it when its holder dies
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"nnunet_ssl: another process is preparing {folder}; waiting for it.", flush=True)
        lock.acquire()
    except NotImplementedError:  # a file system without locks: do not start two at a time there
        pass
    try:
        yield
    finally:
        lock.release()


def _announce(difference: dict[str, list[str]], folder: str, num_images: int) -> None:
    gone = len(difference.get("no longer there, removed", []))
    todo = sum(map(len, difference.values())) - gone
    parts = [
        f"{len(cases)} {reason} ({', '.join(cases[:3])}{', ...' if len(cases) > 3 else ''})"
        for reason, cases in difference.items()
    ]
    print(f"nnunet_ssl: preparing {todo} of {num_images} unlabelled images in {folder}: {'; '.join(parts)}", flush=True)


def _complete(
    manifest: _Manifest, images: dict[str, list[str]], stamps: Stamps, task: _Task, num_processes: int
) -> None:
    """Make what the manifest lacks, then remove what belongs to no case."""
    folder, work = manifest.folder, os.path.join(manifest.folder, WORK)
    _empty(work)
    manifest.write()
    saved = time.monotonic()
    jobs = [(task, case, images[case], os.path.join(work, case)) for case in images if case not in manifest.cases]
    problems: list[str] = []
    try:
        with contextlib.closing(outcomes(_prepare_case, jobs, num_processes)) as finished:
            for outcome in tqdm(finished, "Preparing unlabelled images", len(jobs), disable=not jobs):
                if outcome.fatal:
                    raise UserError(_cannot_write(folder, outcome.problem))
                if outcome.problem is not None:
                    problems.append(outcome.problem)
                    continue
                files = _publish(os.path.join(work, outcome.case), folder)
                manifest.cases[outcome.case] = {"raw": stamps[outcome.case], "files": files}
                if time.monotonic() - saved > SAVE_EVERY:
                    manifest.write()
                    saved = time.monotonic()
    except BrokenProcessPool as error:
        raise UserError(
            f"{folder}: a process that prepared images was killed, most likely for lack of memory. Prepare with fewer "
            "at a time (nnUNetv2_ssl_preprocess -np 1); what is finished is kept."
        ) from error
    finally:
        _empty(work)  # first: on a full disk the manifest needs the room
        manifest.write()
    if problems:
        more = f" {len(problems) - 1} other image(s) cannot be used either." if len(problems) > 1 else ""
        raise UserError(sorted(problems)[0] + more)
    listed = set(itertools.chain(*(entry["files"] for entry in manifest.cases.values())))
    for entry in os.scandir(folder):
        if entry.is_file() and entry.name not in listed and entry.name != MANIFEST:
            os.remove(entry.path)


def _prepare_case(task: _Task, case: str, files: list[str], folder: str) -> _Outcome:
    """Prepare one image into a folder of its own. Errors come back as values: raising would break the pool."""
    plans_manager = CheckingPlans(task.plans, len(channel_names(task.dataset_json)), task.configuration)
    configuration_manager = plans_manager.get_configuration(task.configuration)
    try:
        os.makedirs(folder)
        preprocessor = configuration_manager.preprocessor_class(verbose=False)
        preprocessor.run_case_save(
            os.path.join(folder, case), files, None, plans_manager, configuration_manager, task.dataset_json
        )
        _read_back(folder, case, files)
    except BadImageError as error:
        return _Outcome(case, str(error))
    except Exception as error:
        # blosc2 does not say why it could not write, so we try for ourselves
        if reason := (error.strerror if isinstance(error, OSError) else _why_writing_fails(folder)):
            return _Outcome(case, reason, fatal=True)
        return _Outcome(
            case, f"{files[0]} cannot be preprocessed ({type(error).__name__}: {error}). Replace or remove it."
        )
    return _Outcome(case)


def _read_back(folder: str, case: str, files: list[str]) -> None:
    """Make sure that what was written can be read and trained on."""
    data, seg, *_ = infer_dataset_class(folder)(folder, [case]).load_case(case)
    _ = seg[:]
    if not np.isfinite(data[:]).all():
        raise BadImageError(
            f"{files[0]}: after normalisation and resampling the image has voxels that are NaN or infinite. "
            "Look at its intensities, or remove it."
        )


def _why_writing_fails(folder: str) -> str | None:
    """Write a file of 16 MiB and see; None if that works."""
    file = os.path.join(folder, "probe")
    try:
        with open(file, "wb") as stream:
            stream.write(bytes(1 << 24))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return error.strerror
    finally:
        with contextlib.suppress(OSError):
            os.remove(file)
    return None


def _publish(source: str, target: str) -> dict[str, int]:
    """Move a finished case to where it is looked for; returns the size of each file."""
    sizes = {}
    for name in os.listdir(source):
        sizes[name] = os.path.getsize(os.path.join(source, name))
        os.replace(os.path.join(source, name), os.path.join(target, name))
    return sizes


def _empty(work: str) -> None:
    """Remove what a killed or failed run left in the making."""
    for entry in os.scandir(work):
        if entry.is_dir():
            shutil.rmtree(entry.path, ignore_errors=True)
        elif entry.name != "lock":
            os.remove(entry.path)


def _cannot_write(folder: str, reason: str) -> str:
    return (
        f"{folder} cannot be written ({reason}). Make room or make it writable and run the same command again: what "
        "is finished is kept."
    )
