"""Warped cases in nnU-Net's own prepared format, each made once, and again only when it has to be.

A warp is current if it was made from what its two images hold now. ``wish.py`` says which a fold trains with.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import ChainMap, Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_raw

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import write_json
from nnunet_ssl.names import a_few
from nnunet_ssl.pools import usable_cores
from nnunet_ssl.shapes.case import stamps_of, warp_case
from nnunet_ssl.shapes.pairs import choose
from nnunet_ssl.shapes.quality import refuse_few
from nnunet_ssl.shapes.registration import VERSION
from nnunet_ssl.shapes.targets import far_apart_first
from nnunet_ssl.shapes.wish import WarpedFolder, WarpManifest, Wish, digest
from nnunet_ssl.unlabeled import store
from nnunet_ssl.unlabeled.case import Preparation
from nnunet_ssl.unlabeled.store import Outcome, cannot_write

BUDGET = 10.0  # minutes that may be spent where no number of pairs is given
LEAST_EACH, MOST_EACH = 5, 30  # warps of a labeled case then, as far as there are images; the least takes longer
SPARE = 4 / 3  # pairs registered per pair kept: the least similar are left out
LESS_ALIKE = "are less alike than others"


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
                wish = replace(wish)  # without what it has read: another process may have been given groups
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
        UserError: not in time, or too few warps are good.
    """
    known: Mapping[str, list] = {}

    def look() -> WarpedFolder | None:
        nonlocal known
        manifest = WarpManifest.read(wish.folder)
        state = _State(wish, manifest, known)
        known = state.stamps  # or the labeled cases would be read at each look
        if state.todo:
            return None
        now = replace(wish)  # the other process may have been given groups
        refuse_where_few_register(now, manifest)
        return manifest.of(now) if manifest.keep() else None

    return store.wait_for(
        look,
        timeout,
        f"{wish.folder} was not ready after {timeout:.0f} s. Make the warps first with nnUNetv2_ssl_warp "
        f"-d {wish.dataset_name} -c {wish.configuration} -p {wish.plans_name}"
        f"{' --onto labeled' if wish.onto_each_other else ''}.",
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
        stamps: case -> stamps of its prepared files, of the cases to warp and of those that have been registered.
        current, dropped: entries of the manifest that say what is true now.
        asked: labeled case -> warps that there were to be, as far as they would be made in the same way now.
        todo: labeled case -> warps to make sure of; 0 for as many as of others, or as time allows.
        done: labeled case -> warps, of those that want nothing.
    """

    def __init__(self, wish: Wish, manifest: WarpManifest, known: Mapping[str, list]) -> None:
        self.wish, self.manifest = wish, manifest
        about = manifest.about
        kept = {**known, **about["labeled"]}
        entries = {**about["dropped"], **manifest.cases}
        moving = {entry["moving"] for entry in entries.values()}
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
        there = {**self.current, **self.dropped}
        lost = {entry["moving"] for name, entry in entries.items() if name not in there}
        tried = Counter(entry["moving"] for entry in there.values())
        self.asked = {} if other else about["asked"]

        def could_have_more(case: str) -> bool:
            """Whether there were too few images, and some have come since."""
            if tried[case] >= round(SPARE * self.asked[case]):
                return False
            return not set(wish.candidates) <= wish.of_tests.union(about["considered"].get(case, ()))

        self.todo = {
            case: max(wish.each or 0, self.asked.get(case, 0))
            for case in wish.labeled
            if case in lost or self.asked.get(case, 0) < (wish.each or 1) or could_have_more(case)
        }
        # another fold's case that has lost a warp is that fold's to complete
        self.done = {case: each for case, each in self.asked.items() if case not in lost and case not in self.todo}

    def made_from(self, moving: str, fixed: str) -> str | None:
        """A digest of what a pair holds now; None where one of the two is not there."""
        if not self.stamps.get(moving) or fixed not in self.wish.onto.contents:
            return None
        return digest([VERSION, [content for *_, content in self.stamps[moving]], self.wish.onto.contents[fixed]])

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
    kept = Counter(entry["moving"] for entry in state.current.values())
    for name, entry in list(state.dropped.items()):
        case = entry["moving"]
        if case in todo and entry["why"] == LESS_ALIKE and (each > state.asked.get(case, each) or kept[case] < each):
            del state.dropped[name]  # it may be among the most alike of a larger number, or in the place of a lost one
    about: dict[str, Any] = {
        "preprocessing": wish.preprocessing,
        "labeled": state.stamps,
        "asked": state.done,
        "considered": {case: old["considered"].get(case, []) for case in state.done},
        "dropped": state.dropped,
        "channels": old["channels"] if wish.channels is None else list(wish.channels),
    }
    manifest = state.manifest = WarpManifest(wish.folder, about, state.current)
    if wish.groups is not None:
        write_json(wish.groups_file, wish.groups)
    manifest.write()  # first: a file may be put back as it was before we are done

    raw = os.path.join(nnUNet_raw.get() or "nnUNet_raw", wish.dataset_name)
    if not (wish.onto_each_other or os.path.isdir(raw)):
        print(f"nnunet_ssl: {raw} is not there, so test images may be among those warped onto.", flush=True)
    if wish.of_tests:
        print(
            f"nnunet_ssl: {len(wish.of_tests)} images are not warped onto, because they are test images or "
            f"show test patients ({a_few(sorted(wish.of_tests))}).",
            flush=True,
        )
    targets = far_apart_first(wish.onto, set(wish.candidates) - wish.of_tests)
    each = each or _affordable(wish, about["channels"], targets, num_processes)
    there = [(entry["moving"], entry["fixed"]) for entry in [*manifest.cases.values(), *state.dropped.values()]]
    pairs = choose(list(todo), targets, round(SPARE * each), ChainMap(*wish.groupings), there)
    if pairs:
        print(
            f"nnunet_ssl: registering {len(pairs)} pairs of {len(todo)} labeled images and {len(targets)} to warp them "
            f"onto; the {min(each, len(targets))} most similar per labeled image are kept in {wish.folder}",
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
    about["considered"] |= dict.fromkeys(todo, wish.candidates if len(targets) <= round(SPARE * each) else [])
    manifest.write()
    dropped = Counter(entry["why"] for entry in about["dropped"].values())
    told = "".join(f"; {count} {why}" for why, count in dropped.most_common())
    print(f"nnunet_ssl: {len(manifest.cases)} pairs are kept{told}.", flush=True)


def _affordable(wish: Wish, channels: list[int], targets: list[str], num_processes: int) -> int:
    """How many warps of each labeled case fit into ``BUDGET``, by the time that one takes here."""
    moving = wish.labeled[0]
    others = [case for case in targets if case != moving]
    if not others:
        return MOST_EACH  # of images that may come
    print("nnunet_ssl: registering one pair, to see how long it takes", flush=True)
    for fixed in others[:3]:  # until one is good, for only that is written too
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            place = os.path.join(folder, "trial")
            outcome = warp_case(wish, channels, moving, fixed, wish.onto.places[fixed], "", place)
            written = sum(file.stat().st_size for file in Path(place).glob("*"))
        seconds = time.monotonic() - start
        if outcome.fatal:
            raise UserError(str(outcome.problem))
        if not outcome.problem:
            break
    at_a_time = min(num_processes, usable_cores())
    of_one = SPARE * len(wish.labeled) * seconds / 60 / at_a_time  # minutes, of a warp of each case
    each = max(LEAST_EACH, min(MOST_EACH, int(BUDGET / of_one)))
    now = min(each, len(targets))
    size = now * len(wish.labeled) * written / 2**30
    print(
        f"nnunet_ssl: a pair takes about {seconds:.1f} s; {now} warps of each of {len(wish.labeled)} labeled cases "
        f"take about {now * of_one:.1f} min, {at_a_time} at a time, and {size:.1f} GB (nnUNetv2_ssl_warp --pairs N "
        "for another number).",
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
    return name if plain else digest([moving, fixed])
