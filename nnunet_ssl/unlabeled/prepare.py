"""Unlabeled images through nnU-Net's own preprocessing, each once, and again only when it has to be.

The prepared folder is ``<nnUNet_preprocessed>/<dataset>/<data_identifier>_unlabeled``, as ``store.py`` keeps it. A case
is current if its manifest's entry says what is true now: the raw files that it was made from, and what in the plans it
was made with.

Where nnU-Net writes ``<case>_seg``, an image without a label gets nnU-Net's nonzero mask: 0 inside, -1 outside. It is
kept, since nnU-Net's augmentation masks with it where the plans normalize within the mask.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.errors import UserError
from nnunet_ssl.names import a_few
from nnunet_ssl.unlabeled import store
from nnunet_ssl.unlabeled.case import Preparation, prepare_case
from nnunet_ssl.unlabeled.find import (
    UNLABELED_FOLDER,
    find_labeled,
    find_unlabeled,
    is_labeled,
    refuse_labeled_images,
    refuse_labeled_names,
)
from nnunet_ssl.unlabeled.stamps import Stamps, by_content, content, image_stamps, of_same_size, same_images
from nnunet_ssl.unlabeled.store import Manifest, PreparedFolder, cannot_write


def prepare_unlabeled(
    dataset_name: str,
    plans_manager: PlansManager,
    configuration: str,
    dataset_json: dict,
    labeled_cases: Collection[str],
    num_processes: int,
    reading: bool = False,
) -> PreparedFolder:
    """Make or complete the folder of prepared unlabeled images, and say what is made again and why.

    Where the raw dataset or its ``imagesUn`` is absent, as on a cluster that has the preprocessed data alone, a folder
    that was prepared with the same plans is taken as it is. A folder that is complete need not be writable.

    Args:
        dataset_name, plans_manager, configuration, dataset_json: as nnU-Net has them.
        labeled_cases: labeled and validation cases; no unlabeled image may bear one of these names.
        num_processes: images prepared at a time, where there is enough to do; 1 prepares in this process.
        reading: this process will read what is returned: it stays as it is until the process ends.

    Raises:
        UserError: an image, the plans or the disk stands in the way. What was finished is kept.
    """
    task = Preparation(dataset_name, plans_manager.plans, configuration, dataset_json)
    folder = f"{task.labeled_folder}_unlabeled"
    wanted = _wanted(task, labeled_cases, folder)
    if wanted is None:
        prepared = _take_as_it_is(task, labeled_cases, folder, reading)
        raw = os.path.join(nnUNet_raw.get() or "nnUNet_raw", dataset_name, UNLABELED_FOLDER)
        print(f"nnunet_ssl: {raw} is not there; {folder} is complete and used as it is.", flush=True)
        return prepared
    looked_after = False
    while True:
        manifest = UnlabeledManifest.read(folder)
        difference = wanted.difference(manifest)
        if difference or (not looked_after and (wanted.has_news_for(manifest) or manifest.unlisted())):
            try:
                with manifest.locked(wait=bool(difference)):
                    manifest = UnlabeledManifest.read(folder)  # again: another process may have done it meanwhile
                    difference = wanted.difference(manifest)
                    if difference:
                        _announce(difference, folder, len(wanted.images))
                        manifest.remove_unread()  # what a killed run has left may be in the way on a full disk
                        manifest = _complete(manifest, difference, wanted, task, num_processes)
                    elif wanted.has_news_for(manifest):
                        wanted.tell(manifest)
                        manifest.write()
                    manifest.remove_unread("prepared images")
                    if reading:
                        manifest.keep()
                    return manifest.prepared()
            except OSError as error:
                if difference:
                    raise UserError(cannot_write(folder, error.strerror or str(error))) from error
            except UserError:
                if difference:
                    raise
            looked_after = True  # a folder that is read-only, or that another process is working on, will do as well
        if not reading or manifest.keep():
            return manifest.prepared()


def wait_until_prepared(
    dataset_name: str,
    plans_manager: PlansManager,
    configuration: str,
    dataset_json: dict,
    labeled_cases: Collection[str],
    timeout: float = 24 * 3600,
) -> PreparedFolder:
    """Wait until another process has prepared the unlabeled images, and keep them for reading: see ``store.wait_for``.

    The arguments are those of ``prepare_unlabeled``, and the seconds after which to give up.

    Raises:
        UserError: not prepared in time, or the images cannot be prepared.
    """
    task = Preparation(dataset_name, plans_manager.plans, configuration, dataset_json)
    folder = f"{task.labeled_folder}_unlabeled"
    # once, as the rank that prepares: an image that comes while it does is not waited for
    wanted = functools.cache(lambda: _wanted(task, labeled_cases, folder))

    def look() -> PreparedFolder | None:
        if (now := wanted()) is None:
            return _take_as_it_is(task, labeled_cases, folder, reading=True)
        manifest = UnlabeledManifest.read(folder)
        return manifest.prepared() if not now.difference(manifest) and manifest.keep() else None

    return store.wait_for(
        look,
        timeout,
        f"{folder} was not ready after {timeout:.0f} s. Prepare the images first with "
        f"nnUNetv2_ssl_preprocess -d {dataset_name} -c {configuration}.",
    )


class UnlabeledManifest(Manifest):
    """The finished unlabeled images; an entry has "raw", stamps of a case's raw files.

    Of all cases it says "preprocessing", what determined them (see ``Preparation``), "labeled", stamps of the labeled
    images that an unlabeled one could be a copy of, and "wanted", the names of all that are to be there.
    """

    FORMAT: ClassVar[int] = 2
    ABOUT: ClassVar[dict[str, type]] = {"preprocessing": dict, "labeled": dict, "wanted": list}

    def check(self) -> None:
        """All stamps have their four parts."""
        _ = {*map(os.fspath, self.about["wanted"])}
        stamps = [*self.about["labeled"].values(), *(entry["raw"] for entry in self.cases.values())]
        for name, size, time_, digest in itertools.chain(*stamps):
            _ = os.fspath(name), int(size), int(time_), os.fspath(digest)

    def content_of(self, case: str) -> str:
        """Of what the raw files hold."""
        return hashlib.sha256("".join(entry[3] for entry in self.cases[case]["raw"]).encode()).hexdigest()

    def missing(self) -> list[str]:
        """The cases that were wanted and are not there, or not whole; sorted."""
        return sorted(case for case in {*self.about["wanted"], *self.cases}
                      if case not in self.cases or not self.files_are_there(case))  # fmt: skip

    def is_complete(self, preprocessing: dict) -> bool:
        """Whether all that was wanted is there and was made with this preprocessing."""
        return bool(self.cases) and self.about["preprocessing"] == preprocessing and not self.missing()


@dataclass
class _Wanted:
    """What is to be prepared, and what is known of it."""

    # images, labeled: case -> channel files, of the unlabeled and of the labeled images
    images: dict[str, list[str]]
    labeled: dict[str, list[str]]
    preprocessing: dict  # see Preparation
    # of those images that were prepared at some time. Of the others it takes reading them
    stamps: Stamps = field(default_factory=dict)
    # of the labeled images that have the sizes of an unlabeled one, and so could be the same
    labeled_stamps: Stamps = field(default_factory=dict)
    twins: dict[tuple[str, ...], str] = field(default_factory=dict)  # what one of them holds -> its case

    def difference(self, manifest: UnlabeledManifest) -> dict[str, list[str]]:
        """What has to be done, by reason: reason -> cases; empty if the folder is current.

        Raises:
            UserError: an image that was prepared is the copy of a labeled one.
        """
        could_be_copies = of_same_size(self.labeled, self.images)
        self.labeled_stamps = image_stamps(could_be_copies, {**manifest.about["labeled"], **self.labeled_stamps})
        self.twins = by_content(self.labeled_stamps, self.labeled)
        known = {case: files for case, files in self.images.items() if case in manifest.cases}
        self.stamps = image_stamps(known, {case: self.stamps.get(case, manifest.cases[case]["raw"]) for case in known})
        for case, raw in self.stamps.items():
            if copied := self.copied_from(case, raw):
                raise UserError(copied)

        reasons: dict[str, list[str]] = {}
        changed = [
            key for key, value in self.preprocessing.items() if manifest.about["preprocessing"].get(key) != value
        ]
        for case in self.images:
            if case not in known:
                reason = "not yet prepared"
            elif changed:
                reason = f"plans changed: {', '.join(changed)}"
            elif not same_images(self.stamps[case], manifest.cases[case]["raw"]):
                reason = "image changed"
            elif not manifest.files_are_there(case):
                reason = "prepared files missing or damaged"
            else:
                continue
            reasons.setdefault(reason, []).append(case)
        if gone := sorted(set(manifest.cases) - set(self.images)):
            reasons[GONE] = gone
        return reasons

    def copied_from(self, case: str, raw: list[list]) -> str | None:
        """What to say of an image whose channel files equal a labeled image's; None for others."""
        twin = self.twins.get(content(raw, self.images[case]))
        return None if twin is None else is_labeled(self.images[case][0], twin)

    def has_news_for(self, manifest: UnlabeledManifest) -> bool:
        """Whether files have other times than the manifest says, as copies have, or a bad image was taken away."""
        return self.about() != manifest.about or any(
            manifest.cases[case]["raw"] != raw for case, raw in self.stamps.items()
        )

    def about(self) -> dict[str, Any]:
        """What the manifest says of all cases."""
        return {"preprocessing": self.preprocessing, "labeled": self.labeled_stamps, "wanted": sorted(self.images)}

    def tell(self, manifest: UnlabeledManifest) -> None:
        """Bring the manifest of a folder that is current up to date, so that nothing is read at the next start."""
        manifest.about = self.about()
        for case, raw in self.stamps.items():
            manifest.cases[case]["raw"] = raw


GONE = f"no longer in {UNLABELED_FOLDER}"


def _wanted(task: Preparation, labeled_cases: Collection[str], folder: str) -> _Wanted | None:
    """The images to prepare, or None where they are not on this machine and the prepared folder has to do."""
    raw = os.path.join(nnUNet_raw.get() or os.devnull, task.dataset_name)
    if not os.path.isdir(raw):
        return None
    if not os.path.isdir(os.path.join(raw, UNLABELED_FOLDER)) and UnlabeledManifest.read(folder).is_complete(
        task.preprocessing
    ):
        return None
    images, labeled = find_unlabeled(raw, task.dataset_json), find_labeled(raw, task.dataset_json)
    refuse_labeled_names(images, labeled_cases)
    refuse_labeled_images(images, labeled)
    return _Wanted(images, labeled, task.preprocessing)


def _take_as_it_is(task: Preparation, labeled_cases: Collection[str], folder: str, reading: bool) -> PreparedFolder:
    while True:
        manifest = UnlabeledManifest.read(folder)
        same = manifest.about["preprocessing"] == task.preprocessing
        if same and (missing := manifest.missing()):
            raise UserError(
                f"{folder} lacks {len(missing)} of the unlabeled images ({a_few(missing)}), and the raw dataset "
                f"{task.dataset_name} is not in nnUNet_raw={nnUNet_raw.get()}. Prepare them where it is, or copy the "
                "folder again."
            )
        if not same or not manifest.cases:
            raise UserError(
                f"the raw dataset {task.dataset_name} is not in nnUNet_raw={nnUNet_raw.get()}, and {folder} does "
                "not hold its unlabeled images prepared with these plans. Provide one of them."
            )
        refuse_labeled_names({case: [manifest.place(case)] for case in sorted(manifest.cases)}, labeled_cases)
        if not reading or manifest.keep():
            return manifest.prepared()


def _announce(difference: dict[str, list[str]], folder: str, num_images: int) -> None:
    todo = sum(map(len, difference.values())) - len(difference.get(GONE, []))
    reasons = "; ".join(f"{len(cases)} {reason} ({a_few(cases)})" for reason, cases in difference.items())
    print(f"nnunet_ssl: preparing {todo} of {num_images} unlabeled images in {folder}: {reasons}", flush=True)


def _complete(
    manifest: UnlabeledManifest,
    difference: dict[str, list[str]],
    wanted: _Wanted,
    task: Preparation,
    num_processes: int,
) -> UnlabeledManifest:
    """Strike off what is not current, and make what is missing; returns the new manifest."""
    todo = set(itertools.chain(*difference.values())) & set(wanted.images)
    current = {case: {**manifest.cases[case], "raw": wanted.stamps[case]} for case in wanted.images if case not in todo}
    manifest = UnlabeledManifest(manifest.folder, wanted.about(), current)
    manifest.write()  # first: a raw file may be put back as it was before we are done
    if not todo:
        return manifest
    problems = manifest.make(
        prepare_case,
        {case: (task, case, wanted.images[case]) for case in sorted(todo)},
        num_processes,
        "Preparing unlabeled images",
        "Prepare fewer at a time (nnUNetv2_ssl_preprocess -np 1); finished images are kept.",
        lambda outcome: outcome.problem or wanted.copied_from(outcome.case, outcome.entry["raw"]),
    )
    if problems:
        more = f" {len(problems) - 1} other image(s) cannot be used either." if len(problems) > 1 else ""
        raise UserError(sorted(problems)[0] + more)
    return manifest
