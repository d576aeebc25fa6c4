"""New raw datasets: links to the images and labels of another one, complete or not there at all."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import replacing, write_json
from nnunet_ssl.locks import holding
from nnunet_ssl.unlabeled.find import GROUPS, UNLABELED_FOLDER, required_folder, with_spacing
from nnunet_ssl.unlabeled.folds import SPLITS
from nnunet_ssl.unlabeled.groups import all_groups

COPY = " Where links are not allowed, --copy copies the files."


class Split(NamedTuple):
    """Who is what. ``unlabeled`` holds what the source already had in ``imagesUn``, too."""

    labeled: list[str]
    validation: list[str]
    unlabeled: list[str]
    test: list[str]


@contextmanager
def new_dataset(raw: str, target: str, copy: bool, preprocessed: str | None = None) -> Iterator[str]:
    """Yield a folder to write a raw dataset into; it gets its name when the body has ended well, or is removed.

    One process makes it at a time: what others have left of it is removed first.

    Args:
        raw: nnU-Net's folder of raw datasets.
        target: the new dataset's name.
        copy: whether files are copied rather than linked to, for the message.
        preprocessed: nnU-Net's folder of that name; its folder of the dataset gets ``splits_final.json`` too.
            nnUNetv2_plan_experiment would copy it there; this is for those who bring plans from elsewhere.

    Raises:
        UserError: something could not be written, another process makes it, or it is there by now.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(holding(lock_of(raw, target), f"another process is making {target}: wait for its end."))
        except OSError as error:
            raise UserError(
                f"{error.filename or raw} cannot be written ({error.strerror}). Nothing was kept."
            ) from error
        if os.path.lexists(os.path.join(raw, target)):
            raise UserError(f"{os.path.join(raw, target)} exists already. Choose another id, or remove it.")
        with _building(raw, target, copy, preprocessed) as building:
            yield building


def lock_of(folder: str, target: str) -> str:
    """The lock's file of a dataset that is being made in one of nnU-Net's folders."""
    return os.path.join(folder, f".{target}-lock")


@contextmanager
def _building(raw: str, target: str, copy: bool, preprocessed: str | None) -> Iterator[str]:
    before = os.path.join(raw, f".{target}.")  # nnU-Net does not see names that begin with a dot
    for left in glob.glob(f"{glob.escape(before)}*"):  # by a killed run
        shutil.rmtree(left, ignore_errors=True)
    building = before + secrets.token_hex(8)
    made = None
    try:
        os.mkdir(building)
        yield building
        if preprocessed is not None:
            folder = os.path.join(preprocessed, target)
            made = None if os.path.isdir(folder) else folder
            os.makedirs(folder, exist_ok=True)
            with replacing(os.path.join(folder, SPLITS)) as temporary:
                shutil.copyfile(os.path.join(building, SPLITS), temporary)
        os.rename(building, os.path.join(raw, target))
        made = None
    except OSError as error:
        hint = "" if copy else COPY
        file = error.filename2 or error.filename or building  # of a copy or link the second is the one to be written
        raise UserError(f"{file} cannot be written ({error.strerror}). Nothing was kept.{hint}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def write_dataset(
    folder: str,
    name: str,
    source_folder: str,
    dataset_json: dict,
    images: dict[str, list[str]],
    split: Split,
    copy: bool,
    labeled_elsewhere: Collection[str] = (),
) -> None:
    """Write the images, labels, ``dataset.json``, ``splits_final.json`` and groups of a new raw dataset.

    Args:
        folder, name: to write into, directly below ``nnUNet_raw``, and the new dataset's name.
        source_folder, dataset_json: the raw dataset that the labels come from.
        images: case -> channel files, of every case of ``split``.
        split: who is what.
        copy: copy the files instead of linking to them.
        labeled_elsewhere: cases of ``split.labeled`` whose label the source does not have; the caller writes it.

    Raises:
        UserError: a case has no label that is to keep it.
        OSError: a file cannot be written.
    """
    ending = dataset_json["file_ending"]

    def put(file: str, *target: str) -> None:
        path = os.path.join(folder, *target)
        with suppress(FileExistsError):
            os.mkdir(os.path.dirname(path))  # not the dataset's own folder, if that is gone
        if copy:
            shutil.copy2(file, path)
        else:
            os.symlink(_link_text(file, os.path.dirname(folder)), path)

    def put_case(case: str, target_folder: str, files: list[str], names: list[str]) -> None:
        for file, name in zip(with_spacing(case, files), [*names, f"{case}.json"], strict=False):
            put(file, target_folder, name)

    def put_image(case: str, image_folder: str) -> None:
        channels = [f"{case}_{channel:04d}{ending}" for channel in range(len(images[case]))]
        put_case(case, image_folder, images[case], channels)

    def put_label(case: str, label_folder: str) -> None:
        put_case(case, label_folder, [_label_file(source_folder, dataset_json, case)], [case + ending])

    if groups := all_groups(os.path.basename(source_folder)):
        write_json(os.path.join(folder, GROUPS), groups)
    for case in {*split.labeled, *split.validation}:
        put_image(case, "imagesTr")
        if case not in labeled_elsewhere:
            put_label(case, "labelsTr")
    for case in split.unlabeled:
        put_image(case, UNLABELED_FOLDER)
    for case in split.test:
        put_image(case, "imagesTs")
        put_label(case, "labelsTs")

    adapted = {key: value for key, value in dataset_json.items() if key != "dataset"}
    adapted["name"] = name
    adapted["numTraining"] = len({*split.labeled, *split.validation})
    write_json(os.path.join(folder, "dataset.json"), adapted)
    write_json(os.path.join(folder, SPLITS), [{"train": split.labeled, "val": split.validation or split.labeled}])


def _label_file(source_folder: str, dataset_json: dict, case: str) -> str:
    """The label of a case that keeps it."""
    if "dataset" in dataset_json:
        name = dataset_json["dataset"][case].get("label")
        if not isinstance(name, str):
            raise UserError(f"{source_folder}/dataset.json names no label of case {case}, which is to keep it. Add it.")
        file = os.path.abspath(os.path.join(source_folder, os.path.expandvars(name)))
    else:
        file = os.path.join(source_folder, "labelsTr", case + dataset_json["file_ending"])
    if not os.path.isfile(file):
        raise UserError(
            f"{file} {absent(file)}, but case {case} is to keep its label. Choose another case with a list."
        )
    return file


def absent(file: str) -> str:
    return f"is a link that leads nowhere ({os.readlink(file)})" if os.path.islink(file) else "does not exist"


def _link_text(file: str, raw: str) -> str:
    """What a link two folders below ``raw`` says: relative within ``raw``, so that it may be moved or mounted."""
    if Path(os.path.abspath(file)).is_relative_to(os.path.abspath(raw)):
        return os.path.join(os.pardir, os.pardir, os.path.relpath(file, raw))
    return os.path.abspath(file)


def refuse_existing(target_id: int, target: str | None = None, option: str = "-o") -> None:
    """Refuse an id that no new dataset can have; what a killed run has left of ``target``, its name, is no obstacle.

    Raises:
        UserError: it is none, or one of nnU-Net's three folders knows a dataset of this id; ``option`` has given it.
    """
    if not 1 <= target_id <= 999:
        raise UserError(f"{option} {target_id} is not a dataset id. Give a number from 1 to 999.")
    raw = required_folder("nnUNet_raw")
    if not os.access(raw, os.W_OK):
        raise UserError(f"{raw} is not writable, so no dataset can be made in it.")
    existing = [name for name in find_candidate_datasets(target_id) if name != target or not is_unfinished(name)]
    if existing:
        raise UserError(
            f"{option} {target_id}: {existing[0]} exists already, among the raw or preprocessed data or the results. "
            "Choose another id, or remove it from all three folders."
        )


def is_unfinished(dataset: str) -> bool:
    """Whether nothing but a ``splits_final.json`` is there, as :func:`new_dataset` leaves it when it is killed."""
    if any(os.path.exists(os.path.join(os.environ.get(f"nnUNet_{name}", ""), dataset)) for name in ("raw", "results")):
        return False
    with os.scandir(os.path.join(required_folder("nnUNet_preprocessed"), dataset)) as entries:
        return {entry.name for entry in entries if not entry.name.startswith(".")} <= {SPLITS}
