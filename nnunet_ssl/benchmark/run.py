"""Executes a plan: what is done is skipped, what was stopped goes on, what fails does not stop the rest."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nnunet_ssl import __version__
from nnunet_ssl.benchmark.plan import PRETRAINED, Plan, Run, Step, kept_seconds, read_numbers
from nnunet_ssl.benchmark.protocol import row_key
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json, write_json
from nnunet_ssl.locks import holding
from nnunet_ssl.stock_commands import end, of_this_python, running

ADDED_TO = ("seeds", "labeled", "rows", "budgets")  # what a protocol may get more of while its benchmark is under way
FREE = ("about", "figures", "gap")
KEEP = "It says what this folder was begun with: restore it, or take another -o."


class StepError(Exception):
    """A command failed; the text says which and where its output is."""


class Benchmark:
    """A benchmark in its folder.

    Args:
        plan: what is to be done.
        jobs: trainings at a time.
    """

    def __init__(self, plan: Plan, jobs: int = 1) -> None:
        self.plan, self.home, self.jobs = plan, plan.home, jobs
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._lock = threading.Lock()

    def check_source(self) -> None:
        """What the protocol's script needs is there, where a dataset is still to be made.

        Raises:
            UserError: the script or the data are not.
        """
        protocol, machine = self.plan.protocol, self.plan.machine
        if protocol.data.script is None or all(self.is_done(s) for s in self.plan.prepare() if s.makes is not None):
            return
        script = machine.scripts / protocol.data.script
        if not script.is_file():
            raise UserError(
                f"{script} does not exist, which makes the datasets of {protocol.name}. It is part of a checkout, not "
                "of an installation: name the checkout's folder with --scripts."
            )
        if not machine.data.is_dir():
            raise UserError(
                f"{machine.data} is no folder; name the folder of the published data with --data. What it has to hold "
                f"is said by python {script} --help"
            )

    def run(self) -> str | None:
        """Everything up to the figures.

        Returns:
            What failed among the runs, which does not stop the others; None where nothing did.

        Raises:
            UserError: a command of the preparation failed, which ends it.
        """
        write_json(str(self.home / "datasets.json"), self.plan.ids)
        try:
            for step in [*self.plan.prepare(), *self.plan.measure()]:
                self.do(step)
        except StepError as error:
            raise UserError(f"{error} Mend it and start again: what is done is not done twice.") from None
        self.plan.keep_seconds()
        failed = self._work_through(self.plan.queue())
        for runs, step in [*self.plan.compare(), *self.plan.figures()]:
            if not failed.keys() & {run.folder for run in runs}:
                try:
                    self.do(step)
                except StepError as error:
                    failed[self.home / step.key] = str(error)
        if failed:
            return f"{len(failed)} failed: {' '.join(failed.values())} The rest is done. Mend it and start again."
        return None

    def _work_through(self, runs: Sequence[Run]) -> dict[Path, str]:
        """Train and test all runs, ``jobs`` at a time; returns folder and message of those that failed."""

        def work(run: Run) -> tuple[Path, str] | None:
            try:
                for step in self.plan.steps_of(run):
                    self.do(step)
            except StepError as error:
                return run.folder, str(error)
            return None

        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                return dict(filter(None, pool.map(work, runs)))
            except BaseException:  # Ctrl-C or kill: the commands have sessions of their own and would go on
                self._stop()
                pool.shutdown(cancel_futures=True)
                raise

    # ------------------------------------------------------------------------------------------------ one step

    def is_done(self, step: Step) -> bool:
        """Whether there is a record of the same command, or what it makes.

        Raises:
            UserError: the command was done with other settings.
        """
        if step.makes is not None and any(step.makes.parent.glob(step.makes.name)):
            return True
        file = self._record(step)
        if not file.is_file():
            return False
        remedy = "Restore it, or remove it to have this step done again."
        record = read_json(file, remedy, keys={"words": list})
        if record["words"] != list(step.words):
            return False
        if step.settings is not None and record.get("settings") != json.loads(json.dumps(step.settings[1])):
            raise UserError(
                f"{file} is of the same command with other settings ({json.dumps(record.get('settings'))}); undo that, "
                "give the row another name, or take another -o."
            )
        return True

    def do(self, step: Step) -> None:
        """Do a step that is not done, and record it.

        Raises:
            StepError: the command failed.
        """
        if self.is_done(step):
            return
        given, step = step, resumed(step)
        print(f"{step.title}\n  $ {step.shell()}", flush=True)
        if step.settings is not None:
            file, settings = step.settings
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(str(file), settings)
        log = self.home / "logs" / f"{step.key}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with self._attempt(step, goes_on=step.words[-1] == "--c") as attempts, log.open("a") as stream:
            stream.write(f"\n$ {step.shell()}\n")
            stream.flush()
            code = self._execute(words_to_run(step, self.plan.machine.device), step, stream)
        if code != 0:
            raise StepError(f"{step.title}: exit code {code}, its output is at the end of {log}.")
        seconds = sum(attempt.get("seconds") or 0 for attempt in attempts)
        record = {
            "words": list(given.words),
            "command": step.shell(),
            "settings": step.settings[1] if step.settings else None,
            "seconds": round(seconds, 2),
            "attempts": attempts,
        }
        self._record(step).parent.mkdir(parents=True, exist_ok=True)
        write_json(str(self._record(step)), record)
        print(f"  done after {seconds / 60:.1f} min: {step.title}", flush=True)

    @contextmanager
    def _attempt(self, step: Step, goes_on: bool) -> Iterator[list[dict[str, Any]]]:
        """Write down an attempt when it begins and when it ends; gives it with those whose work it goes on with.

        One that was killed together with this process has no seconds.
        """
        file = self.home / "attempts" / f"{step.key}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        remedy = "Restore it, or remove it if the times of earlier attempts do not matter."
        attempts = read_json(file, remedy, list) if goes_on and file.exists() else []
        for attempt in attempts:
            if not (isinstance(attempt, dict) and isinstance(attempt.get("seconds") or 0, int | float)):
                raise UserError(f"{file} lists {attempt!r}, which is no attempt. {remedy}")
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        attempts.append({"started": started, "seconds": None, **surroundings(self.plan.machine.device)})
        write_json(str(file), attempts)
        start = time.time()
        try:
            yield attempts
        finally:
            attempts[-1]["seconds"] = round(time.time() - start, 2)
            write_json(str(file), attempts)

    def _record(self, step: Step) -> Path:
        return self.home / "done" / f"{step.key}.json"

    def _execute(self, words: list[str], step: Step, stream: Any) -> int:
        environment = {"MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1", **os.environ, **step.variables}
        with ExitStack() as block:
            with self._lock:
                if self._stopped:
                    return 1
                process = block.enter_context(running(words, env=environment, stdout=stream, stderr=subprocess.STDOUT))
                self._running.add(process)
            try:
                return process.wait()
            finally:
                self._running.discard(process)

    def _stop(self) -> None:
        """End every command that runs, and begin no other."""
        with self._lock:
            self._stopped = True
            for process in list(self._running):
                end(process)


def resumed(step: Step) -> Step:
    """The step, with ``--c`` where a training has left checkpoints; it has its pretrained weights then."""
    if step.checkpoints is None or not any(found(step.checkpoints / "checkpoint_*.pth")):
        return step
    words = step.words[: step.words.index(PRETRAINED)] if PRETRAINED in step.words else step.words
    return replace(step, words=(*words, "--c"))


def found(pattern: Path) -> Iterator[Path]:
    """What a pattern with ``*`` in it stands for."""
    return Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))


def words_to_run(step: Step, device: str) -> list[str]:
    """The command as this process starts it, its patterns filled in.

    Raises:
        StepError: there is no such dataset, or more than one.
    """
    return of_this_python([_filled_in(word) for word in [*step.words, *step.machine]], device)


def _filled_in(word: str) -> str:
    before, star, after = word.partition("_*")
    if not star or not Path(before).name.startswith("Dataset"):
        return word
    folders = sorted(found(Path(before + star)))
    if len(folders) != 1:
        raise StepError(f"{before}_* is there {len(folders)} times, expected once.")
    return f"{folders[0]}{after}"


def surroundings(device: str) -> dict[str, Any]:
    """Versions and machine, for records."""
    import torch

    names = ("nnunetv2", "torch", "batchgeneratorsv2", "batchgenerators", "numpy", "scipy")
    versions = {"nnunet_ssl": __version__, "python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    machine = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {"versions": versions, "device": device, "machine": machine}


def processor() -> str:
    """The CPU's name, as far as the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------------------ the folder


@contextmanager
def claimed(home: Path, given: dict[str, Any], device: str) -> Iterator[None]:
    """Take the folder for a protocol and a device, and keep others out while it is worked in.

    Args:
        home: is made where it does not exist.
        given: the protocol as it stands in its file.
        device: where it runs.

    Raises:
        UserError: the folder belongs to something else, to a protocol that differs, or is worked in right now.
    """
    note = home / "protocol.json"
    if home.exists() and not note.is_file() and (not home.is_dir() or set(os.listdir(home)) - {".lock"}):
        raise UserError(f"{home} exists and holds no benchmark; take another -o.")
    with ExitStack() as held:
        try:
            held.enter_context(
                holding(
                    home / ".lock", f"another nnUNetv2_ssl_benchmark works in {home}; wait for it, or take another -o."
                )
            )
        except OSError as error:
            raise UserError(
                f"{error.filename or home} cannot be written ({error.strerror}); take another -o."
            ) from None
        left_out = refuse_other(home, given, device)
        write_json(str(note), {"device": device, "protocol": {**given, "rows": [*given["rows"], *left_out]}})
        yield


def refuse_other(home: Path, given: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Refuse a protocol whose runs would not belong with those that are in the folder.

    Seeds, labelled sets, rows and budgets may be added or left out; a row of the same name must be the same.

    Returns:
        The rows of the folder that the protocol leaves out this time.
    """
    note = home / "protocol.json"
    if not note.is_file():
        return []
    before = read_json(note, KEEP, keys={"device": str, "protocol": dict})
    try:
        return _left_out(home, before, given, device)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{note} holds no protocol that a benchmark wrote ({error!r}). {KEEP}") from error


def _left_out(home: Path, before: dict[str, Any], given: dict[str, Any], device: str) -> list[dict[str, Any]]:
    old, seconds = dict(before["protocol"]), given.get("measure", {}).get("seconds", {})
    given = dict(given)
    for protocol in (old, given):  # seconds may come and go with their rows
        protocol["measure"] = {k: v for k, v in protocol.get("measure", {}).items() if k != "seconds"}
    if before["device"] != device:
        raise UserError(f"{home} was begun with --device {before['device']}; keep to it, or take another -o.")
    for name in sorted(set(old) | set(given)):
        if name not in (*ADDED_TO, *FREE) and old.get(name) != given.get(name):
            raise UserError(
                f"{home} was begun with '{name}' {json.dumps(old.get(name))}, the protocol now says "
                f"{json.dumps(given.get(name))}; undo that, or take another -o."
            )
    first, now = (next((b["steps"] for b in p["budgets"] if "steps" in b), None) for p in (old, given))
    if first != now and any("time_of" in budget for budget in old["budgets"]):
        raise UserError(
            f"{home} was begun with {first} as the first budget in steps, by which 'time_of' goes, the protocol now "
            f"says {now}; undo that, or take another -o."
        )
    for name, value in seconds.items():
        kept = kept_seconds(home).get(row_key(name), value)
        if not math.isclose(kept, value, rel_tol=1e-3):  # as the report prints them
            raise UserError(
                f"{home} was begun with {kept:.4g} seconds a step of {name!r}, the protocol now gives {value}; undo "
                "that, or take another -o."
            )
    rows = {row_key(row["name"]): row for row in old["rows"]}
    for row in given["rows"]:
        was = rows.pop(row_key(row["name"]), row)
        if {k: v for k, v in was.items() if k != "against"} != {k: v for k, v in row.items() if k != "against"}:
            raise UserError(
                f"{home} was begun with another row {row['name']!r} ({json.dumps(was)}); undo that, give the row "
                "another name, or take another -o."
            )
    return list(rows.values())


def begun_with(home: Path) -> str | None:
    """The device of a benchmark that was begun."""
    file = home / "protocol.json"
    if not file.is_file():
        return None
    device = read_json(file, KEEP, keys={"device": str})["device"]
    if device not in ("cpu", "cuda", "mps"):
        raise UserError(f"{file} names the device {device!r}, which is none of cpu, cuda and mps. {KEEP}")
    return device


def known_ids(home: Path) -> dict[str, int]:
    """The dataset ids that this benchmark has chosen so far."""
    return read_numbers(home / "datasets.json", "It says which dataset is which: restore it, or take another -o.")


def script_of(benchmark: Benchmark) -> Iterator[str]:
    """What is still to be done, as lines of a shell script."""
    plan = benchmark.plan

    def lines(steps: Iterable[Step]) -> Iterator[str]:
        for step in steps:
            if benchmark.is_done(step):
                yield f"# done: {step.title}"
                continue
            yield f"# {step.title}"
            if step.settings is not None:
                file, settings = step.settings
                if settings["num_iterations_per_epoch"] is None:
                    yield "# num_iterations_per_epoch follows from the seconds a step that are measured above"
                yield f"mkdir -p {shlex.quote(str(file.parent))}"
                yield f"echo {shlex.quote(json.dumps(settings))} > {shlex.quote(str(file))}"
            yield resumed(step).shell()

    yield f"export nnUNet_raw={shlex.quote(str(plan.machine.raw))}"
    yield f"export nnUNet_preprocessed={shlex.quote(str(plan.machine.preprocessed))}"
    yield from lines(plan.prepare())
    yield from lines(plan.measure())
    for run in plan.queue():
        yield from lines(plan.steps_of(run))
    yield from lines(step for _, step in [*plan.compare(), *plan.figures()])
