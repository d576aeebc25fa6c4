"""What a protocol comes to: its datasets, its runs with their lengths, and where everything lies.

The rules of the ``Snakefile`` ask this for each command's words.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ssl.benchmark.folder import by_row
from nnunet_ssl.benchmark.protocol import Budget, Labeled, Protocol, Row
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json

# seconds per step are not known better: a budget in time that differs by less from the one in steps is the same
SAME_LENGTH = 0.05

# what the trainings of a run are told, in its folder
SETTINGS, PRETRAINING = "settings.json", "pretraining.json"


@dataclass(frozen=True)
class Run:
    """A row with a labeled set, a seed and a budget."""

    row: Row
    labeled: Labeled
    seed: int
    budget: Budget
    epochs: int  # of each training
    iterations: int | None  # steps of an epoch; None as long as a budget in time has no measurement
    folder: Path  # of everything that comes of it

    @property
    def key(self) -> str:
        """In file names: ``<budget>/<run>``."""
        return f"{self.budget.key}/{self.folder.name}"

    @property
    def steps_before(self) -> int:
        """Steps of the trainings before the last one."""
        return self.iterations * self.epochs * (self.row.trainings - 1)

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.row.name}, {self.labeled} labeled, seed {self.seed}, {self.budget.key}"


@dataclass(frozen=True)
class Table:
    """The runs of a budget and a number of labeled cases, seed by seed."""

    budget: Budget
    labeled: Labeled
    runs: tuple[Run, ...]

    @property
    def key(self) -> str:
        """In file names."""
        return f"{self.budget.key}_{self.labeled}labeled"

    def of_seed(self, seed: int) -> list[Run]:
        """The rows' runs of a seed."""
        return [run for run in self.runs if run.seed == seed]


class Benchmark:
    """A protocol in a folder of its own.

    ``ids`` are known dataset ids, see ``dataset_key``; more are chosen as they are needed, none that is ``reserved``.
    """

    def __init__(
        self,
        protocol: Protocol,
        home: Path,
        raw: Path,
        preprocessed: Path,
        ids: Mapping[str, int] | None = None,
        reserved: Iterable[int] = (),
    ) -> None:
        self.protocol, self.home, self.raw, self.preprocessed = protocol, home, raw, preprocessed
        self._given = by_row(protocol.measure.seconds)
        single = [row for row in protocol.rows[::-1] if row.key in self._given and row.trainings == 1]
        self._given_kinds = {kind(row): self._given[row.key] for row in single}
        self._seconds = {**self._given_kinds}  # by kind; a complete measurement stays: its logs are read once
        self.ids = self._choose_ids(dict(ids or {}), set(reserved))

    # ------------------------------------------------------------------------------------------------ datasets

    def dataset_key(self, labeled: Labeled, seed: int) -> str:
        """Which dataset a run learns from. All labels have no order."""
        ordered = self.protocol.data.order_by_seed and labeled != "all"
        return f"{labeled} labeled, order {seed}" if ordered else f"{labeled} labeled"

    def sources(self) -> dict[int, tuple[str, Labeled, int]]:
        """Dataset id -> its key, the labeled set and the order, of all that are needed."""
        return {self.ids[key]: (key, *source) for key, source in self._sources().items()}

    def _sources(self) -> dict[str, tuple[Labeled, int]]:
        wanted: dict[str, tuple[Labeled, int]] = {}
        own = [row.labeled for row in self.protocol.rows if row.labeled is not None]
        for labeled in dict.fromkeys([*self.protocol.labeled, *own]):
            for seed in self.protocol.seeds:
                wanted.setdefault(self.dataset_key(labeled, seed), (labeled, seed))
        return wanted

    def _choose_ids(self, ids: dict[str, int], reserved: set[int]) -> dict[str, int]:
        """A free id, from ``first_id`` on, for each dataset that has none; one after the other for self-training."""
        taken = {
            int(match[1])
            for folder in (self.raw, self.preprocessed)
            for path in folder.glob("Dataset*")
            if (match := re.match(r"Dataset(\d{3})_", path.name))
        }
        wanted = self._wanted()
        taken |= reserved | _all_of(ids, wanted)
        for key, count in wanted.items():
            if key not in ids:
                free = (n for n in range(self.protocol.first_id, 1001 - count) if not taken & set(range(n, n + count)))
                ids[key] = next(free, 0)
                taken |= set(range(ids[key], ids[key] + count))
                if not ids[key]:
                    raise UserError(
                        f"no dataset id from {self.protocol.first_id} to 999 is free in {self.raw}; set a lower "
                        f"'first_id' in the protocol {self.protocol.name}."
                    )
        return ids

    def _wanted(self) -> dict[str, int]:
        """How many ids each labeled set and each run needs: the datasets of self-training come one after the other."""
        wanted = {**dict.fromkeys(self._sources(), 1), **{run.key: run.row.rounds for run in self.queue()}}
        return {key: count for key, count in wanted.items() if count}

    def all_ids(self) -> set[int]:
        """Every dataset id that this benchmark has or will have."""
        return _all_of(self.ids, self._wanted())

    def name(self, key: str) -> str:
        """Of the dataset with this key, as it stands in nnU-Net's folders."""
        return re.sub(r"\W+", "_", f"{self.protocol.name} {key}")

    def dataset_of(self, run: Run) -> int:
        """The id of the dataset with its labels and test cases."""
        return self.ids[self.dataset_key(run.labeled, run.seed)]

    def last_dataset(self, run: Run) -> int:
        """The id of the dataset that its last training learns from."""
        return self.ids[run.key] + run.row.rounds - 1 if run.row.rounds else self.dataset_of(run)

    def needs_unlabeled(self, number: int) -> bool:
        """Whether a row that learns from this dataset wants its unlabeled images."""
        from nnunet_ssl import trainers

        return any(
            self.dataset_of(run) == number and any(getattr(trainers, s.trainer).uses_unlabeled for s in run.row.stages)
            for run in self.queue()
        )

    # ------------------------------------------------------------------------------------------------ seconds per step

    def timed(self) -> dict[str, Row]:
        """The kinds of training whose seconds per step have to be measured, by the name of their folder.

        Stages of rows that train alike are of one kind. None is measured where no budget is in time, or where the
        protocol gives the seconds of the row.
        """
        p = self.protocol
        if all(budget.steps is not None for budget in p.budgets):
            return {}
        stages = [stage for row in p.rows if row.key not in self._given for stage in row.stages]
        return {kind(stage): stage for stage in stages if kind(stage) not in self._given_kinds}

    def rounds(self) -> list[str]:
        """The short trainings of each kind in turn, forwards and backwards: what drifts drifts for all."""
        names = list(self.timed())
        order = [names if number % 2 == 0 else names[::-1] for number in range(self.protocol.measure.rounds)]
        return [f"{name}_{number}" for number, turn in enumerate(order) for name in turn]

    def measured_on(self) -> tuple[int, int]:
        """Dataset id and seed of the short trainings: what the first of them had, whatever is added later."""
        for file in sorted(self.home.glob(f"measure/*/{SETTINGS}")):
            for folder in file.parent.glob("results/Dataset*"):
                seed = read_json(file, "Remove the folder measure, and done/measure*.", keys={"seed": int})["seed"]
                return int(folder.name[7:10]), seed
        p = self.protocol
        return self.ids[self.dataset_key(p.labeled[0], p.seeds[0])], p.seeds[0]

    def failed_measurements(self) -> list[Path]:
        """The marks of short trainings that failed: those in which something is written."""
        marks = (self.home / "done" / "measure" / name for name in self.rounds())
        return [mark for mark in marks if mark.is_file() and mark.stat().st_size]

    def seconds_per_step(self) -> dict[str, float]:
        """Of each row that is known, by its key: as the protocol gives them, or measured; the mean of its stages."""
        seconds = {}
        for row in self.protocol.rows:
            stages = [self._given.get(row.key)] if row.key in self._given else [*map(self._seconds_of, row.stages)]
            if None not in stages:
                seconds[row.key] = sum(stages) / len(stages)
        return seconds

    def _seconds_of(self, stage: Row) -> float | None:
        """Given, or measured, or None as long as it is neither.

        Of an epoch the faster round counts, since other load makes it longer, never shorter; and the mean of the
        epochs, since those of a method with phases differ.
        """
        m, name = self.protocol.measure, kind(stage)
        if name in self._seconds:
            return self._seconds[name]
        folders = [self.home / "measure" / f"{name}_{number}" for number in range(m.rounds)]
        rounds = [epoch_seconds(fold) for folder in folders for fold in trainings(folder)]
        if [len(found) for found in rounds] != [m.epochs] * m.rounds:
            return None
        # the first epoch is warm-up: allocators, compilation, the choice of algorithms
        epochs = [min(found[epoch] for found in rounds) for epoch in range(1, m.epochs)]
        seconds = sum(epochs) / len(epochs) / m.iterations
        if seconds == 0:
            raise UserError(
                f"the short runs of {stage.name} took no time that nnU-Net's log can show; set measure.iterations in "
                f"{self.protocol.name} above {m.iterations} and choose another -o."
            )
        self._seconds[name] = seconds
        return seconds

    # ------------------------------------------------------------------------------------------------ runs

    def tables(self) -> Iterator[Table]:
        """A table for each budget and labeled set."""
        p, seconds = self.protocol, self.seconds_per_step()
        for budget in p.budgets:
            for labeled in p.labeled:
                runs = [self._run(row, labeled, seed, budget, seconds) for seed in p.seeds for row in p.rows]
                yield Table(budget, labeled, tuple(runs))

    def queue(self) -> list[Run]:
        """All runs once; a run may be in several tables."""
        return list({run.folder: run for table in self.tables() for run in table.runs}.values())

    def run(self, key: str) -> Run:
        """The run of this key."""
        return next(run for run in self.queue() if run.key == key)

    def _run(self, row: Row, labeled: Labeled, seed: int, budget: Budget, seconds: Mapping[str, float]) -> Run:
        p = self.protocol
        labeled = labeled if row.labeled is None else row.labeled
        name = f"{row.key}_{labeled}labeled_seed{seed}"
        iterations = self._iterations(row, budget, self.home / "runs" / budget.key / name, seconds)
        if p.equal_steps is not None and budget.steps is None:
            same = self._steps_of_an_epoch(row, p.equal_steps.steps)
            if budget.time_of == row.name or (iterations and abs(iterations - same) <= SAME_LENGTH * same):
                budget, iterations = p.equal_steps, same
        return Run(row, labeled, seed, budget, p.epochs, iterations, self.home / "runs" / budget.key / name)

    def _steps_of_an_epoch(self, row: Row, steps: int) -> int:
        """So many that all trainings of the row together have these steps."""
        return steps // self.protocol.epochs // row.trainings

    def _iterations(self, row: Row, budget: Budget, folder: Path, seconds: Mapping[str, float]) -> int | None:
        """Steps of an epoch. Epochs are the same for all, so that schedules and curves are."""
        p = self.protocol
        if budget.steps is not None:
            return self._steps_of_an_epoch(row, budget.steps)
        for file in (folder / SETTINGS, folder / PRETRAINING):
            if file.is_file():  # a run that was started keeps its length
                name = "num_iterations_per_epoch"
                return read_json(file, "Restore it: a run that was started keeps its length.", keys={name: int})[name]
        of = row if budget.time_of is None else p.row(budget.time_of)
        if row.key not in seconds or of.key not in seconds:
            return None
        total = 60 * budget.minutes if budget.minutes is not None else p.equal_steps.steps * seconds[of.key]
        total -= 60 * (row.offline or 0)
        if total <= 0:
            raise UserError(
                f"the offline work of {row.name} takes longer than the time of {budget.time_of} in {p.name}; take more "
                "'steps', or leave the row out."
            )
        return max(1, round(total / p.epochs / row.trainings / seconds[row.key]))

    # ------------------------------------------------------------------------------------------------ what trains how

    def trainer(self, row: Row) -> str:
        """The trainer's name, with its epochs."""
        return f"{row.trainer}_{self.protocol.epochs}epochs"

    def settings(self, run: Run) -> dict[str, Any]:
        """What a run's trainings are told; checkpoints are kept where its curve is predicted."""
        own = self._settings(run.row, run.seed, run.iterations)
        return {**own, "save_every": self._save_every, "keep_epochs": list(self.protocol.curve_epochs)}

    def pretraining_settings(self, run: Run) -> dict[str, Any]:
        """Of the training that comes first: nothing of the row's settings but seed and length."""
        return {**self._settings(run.row.stages[0], run.seed, run.iterations), "save_every": self._save_every}

    @property
    def _save_every(self) -> int:
        """So many epochs a killed training loses at most: a twentieth, or nnU-Net's 50."""
        return min(50, max(1, self.protocol.epochs // 20))

    def measuring_settings(self, name: str) -> dict[str, Any]:
        """Of the short trainings of a kind."""
        m = self.protocol.measure
        return {**self._settings(self.timed()[name], self.measured_on()[1], m.iterations), "save_every": m.epochs + 1}

    def _settings(self, row: Row, seed: int, iterations: int | None) -> dict[str, Any]:
        """Nothing is chosen by validation, so one step of it will do."""
        run = {"seed": seed, "num_iterations_per_epoch": iterations, "num_val_iterations_per_epoch": 1}
        return {**run, **self.protocol.settings, **row.settings}

    # ------------------------------------------------------------------------------------------------ places

    def model(self, run: Run, stage: int = -1) -> Path:
        """nnU-Net's folder of the model of a stage, the last one, as a pattern: ``*`` stands for the dataset's name."""
        p, last = self.protocol, stage % run.row.trainings == run.row.trainings - 1
        number = self.last_dataset(run) if last else self.dataset_of(run)
        name = f"{self.trainer(run.row.stages[stage])}__{p.plans}__{p.configuration}"
        return run.folder / "results" / f"Dataset{number:03d}_*" / name

    def predictions(self, run: Run, epoch: int) -> Path:
        """Predicted test cases after an epoch."""
        return run.folder / f"test_epoch{epoch}"

    def summary(self, run: Run, epoch: int) -> Path:
        """Their evaluation."""
        return run.folder / f"evaluated_epoch{epoch}" / "summary.json"

    def is_finished(self, run: Run) -> bool:
        """Whether every point of its curve is evaluated."""
        return all(self.summary(run, epoch).exists() for epoch in self.protocol.curve_epochs)

    def figures(self) -> Iterator[tuple[Table, list[Run]]]:
        """For each labeled set, of the first budget and seed, the rows that the protocol names."""
        p = self.protocol
        for table in self.tables() if p.figures else ():
            if table.budget == p.budgets[0]:
                runs = {run.row.name: run for run in table.runs if run.seed == p.seeds[0]}
                yield table, [runs[name] for name in p.figures]


def _all_of(ids: Mapping[str, int], wanted: Mapping[str, int]) -> set[int]:
    """The first of each, and those that follow it."""
    return {first + n for key, first in ids.items() for n in range(wanted.get(key, 1))}


def quoted(*words: Any) -> str:
    """Words for a shell, quoted but for the ``*`` of a dataset's folder, which the shell shall fill in."""
    pieces = [re.split(r"(?<=Dataset\d{3}_)\*", str(word)) for word in words]
    return " ".join("*".join(shlex.quote(piece) if piece else "" for piece in word) for word in pieces)


def kind(stage: Row) -> str:
    """The name of the folder in which a stage is timed; the same where a step is the same computation."""
    digest = hashlib.sha256(json.dumps(stage.settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{stage.trainer}_{digest}" if stage.settings else stage.trainer


def trainings(folder: Path) -> list[Path]:
    """nnU-Net's folders of the trainings in the folder of a run; with self-training there are several."""
    return sorted(folder.glob("results/*/*/fold_0"))


def epoch_seconds(fold: Path) -> dict[int, float]:
    """Epoch -> seconds, from nnU-Net's logs in a training's folder; of an epoch that was repeated, the last."""
    seconds: dict[int, float] = {}
    epoch = None
    logs = fold.glob("training_log_*.txt")
    for log in sorted(logs, key=lambda file: file.stat().st_mtime):  # their names do not sort by time
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            if match := re.search(r": Epoch (\d+)\s*$", line):
                epoch = int(match[1])
            elif (match := re.search(r": Epoch time: ([\d.]+) s", line)) and epoch is not None:
                seconds[epoch] = float(match[1])
    return seconds
