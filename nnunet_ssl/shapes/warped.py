"""Warped cases in nnU-Net's own prepared format, each made once, and again only when it has to be.

The folder is ``<nnUNet_preprocessed>/<dataset>/<data_identifier>_warped``, as ``unlabeled/store.py`` keeps it. A warp
is current if it was made from what its two images hold now. It belongs to its labeled case: a
fold trains only with the warps of its own training cases.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import write_json
from nnunet_ssl.shapes.case import stamps_of, warp_case
from nnunet_ssl.shapes.pairs import choose
from nnunet_ssl.shapes.quality import refuse_few
from nnunet_ssl.shapes.registration import VERSION
from nnunet_ssl.shapes.targets import find_targets, groups_of_dataset, of_patients, read_groups, test_images
from nnunet_ssl.unlabeled import store
from nnunet_ssl.unlabeled.case import Preparation
from nnunet_ssl.unlabeled.find import GROUPS
from nnunet_ssl.unlabeled.folds import trained_with
from nnunet_ssl.unlabeled.store import Manifest, Outcome, PreparedFolder, cannot_write

BUDGET = 10.0  # minutes that may be spent where no number of pairs is given
MOST_EACH = 30  # warps of a labeled case then
SPARE = 4 / 3  # pairs registered per pair kept: the least similar are left out
LESS_ALIKE = "are less alike than others"
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
    def tests(self) -> list[str]:
        """The test cases."""
        return list(test_images(self.dataset_name, self.dataset_json["file_ending"]))

    @property
    def groups_file(self) -> str:
        """Where the groups are kept that were given: apart from the manifest, lest they are lost with it."""
        return os.path.join(self.folder, GROUPS)

    @property
    def kept_groups(self) -> dict[str, str]:
        """That an earlier call was given."""
        return read_groups(self.groups_file) if os.path.exists(self.groups_file) else {}

    @cached_property
    def groupings(self) -> list[dict[str, str]]:
        """Case -> patient, as given and as the dataset's ``groups.json`` says now: of either each is obeyed."""
        return [self.kept_groups if self.groups is None else self.groups, groups_of_dataset(self.dataset_name)]

    def usable(self, entries: Mapping[str, dict]) -> list[str]:
        """Those that a fold may train with: of its own cases, onto images of nobody who validates or tests."""
        fixed = {entry["fixed"] for entry in entries.values()}
        left_out = of_patients(fixed, self.groupings, [*self.tests, *self.validation])
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
    "dropped", the pairs that were registered and not kept, and why; "channels", none for all.
    """

    FORMAT: ClassVar[int] = 2
    ABOUT: ClassVar[dict[str, type]] = {
        "preprocessing": dict,
        "labeled": dict,
        "asked": dict,
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
        for name, size, time_, digest in itertools.chain(*self.about["labeled"].values()):
            _ = os.fspath(name), int(size), int(time_), os.fspath(digest)

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
    contents = {case: _digest([digest for *_, digest in files]) for case, files in stamps.items()}
    return PreparedFolder(task.labeled_folder, dict.fromkeys(contents, task.labeled_folder), contents)


def _digest(what: list) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def prepare_warps(wish: Wish, num_processes: int, reading: bool = False) -> WarpedFolder:
    """Make or complete the folder of warped cases, and say what is made and what is left out.

    Args:
        wish: see there.
        num_processes: pairs registered at a time; 1 registers in this process.
        reading: this process will read what is returned: it stays as it is until the process ends.

    Returns:
        The warps of the wish's labeled cases.

    Raises:
        UserError: the images do not register, or the disk stands in the way. What was finished is kept.
    """
    known: Mapping[str, list] = {}
    while True:
        manifest = WarpManifest.read(wish.folder)
        state = _State(wish, manifest, known)
        known = state.stamps
        if not state.todo:
            refuse_where_few_register(wish, manifest)
            if not reading or manifest.keep():
                return manifest.of(wish)
            continue
        try:
            with manifest.locked(wait=True):
                state = _State(wish, WarpManifest.read(wish.folder), known)  # another process may have done it
                if state.todo:
                    state.manifest.remove_unread()
                    _complete(state, num_processes)
                state.manifest.remove_unread("warps")
        except OSError as error:
            raise UserError(cannot_write(wish.folder, error.strerror or str(error))) from error


def wait_until_warped(wish: Wish, timeout: float = 24 * 3600) -> WarpedFolder:
    """Wait until another process has warped, and keep the warps for reading: see ``store.wait_for``.

    Raises:
        UserError: not in time.
        SystemExit: too few warps are good; the rank that warps says so.
    """
    known: Mapping[str, list] = {}

    def look() -> WarpedFolder | None:
        nonlocal known
        manifest = WarpManifest.read(wish.folder)
        state = _State(wish, manifest, known)
        known = state.stamps  # or the labeled cases would be read at each look
        if state.todo:
            return None
        refuse_where_few_register(wish, manifest)
        return manifest.of(wish) if manifest.keep() else None

    return store.wait_for(
        look,
        timeout,
        f"{wish.folder} was not ready after {timeout:.0f} s. Make the warps first with nnUNetv2_ssl_warp "
        f"-d {wish.dataset_name} -c {wish.configuration}.",
    )


def refuse_where_few_register(wish: Wish, manifest: WarpManifest) -> None:
    """Refuse to train with few warps.

    Raises:
        UserError: most images do not register, or none may be warped onto.
    """
    remedy = "so warping cannot help here. Train without it: nnUNetTrainerLabeledOnly, or any trainer with "
    remedy += "'warped_share' at 0."
    dropped = [manifest.about["dropped"][name]["why"] for name in wish.usable(manifest.about["dropped"])]
    bad = Counter(why for why in dropped if why != LESS_ALIKE)
    usable = len(manifest.of(wish).cases)
    if not usable and not bad:
        what = "other labeled" if wish.onto_each_other else "unlabeled"
        raise UserError(
            f"{wish.folder}: no {what} image may be warped onto, since there is none, or all are test images or of "
            f"test or validation patients, {remedy}"
        )
    refuse_few(wish.folder, usable and usable + dropped.count(LESS_ALIKE), bad, remedy)


class _State:
    """What a wish finds in a manifest.

    Attributes:
        stamps: case -> stamps of its prepared files, of the cases to warp and of those that have been warped.
        current, dropped: entries of the manifest that say what is true now.
        asked: labeled case -> warps that there were to be, as far as they would be made in the same way now.
        todo: labeled case -> warps to make sure of; 0 for as many as of others, or as time allows.
        done: labeled case -> warps, of those that want nothing.
    """

    def __init__(self, wish: Wish, manifest: WarpManifest, known: Mapping[str, list]) -> None:
        self.wish, self.manifest = wish, manifest
        about = manifest.about
        kept = {**known, **about["labeled"]}
        moving = {entry["moving"] for entry in manifest.cases.values()}
        self.stamps = {
            case: stamps_of(wish, case, kept.get(case, ()), needed=case in wish.labeled)
            for case in sorted(moving | set(wish.labeled))
        }
        other = (
            about["preprocessing"] != wish.preprocessing
            or (wish.groups is not None and wish.groups != wish.kept_groups)
            or (wish.channels is not None and about["channels"] != list(wish.channels))
        )
        self.current = {} if other else self._current(manifest.cases)
        self.dropped = {} if other else self._current(about["dropped"])
        self.current = {name: entry for name, entry in self.current.items() if manifest.files_are_there(name)}
        lost = {entry["moving"] for name, entry in manifest.cases.items() if name not in self.current}
        self.asked = {} if other else about["asked"]
        self.todo = {
            case: max(wish.each or 0, self.asked.get(case, 0))
            for case in wish.labeled
            if case in lost or self.asked.get(case, 0) < (wish.each or 1)
        }
        # another fold's case that has lost a warp is that fold's to complete
        self.done = {case: each for case, each in self.asked.items() if case not in lost and case not in self.todo}

    def made_from(self, moving: str, fixed: str) -> str | None:
        """A digest of what a pair holds now; None where one of the two is not there."""
        if not self.stamps.get(moving) or fixed not in self.wish.onto.contents:
            return None
        return _digest([VERSION, [digest for *_, digest in self.stamps[moving]], self.wish.onto.contents[fixed]])

    def _current(self, entries: Mapping[str, dict]) -> dict[str, dict]:
        return {
            name: entry
            for name, entry in entries.items()
            if entry["made_from"] == self.made_from(entry["moving"], entry["fixed"])
        }


def _complete(state: _State, num_processes: int) -> None:
    """Strike off what is not current, and make what is missing; the state's manifest is a new one then."""
    wish, todo, old = state.wish, state.todo, state.manifest.about
    each = max(todo.values()) or max(state.asked.values(), default=0)
    for name, entry in list(state.dropped.items()):
        if entry["why"] == LESS_ALIKE and each > state.asked.get(entry["moving"], each):
            del state.dropped[name]  # it may be among the most alike of a larger number
    about: dict[str, Any] = {
        "preprocessing": wish.preprocessing,
        "labeled": state.stamps,
        "asked": state.done,
        "dropped": state.dropped,
        "channels": old["channels"] if wish.channels is None else list(wish.channels),
    }
    manifest = state.manifest = WarpManifest(wish.folder, about, state.current)
    if wish.groups is not None:
        write_json(wish.groups_file, wish.groups)
    manifest.write()  # first: a file may be put back as it was before we are done

    ending = wish.dataset_json["file_ending"]
    targets = find_targets(wish.dataset_name, ending, wish.onto, wish.groupings)
    if wish.onto_each_other and (trained := trained_with(os.path.dirname(wish.labeled_folder))):
        targets = [case for case in targets if case in trained or case in wish.labeled]  # others are used by no fold
    each = each or _affordable(wish, about["channels"], targets, num_processes)
    there = [(entry["moving"], entry["fixed"]) for entry in [*manifest.cases.values(), *state.dropped.values()]]
    given, of_dataset = wish.groupings
    pairs = choose(list(todo), targets, round(SPARE * each), {**of_dataset, **given}, there)
    if pairs:
        print(
            f"nnunet_ssl: registering {len(pairs)} pairs of {len(todo)} labeled images and {len(targets)} to warp them "
            f"onto; the {each} most similar per labeled image are kept in {wish.folder}",
            flush=True,
        )

        def keep(outcome: Outcome) -> str | None:
            if outcome.problem:
                about["dropped"][outcome.case] = {**outcome.entry, "why": outcome.problem}
            return outcome.problem

        task = Preparation(wish.dataset_name, wish.plans, wish.configuration, wish.dataset_json)
        jobs = {}
        for moving, fixed in pairs:
            place, made_from = wish.onto.places[fixed], state.made_from(moving, fixed)
            jobs[_name(moving, fixed)] = (task, about["channels"], moving, fixed, place, made_from)
        manifest.make(
            warp_case,
            jobs,
            num_processes,
            "Warping labeled images",
            "Warp with fewer at a time (nnUNetv2_ssl_warp -np 1); finished warps are kept.",
            keep,
        )
    for case in todo:
        _leave_out_the_least_alike(manifest, case, each)
    about["asked"] |= dict.fromkeys(todo, each)
    manifest.write()
    dropped = Counter(entry["why"] for entry in about["dropped"].values())
    told = "".join(f"; {count} {why}" for why, count in dropped.most_common())
    print(f"nnunet_ssl: {len(manifest.cases)} pairs are kept{told}.", flush=True)


def _affordable(wish: Wish, channels: list[int], targets: list[str], num_processes: int) -> int:
    """How many warps of each labeled case fit into ``BUDGET``, by the time that one takes here."""
    moving = wish.labeled[0]
    others = [case for case in targets if case != moving]
    if not others:
        return 1
    fixed = others[0]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = os.path.join(folder, "trial")
        warp_case(wish, channels, moving, fixed, wish.onto.places[fixed], "", place)
    seconds = time.monotonic() - start
    of_one = SPARE * len(wish.labeled) * seconds / 60 / num_processes  # minutes, of a warp of each case
    each = max(1, min(MOST_EACH, len(targets), int(BUDGET / of_one)))
    print(
        f"nnunet_ssl: a pair takes about {seconds:.1f} s; {each} warps of each of {len(wish.labeled)} labeled cases "
        f"take about {each * of_one:.1f} min with {num_processes} processes (nnUNetv2_ssl_warp --pairs N for another "
        "number).",
        flush=True,
    )
    return each


def _leave_out_the_least_alike(manifest: WarpManifest, moving: str, each: int) -> None:
    mine = [name for name, entry in manifest.cases.items() if entry["moving"] == moving]
    mine.sort(key=lambda name: manifest.cases[name]["after"])
    for name in mine[: max(0, len(mine) - each)]:
        entry = manifest.cases.pop(name)
        told = {key: value for key, value in entry.items() if key not in ("part", "files")}
        manifest.about["dropped"][name] = {**told, "why": LESS_ALIKE}


def _name(moving: str, fixed: str) -> str:
    """Of a warp's files; short enough for a file system."""
    name = f"{moving}__{fixed}"
    plain = len(os.fsencode(name)) <= 100 and name.split("__") == [moving, fixed]  # no other pair has this name
    return name if plain else _digest([moving, fixed])
