"""A folder of prepared cases that is completed while others read it, and never changes under a training.

* ``part_<number>/<case>/`` holds a case, files as nnU-Net's own. Each run that prepares makes its own part, and
  finished files are never written again, so a training reads what it began with no matter what other processes do.
* ``manifest.json`` lists the cases that are finished, each with where it lies and what it was made from. Everything
  else is made again, and replaced in the manifest alone.
* ``part_<number>/.readers`` is a lock that every training shares that reads from the part. What the manifest does not
  list, or no longer lists, is removed by the next start that finds that nobody shares it.
* ``.lock`` is held by the process that prepares or removes.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from tqdm import tqdm
from typing_extensions import Self

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json, write_json
from nnunet_ssl.locks import holding, is_shared, share
from nnunet_ssl.names import path_component
from nnunet_ssl.pools import outcomes

MANIFEST, LOCK, READERS = "manifest.json", ".lock", ".readers"
PART = re.compile("part_[0-9a-f]{8}")
SAVE_EVERY = 2.0  # seconds between two writes of the manifest
POLL_EVERY = 2.0  # seconds between two looks of a waiting rank

NOT_LISTED = {  # by whether a training reads them; None where nobody can tell
    False: "removed {}.",
    True: "{} stay until no training reads them.",
    None: "{} stay, because without locks nobody can tell whether a training reads them. To free the space, "
    "delete the folder while no training reads it; all are then prepared again.",
}

T = TypeVar("T")


@dataclass(frozen=True)
class PreparedFolder:
    """Where prepared cases are, and what they were made from."""

    folder: str
    # case -> the folder of its files <case>.b2nd, <case>_seg.b2nd, <case>.pkl (or what else the plans' preprocessor
    # writes), sorted by case
    places: dict[str, str]
    contents: dict[str, str]  # case -> a digest of what it was made from

    @property
    def cases(self) -> list[str]:
        """The cases, sorted."""
        return list(self.places)


class Outcome(NamedTuple):
    """What became of a case."""

    case: str
    entry: dict[str, Any]  # what the manifest says of it, apart from its place
    problem: str | None = None  # why it could not be made; None if it was
    fatal: bool = False  # the next ones would fare no better


@dataclass
class Manifest(ABC):
    """The finished cases of a prepared folder."""

    FORMAT: ClassVar[int]
    ABOUT: ClassVar[dict[str, type]]  # the file's other keys, and their types; one that is not there is empty

    folder: str
    about: dict[str, Any]  # what concerns all cases, under the names of ABOUT
    cases: dict[str, dict]  # case -> {"part": where it lies, "files": size of each prepared file, ...}

    @abstractmethod
    def check(self) -> None:
        """See that what was read has the shape that it should have; raise any of the errors that ``read`` catches."""

    @abstractmethod
    def content_of(self, case: str) -> str:
        """A digest of what a case was made from."""

    @classmethod
    def read(cls, folder: str) -> Self:
        """Read the manifest; an unreadable or foreign one counts as none."""
        empty = {key: kind() for key, kind in cls.ABOUT.items()}
        with contextlib.suppress(UserError, LookupError, TypeError, AttributeError, ValueError):
            content = empty | read_json(os.path.join(folder, MANIFEST), "", keys={"format": int, "cases": dict})
            if not all(isinstance(content[key], kind) for key, kind in cls.ABOUT.items()):
                raise TypeError
            manifest = cls(folder, {key: content[key] for key in cls.ABOUT}, content["cases"])
            for case, entry in manifest.cases.items():
                for name in (case, entry["part"], *entry["files"].keys()):
                    path_component(name, "file", folder)
            manifest.check()
            if content["format"] == cls.FORMAT:
                return manifest
        return cls(folder, empty, {})

    def write(self) -> None:
        """Write the manifest in one step: a reader sees the old one or the new one."""
        write_json(os.path.join(self.folder, MANIFEST), {"format": self.FORMAT, **self.about, "cases": self.cases})

    def place(self, case: str) -> str:
        """The folder of a case's files."""
        return os.path.join(self.folder, self.cases[case]["part"], case)

    def prepared(self) -> PreparedFolder:
        """What the manifest lists, for those who read it."""
        cases = sorted(self.cases)
        return PreparedFolder(self.folder, {c: self.place(c) for c in cases}, {c: self.content_of(c) for c in cases})

    def keep(self) -> bool:
        """Have what is listed stay as it is until this process ends.

        Returns:
            False if another process has changed the manifest meanwhile: then look again.
        """
        for part in {entry["part"] for entry in self.cases.values()}:
            with contextlib.suppress(OSError):  # of a copy that is read-only: who could remove anything there?
                share(os.path.join(self.folder, part, READERS))
        return self.read(self.folder).prepared() == self.prepared()

    def files_are_there(self, case: str) -> bool:
        """Whether a case's prepared files have the size that they had when they were made."""
        with contextlib.suppress(OSError):
            files = self.cases[case]["files"].items()
            return all(os.path.getsize(os.path.join(self.place(case), name)) == size for name, size in files)
        return False

    def locked(self, *, wait: bool) -> AbstractContextManager[None]:
        """Keep others from preparing and removing.

        Raises:
            UserError: another process does, and we are not to wait.
            OSError: the folder cannot be written.
        """
        os.makedirs(self.folder, exist_ok=True)
        busy = f"another process is preparing {self.folder}; waiting for it."
        return holding(os.path.join(self.folder, LOCK), busy, wait=wait)

    def make(
        self,
        function: Callable[..., Outcome],
        jobs: Mapping[str, tuple[Any, ...]],
        num_processes: int,
        title: str,
        lack_of_memory: str,
        keep: Callable[[Outcome], str | None] = lambda outcome: outcome.problem,
    ) -> list[str]:
        """Make cases into a new part, and list finished ones as they come. The folder's lock is held.

        Args:
            function: makes one case into the folder ``<part>/<case>``, which it is given last.
            jobs: case -> its other arguments.
            num_processes: cases made at a time, where there is enough to do.
            title: of the progress bar.
            lack_of_memory: what to do where a process was killed, a sentence.
            keep: what stands against listing a case; None if nothing does.

        Returns:
            What stood against the cases that are not listed.

        Raises:
            UserError: a problem that is fatal, or a process was killed. What was finished is kept.
        """
        saved = time.monotonic()
        part = f"part_{secrets.token_hex(4)}"
        os.mkdir(os.path.join(self.folder, part))
        with open(os.path.join(self.folder, part, READERS), "x", encoding="utf-8"):
            pass
        problems: list[str] = []
        try:
            placed = [(*job, os.path.join(self.folder, part, case)) for case, job in jobs.items()]
            with contextlib.closing(outcomes(function, placed, num_processes)) as finished:
                for outcome in tqdm(finished, title, len(placed)):
                    if outcome.fatal:
                        raise UserError(outcome.problem)
                    if problem := keep(outcome):
                        problems.append(problem)
                        continue
                    made = os.scandir(os.path.join(self.folder, part, outcome.case))
                    files = {file.name: file.stat().st_size for file in made}
                    self.cases[outcome.case] = {"part": part, **outcome.entry, "files": files}
                    if time.monotonic() - saved > SAVE_EVERY:
                        self.write()
                        saved = time.monotonic()
        except BrokenProcessPool as error:
            raise UserError(
                f"{self.folder}: {title[0].lower()}{title[1:]}: a process was killed, most likely for lack of memory. "
                f"{lack_of_memory}"
            ) from error
        finally:
            unfinished = self.unlisted().get(part, [])
            for case in unfinished:
                _free(os.path.join(self.folder, part, case))
            _clear(os.path.join(self.folder, part), unfinished)
            self.write()  # last: on a full disk it needs the room
        return problems

    def unlisted(self) -> dict[str, list[str]]:
        """Part -> cases in it that are not listed: half-made, or no longer current; also for an empty part."""
        listed = {(entry["part"], case) for case, entry in self.cases.items()}
        found: dict[str, list[str]] = {}
        with contextlib.suppress(OSError):
            for part in os.scandir(self.folder):
                if PART.fullmatch(part.name) and part.is_dir(follow_symlinks=False):
                    cases = [case.name for case in os.scandir(part) if case.is_dir(follow_symlinks=False)]
                    unlisted = [case for case in cases if (part.name, case) not in listed]
                    if unlisted or not cases:
                        found[part.name] = unlisted
        return found

    def remove_unread(self, say: str | None = None) -> None:
        """Remove what is not listed and no training reads. The folder's lock is held.

        What is printed of it calls the cases what ``say`` says; None prints nothing.
        """
        number: Counter[bool | None] = Counter()
        for part, cases in self.unlisted().items():
            shared = is_shared(os.path.join(self.folder, part, READERS))
            number[shared] += len(cases)
            if shared is False:
                _clear(os.path.join(self.folder, part), cases)
        for shared, told in NOT_LISTED.items():
            if say is not None and number[shared]:
                what = f"{number[shared]} {say} in {self.folder} that are no longer current"
                print(f"nnunet_ssl: {told.format(what)}", flush=True)


def wait_for(look: Callable[[], T | None], timeout: float, late: str) -> T:
    """Look until another process has made something, doing nothing else: for all ranks except the first.

    They look at a folder rather than wait in a collective, which would time out.

    Raises:
        UserError: ``late``, if ``look`` has given nothing but None for ``timeout`` seconds; or what ``look`` raises:
            torch ends all ranks as soon as one has ended, perhaps before the first has said the same.
    """
    end = time.monotonic() + timeout
    while (found := look()) is None and time.monotonic() <= end:
        time.sleep(POLL_EVERY)
    if found is None:
        raise UserError(late)
    return found


def disk_failure(error: Exception, place: str) -> str | None:
    """What to say of a case that could not be made into the folder ``place``; None if the disk was not the reason."""
    part = os.path.dirname(place)
    reason: str | None
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        if error.filename and not Path(os.fsdecode(error.filename)).is_relative_to(part):
            return f"{error.filename} cannot be read ({reason}). Run the same command again: finished work is kept."
    else:
        reason = _why_writing_fails(part)
    return cannot_write(os.path.dirname(part), reason) if reason else None


def memory_failure(error: Exception, what: str, less: str) -> str | None:
    """What to say where ``what`` did not fit into memory; None if that was not the reason.

    Args:
        error: that was raised.
        what: for instance "a and b do".
        less: what to do less of.
    """
    if isinstance(error, MemoryError) or "allocate memory" in str(error):  # as ITK says it
        return f"{what} not fit into memory. {less}, or on a machine with more."
    return None


def _why_writing_fails(folder: str) -> str | None:
    """Write a file of 16 MiB and see; None if that works. blosc2 does not say why it could not write."""
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


def cannot_write(folder: str, reason: str) -> str:
    """What to say of a prepared folder that cannot be written."""
    return (
        f"{folder} cannot be written ({reason}). Make room or make it writable and run the same command again: "
        "finished work is kept."
    )


def _clear(part: str, cases: list[str]) -> None:
    """Remove cases that nobody reads from a part, and the part if nothing is left."""
    for case in cases:
        shutil.rmtree(os.path.join(part, case), ignore_errors=True)
    if os.listdir(part) in ([], [READERS]):
        shutil.rmtree(part, ignore_errors=True)


def _free(place: str) -> None:
    """Empty the files of a case that was not finished: blosc2 leaves one open that it could not write to its end."""
    for file in os.scandir(place):
        if file.is_file(follow_symlinks=False):
            os.truncate(file, 0)
