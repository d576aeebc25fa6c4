"""Whether an image is the one that something was made from: by content, since copies have other times."""

from __future__ import annotations

import contextlib
import os

from tqdm import tqdm

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import same_content, stamp
from nnunet_ssl.names import path_component
from nnunet_ssl.unlabeled.find import is_labeled, refuse_labeled_images, with_spacing

Stamps = dict[str, list[list]]  # case -> [file name, size in bytes, mtime in ns, SHA-256] of each raw file


def image_stamps(images: dict[str, list[str]], kept: Stamps | None = None) -> Stamps:
    """What tells that a raw image has changed; with it the file that nnU-Net's TIFF reader takes the spacing from.

    Compare two of them with ``same_images``: the times of copies tell nothing. Of ``kept``, what this said earlier of
    some or all of the cases, only files whose size or time is another are read.

    Raises:
        UserError: a file is not there or cannot be read.
    """
    stamps: Stamps = {}
    for case, files in tqdm(images.items(), "Comparing images", disable=len(images) < 2, delay=3, leave=False):
        earlier = {name: entry for name, *entry in (kept or {}).get(case, ())}
        stamps[case] = []
        for file in with_spacing(case, files):
            name = os.path.basename(file)
            try:
                stamps[case].append([name, *stamp(file, earlier.get(name))])
            except OSError as error:
                raise UserError(
                    f"{file} cannot be read ({error.strerror or error}). Make it readable, or remove it."
                ) from error
    return stamps


def of_same_size(images: dict[str, list[str]], others: dict[str, list[str]]) -> dict[str, list[str]]:
    """Those of the images whose channel files have the sizes of one of the others, and so could be its copy."""
    known = set(map(_sizes, others.values())) - {None}
    return {case: files for case, files in images.items() if _sizes(files) in known}


def by_content(stamps: Stamps, images: dict[str, list[str]]) -> dict[tuple[str, ...], str]:
    """What an image holds -> its case."""
    return {content(of_case, images[case]): case for case, of_case in stamps.items()}


def _sizes(files: list[str]) -> tuple[int, ...] | None:
    """Of each channel file; None if one is not there."""
    with contextlib.suppress(OSError):
        return tuple(map(os.path.getsize, files))
    return None


def content(stamps: list[list], files: list[str]) -> tuple[str, ...]:
    """What the channel files hold; the file that a spacing is taken from comes after them."""
    return tuple(digest for *_, digest in stamps[: len(files)])


def refuse_copies(unlabeled: dict[str, list[str]], labeled: dict[str, list[str]]) -> None:
    """Refuse an unlabeled image that is a labeled one under another name: a link to it, or a copy.

    Those are read that have the size of one of the other kind.

    Raises:
        UserError: names the first such file and the labeled case.
    """
    refuse_labeled_images(unlabeled, labeled)
    twins = by_content(image_stamps(of_same_size(labeled, unlabeled)), labeled)
    for case, stamps in image_stamps(of_same_size(unlabeled, labeled)).items():
        if twin := twins.get(content(stamps, unlabeled[case])):
            raise UserError(is_labeled(unlabeled[case][0], twin))


def kept_stamps(content: dict, source: str) -> Stamps:
    """What :func:`image_stamps` gave, from a record that somebody else may have written.

    Raises:
        UserError, LookupError, TypeError, ValueError, AttributeError: it is of another shape, or a case's name cannot
            be a file's.
    """
    return {
        path_component(case, "case", source): [
            [path_component(name, "file", source), int(size), int(time_), str(digest)]
            for name, size, time_, digest in files
        ]
        for case, files in content.items()
    }


def same_images(one: list[list], other: list[list]) -> bool:
    """Whether the stamps of a case at two times are of the same content under the same names."""
    return [entry[0] for entry in one] == [entry[0] for entry in other] and all(
        same_content(now[1:], then[1:]) for now, then in zip(one, other, strict=True)
    )
