"""What a fold wants warped, and the folder of warped cases: which of them it may train with.

The folder is ``<nnUNet_preprocessed>/<dataset>/<data_identifier>_warped``, as ``unlabeled/store.py`` keeps it. A warp
belongs to its labeled case: a fold trains only with the warps of its own training cases.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from nnunet_ssl.shapes.case import stamps_of
from nnunet_ssl.shapes.targets import copies_of_tests, of_patients, test_images
from nnunet_ssl.unlabeled.case import Preparation
from nnunet_ssl.unlabeled.find import GROUPS
from nnunet_ssl.unlabeled.folds import trained_with
from nnunet_ssl.unlabeled.groups import groups_of_dataset, joined, kept_groups_files, read_groups
from nnunet_ssl.unlabeled.store import Manifest, PreparedFolder

WARPED, WARPED_ONTO_LABELED = "_warped", "_warped_onto_labeled"  # after the name of the labeled cases' folder


@dataclass(frozen=True)
class Wish(Preparation):
    """What to warp, and onto what.

    Attributes:
        labeled: cases to warp: of a fold, its training cases.
        validation: of a fold, the cases that it is validated with.
        onto: the images to warp onto: the prepared unlabeled ones, or the labeled cases themselves
            (``labeled_images``), where a fold trains with those between two of its own training cases.
        each: warps of each labeled case; None for what there is, or as many as ``BUDGET`` allows.
        groups: case -> patient; None for what an earlier call was given. What the dataset's ``groups.json`` says counts
            besides.
        channels: that registration compares, () for all of them; None for the channels of an earlier call, or all.
    """

    labeled: tuple[str, ...]
    validation: tuple[str, ...]
    onto: PreparedFolder
    each: int | None = None
    groups: dict[str, str] | None = None
    channels: tuple[int, ...] | None = None

    @property
    def onto_each_other(self) -> bool:
        """Whether labeled images are warped onto labeled ones."""
        return self.onto.folder == self.labeled_folder

    @property
    def folder(self) -> str:
        """Of the warps."""
        return self.labeled_folder + (WARPED_ONTO_LABELED if self.onto_each_other else WARPED)

    @cached_property
    def candidates(self) -> list[str]:
        """The images that some fold could warp onto, were none of them a test image."""
        if not self.onto_each_other:
            return self.onto.cases
        trained = trained_with(os.path.dirname(self.labeled_folder))
        return [case for case in self.onto.cases if not trained or case in trained or case in self.labeled]

    @cached_property
    def of_tests(self) -> set[str]:
        """Images that no fold may warp onto: test images, also under another name, and others of test patients."""
        tests = test_images(self.dataset_name, self.dataset_json["file_ending"])
        return of_patients(self.onto.cases, self.groupings, tests) | copies_of_tests(self.onto, tests)

    @property
    def groups_file(self) -> str:
        """Where the groups are kept that were given: beside the warps, which may be removed."""
        return f"{self.folder}_{GROUPS}"

    @property
    def kept_groups(self) -> dict[str, str]:
        """Those that an earlier call was given."""
        return read_groups(self.groups_file) if os.path.exists(self.groups_file) else {}

    @cached_property
    def groupings(self) -> list[dict[str, str]]:
        """Case -> patient, as given here and for other configurations, and by ``groups.json``: each is obeyed.

        So is what they say together: two cases may be of one patient by way of a third.
        """
        here = self.kept_groups if self.groups is None else self.groups
        others = [read_groups(file) for file in kept_groups_files(self.dataset_name) if file != self.groups_file]
        each = [here, *others, groups_of_dataset(self.dataset_name)]
        return [*each, joined(each)]

    def usable(self, entries: Mapping[str, dict]) -> list[str]:
        """Those that a fold may train with: of its own cases, onto images of nobody who validates or tests."""
        fixed = {entry["fixed"] for entry in entries.values()}
        left_out = self.of_tests | of_patients(fixed, self.groupings, self.validation)
        if self.onto_each_other:
            left_out |= fixed - set(self.labeled)
        return [
            name
            for name, entry in entries.items()
            if entry["moving"] in self.labeled and entry["fixed"] not in left_out
        ]


@dataclass(frozen=True)
class WarpedFolder(PreparedFolder):
    """Where warps are, and the labeled case that each was made from."""

    moving: dict[str, str]


class WarpManifest(Manifest):
    """The warps; an entry has "moving" and "fixed", the two cases, "made_from", a digest of both, and its quality.

    Of all it says "preprocessing"; "labeled", stamps of the prepared labeled cases; "asked", how many warps of each;
    "considered", the images that those of each were chosen from, if they were too few; "dropped", the pairs that were
    registered and not kept, and why; "channels", none for all.
    """

    FORMAT: ClassVar[int] = 3
    ABOUT: ClassVar[dict[str, type]] = {
        "preprocessing": dict,
        "labeled": dict,
        "asked": dict,
        "considered": dict,
        "dropped": dict,
        "channels": list,
    }

    def check(self) -> None:
        """All say what is read of them."""
        dropped = self.about["dropped"].values()
        for entry in [*self.cases.values(), *dropped]:
            _ = os.fspath(entry["moving"]), os.fspath(entry["fixed"]), os.fspath(entry["made_from"])
        for entry in self.cases.values():
            _ = float(entry["before"]), float(entry["after"])
        for entry in dropped:
            _ = os.fspath(entry["why"])
        for number in [*self.about["asked"].values(), *self.about["channels"]]:
            _ = int(number)
        for name in itertools.chain(*self.about["considered"].values()):
            _ = os.fspath(name)
        for name, size, time_, content in itertools.chain(*self.about["labeled"].values()):
            _ = os.fspath(name), int(size), int(time_), os.fspath(content)

    def content_of(self, case: str) -> str:
        """Of both images."""
        return self.cases[case]["made_from"]

    def of(self, wish: Wish) -> WarpedFolder:
        """The warps that a fold may train with."""
        moving = {case: self.cases[case]["moving"] for case in sorted(wish.usable(self.cases))}
        places, contents = ({case: get(case) for case in moving} for get in (self.place, self.content_of))
        return WarpedFolder(self.folder, places, contents, moving)


def labeled_images(task: Preparation, cases: Iterable[str]) -> PreparedFolder:
    """The prepared labeled cases as images to warp onto.

    Raises:
        UserError: one is not prepared, or cannot be read.
    """
    known = WarpManifest.read(task.labeled_folder + WARPED_ONTO_LABELED).about["labeled"]  # or all are read each time
    stamps = {case: stamps_of(task, case, known.get(case, ())) for case in sorted(cases)}
    contents = {case: digest([content for *_, content in files]) for case, files in stamps.items()}
    return PreparedFolder(task.labeled_folder, dict.fromkeys(contents, task.labeled_folder), contents)


def digest(what: list) -> str:
    """Of what JSON can say."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
