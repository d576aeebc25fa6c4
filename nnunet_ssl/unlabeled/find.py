"""Which images have no labels: the files of ``imagesUn``, told by their names alone.

``imagesUn`` follows the rules of nnU-Net's ``imagesTr``: ``<case>_<channel, four digits><file ending>``.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json
from nnunet_ssl.names import file_ending, path_component

GROUPS = "groups.json"  # next to dataset.json: case -> patient, if patients have several cases
SPLIT = "ssl_split.json"  # in a dataset that was split from another: how it came about, and who is what
PSEUDOLABELED = "ssl_pseudolabel.json"  # the same for a dataset with pseudo-labels
UNLABELED_FOLDER = "imagesUn"


def find_unlabeled(raw_folder: str, dataset_json: dict) -> dict[str, list[str]]:
    """Find the images of ``imagesUn`` in a raw dataset, ``<nnUNet_raw>/DatasetXXX_Name``, without opening any.

    Returns:
        case -> its channel files, cases and channels in order.

    Raises:
        UserError: there is no ``imagesUn``, it holds no image, or a file in it is not named as nnU-Net wants it.
    """
    folder = os.path.join(raw_folder, UNLABELED_FOLDER)
    ending = file_ending(dataset_json.get("file_ending"), os.path.join(raw_folder, "dataset.json"))
    if not os.path.isdir(folder):
        raise UserError(
            f"{folder} does not exist. Put the images that have no labels there, named as those in imagesTr "
            f"(<case>_0000{ending})."
        )
    cases, others = find_images(folder, ending)
    if broken := [name for name in others if not os.path.exists(os.path.join(folder, name))]:
        link = os.path.join(folder, broken[0])
        raise UserError(
            f"{link}{_and_more(broken)}: the link leads nowhere, because {os.path.realpath(link)} does not exist. "
            "Bring that file back, or remove the link."
        )
    if others:
        raise UserError(
            f"{os.path.join(folder, others[0])}{_and_more(others)} is not an image of this dataset: its images are "
            f"named <case>_0000{ending}, where the four digits are the channel. Rename, convert or remove it."
        )
    if not cases:
        raise UserError(
            f"{folder} holds no image. Put the images that have no labels there, named as those in imagesTr "
            f"(<case>_0000{ending})."
        )
    num_channels = len(channel_names(dataset_json))
    for case, files in cases.items():
        check_channels(case, files, ending, num_channels)
        if case.endswith("_seg"):  # nnU-Net keeps the segmentation of a case X in X_seg
            raise UserError(f"{files[0]}: nnU-Net keeps case names that end in _seg for itself. Rename the case.")
    return cases


def find_images(folder: str, ending: str) -> tuple[dict[str, list[str]], list[str]]:
    """Sort the files of an nnU-Net image folder, such as ``imagesTr``, by case, without opening any.

    Returns:
        case -> its channel files, cases and channels in order; and the names of what is not an image. Hidden files and
        the ``<case>.json`` that nnU-Net's TIFF reader takes the spacing from count as neither.

    Raises:
        UserError: a name is not UTF-8, or not text in this system's locale. ITK would end the interpreter.
    """
    try:
        os.path.abspath(folder).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"the folder {folder!a} is named in bytes that are no UTF-8, or the locale is not UTF-8. Set PYTHONUTF8=1, "
            "or rename it."
        ) from None
    pattern = re.compile(rf"(.+)_\d{{4}}{re.escape(ending)}")
    cases: dict[str, list[str]] = defaultdict(list)
    others: list[str] = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if name.startswith("."):
            continue
        match = pattern.fullmatch(path_component(name, "file", folder))
        (cases[match[1]] if match and os.path.isfile(path) else others).append(path)
    spacing_files = {os.path.join(folder, f"{case}.json") for case in cases}
    return dict(sorted(cases.items())), [os.path.basename(path) for path in others if path not in spacing_files]


def with_spacing(case: str, files: list[str]) -> list[str]:
    """A case's files, and the one next to them that nnU-Net's TIFF reader takes the spacing from, if it is there.

    It has the name of the file, which a ``dataset.json`` that lists files may give a case of another name.
    """
    stem = os.path.splitext(files[0])[0]
    of_image = re.sub(r"_\d{4}$", "", stem) if os.path.basename(stem) != case else stem
    for name in (of_image, stem, os.path.join(os.path.dirname(files[0]), case)):
        if os.path.isfile(f"{name}.json"):
            return [*files, f"{name}.json"]
    return files


def find_labeled(raw_folder: str, dataset_json: dict) -> dict[str, list[str]]:
    """Find the labeled images of a dataset, in ``imagesTr`` or where ``dataset.json`` says, without opening any.

    Returns:
        case -> its channel files, sorted by case.

    Raises:
        UserError: a case that ``dataset.json`` lists cannot be a file's name, or names no images.
    """
    source = os.path.join(raw_folder, "dataset.json")
    if "dataset" in dataset_json:  # nnU-Net's other way: explicit files, relative to the dataset's folder
        try:
            files = {
                path_component(case, "case", source): [os.fspath(name) for name in entry["images"]]
                for case, entry in dataset_json["dataset"].items()
            }
        except (AttributeError, LookupError, TypeError):
            raise UserError(
                f"{source}: 'dataset' must give for each case its 'images', a list of files, and its 'label'. Write it "
                "so, or remove it."
            ) from None
        return {
            case: [os.path.abspath(os.path.join(raw_folder, os.path.expandvars(name))) for name in files[case]]
            for case in sorted(files)
        }
    folder = os.path.join(raw_folder, "imagesTr")
    return find_images(folder, file_ending(dataset_json.get("file_ending"), source))[0] if os.path.isdir(folder) else {}


def refuse_labeled_names(unlabeled: dict[str, list[str]], labeled_cases: Collection[str]) -> None:
    """Refuse an unlabeled image that bears the name of a labeled or validation case.

    The same image on both sides would be a labeled image to one half of the method and an unlabeled one to the
    other; in validation it would flatter the score.

    Raises:
        UserError: names the first such file.
    """
    both = sorted(set(unlabeled) & set(labeled_cases))
    if both:
        raise UserError(
            f"{unlabeled[both[0]][0]}{_and_more(both)}: {both[0]} is also a labeled or validation case of this "
            f"dataset. Remove it from {UNLABELED_FOLDER}, or rename it if it is another image."
        )


def refuse_labeled_images(unlabeled: dict[str, list[str]], labeled: dict[str, list[str]]) -> None:
    """Refuse an unlabeled image that is a labeled one under another name: the same files, through any links.

    Labeled files that are not there are passed over.

    Raises:
        UserError: names the first such file and the labeled case.
    """
    known = {identity: case for case, files in labeled.items() if (identity := _identity(files))}
    for files in unlabeled.values():
        identity = _identity(files)
        if identity and (twin := known.get(identity)):
            raise UserError(is_labeled(files[0], twin))


def is_labeled(file: str, case: str) -> str:
    """What to say of an unlabeled image that is the labeled or validation image of ``case``."""
    return (
        f"{file} is the image of {case}, a labeled or validation case of this dataset, under another name. Remove it "
        f"from {UNLABELED_FOLDER}."
    )


def _identity(files: list[str]) -> tuple[tuple[int, int], ...] | None:
    """What tells files apart, links followed; None if one is not there."""
    try:
        return tuple((status.st_dev, status.st_ino) for status in map(os.stat, files))
    except OSError:
        return None


def channel_names(dataset_json: dict) -> dict[str, str]:
    """The channels of a dataset's images, by nnU-Net's present or former name in ``dataset.json``."""
    return dataset_json["channel_names"] if "channel_names" in dataset_json else dataset_json["modality"]


def resolve_dataset(dataset: str | int) -> str:
    """Turn a dataset id into the name of its folder, as nnU-Net does.

    Raises:
        UserError: not a number, or not exactly one such dataset.
    """
    try:
        return str(maybe_convert_to_dataset_name(dataset))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"dataset {dataset}: there is not exactly one dataset of that id in nnUNet_raw={nnUNet_raw.get()} and "
            f"nnUNet_preprocessed={nnUNet_preprocessed.get()}. Check the id and the two environment variables."
        ) from error


def read_dataset_json(folder: str) -> dict:
    """Read the ``dataset.json`` of a raw or preprocessed dataset.

    Raises:
        UserError: it is missing, not JSON, or without a file ending or channels.
    """
    file = os.path.join(folder, "dataset.json")
    dataset_json = read_json(file, "Every nnU-Net dataset needs one.")
    file_ending(dataset_json.get("file_ending"), file)
    if not isinstance(dataset_json.get("channel_names", dataset_json.get("modality")), dict):
        raise UserError(f'{file} has no channel_names. Name the channels of an image, as in {{"0": "CT"}}.')
    return dataset_json


def read_plans(file: str, remedy: str, configuration: str | None = None) -> PlansManager:
    """Read nnU-Net's plans, which users edit, and see that they have a configuration.

    Raises:
        UserError: they are missing, no plans, or without the configuration or a known reader; ``remedy`` says what to
            do.
    """
    plans = PlansManager(read_json(file, remedy, keys={"image_reader_writer": str, "configurations": dict}))
    try:
        _ = plans.image_reader_writer_class
        if configuration is not None:
            plans.get_configuration(configuration)
    except Exception as error:  # nnU-Net's own code looks into it
        raise UserError(f"{file}: nnU-Net does not accept it ({type(error).__name__}: {error}). {remedy}") from error
    return plans


def required_folder(variable: str) -> str:
    """The folder that one of nnU-Net's environment variables names.

    Raises:
        UserError: the variable is not set.
    """
    folder = os.environ.get(variable)
    if not folder:
        raise UserError(f"the environment variable {variable} is not set. Set it to nnU-Net's folder of that name.")
    return folder


def check_channels(case: str, files: list[str], ending: str, num_channels: int) -> None:
    """One file may hold all channels (4D images, RGB), which only its reader can tell; several must be all of them."""
    indices = [int(file.removesuffix(ending)[-4:]) for file in files]
    if indices != list(range(len(files))) or len(files) not in (1, num_channels):
        raise UserError(
            f"{os.path.dirname(files[0])}: case {case} has the channel files "
            f"{', '.join(os.path.basename(file) for file in files)}, but dataset.json names {num_channels} "
            f"channel(s), _0000 to _{num_channels - 1:04d}. Add the missing channels or remove the extra ones."
        )


def _and_more(items: Collection[str]) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""
