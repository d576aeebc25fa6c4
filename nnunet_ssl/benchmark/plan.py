"""A protocol as a list of steps, each of them one command that a user could type.

The order of things: make the datasets, plan and prepare them; measure seconds a step, where a budget is in time; train
each run, predict and evaluate the test cases at each point of the curve; compare the rows; draw figures.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnunet_ssl.benchmark.protocol import Budget, Labeled, Protocol, Row, row_key
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.metrics import METRICS
from nnunet_ssl.files import read_json, write_json

# of a CPU: one thread a run, so that runs side by side do not slow each other down; batches are made in it too
ONE_THREAD = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}

# seconds a step are not known better than this: a budget in time that differs by less from the one in steps is the same
SAME_LENGTH = 0.05

PRETRAINED = "-pretrained_weights"  # nnU-Net's option
PRETRAINING = "pretraining.json"  # settings of a run's pretraining, beside its settings.json

SECONDS = "seconds_a_step.json"  # of each row, in the folder of the benchmark


@dataclass(frozen=True)
class Machine:
    """Where a benchmark runs; nothing here changes what is computed, except for the device.

    Attributes:
        device: ``cuda``, ``cpu`` or ``mps``.
        processes: for preprocessing and evaluation.
        raw, preprocessed: nnU-Net's folders.
        data: folder of the published data; it need not be there for a protocol without a script.
        scripts: folder of the ``prepare_*.py``.
    """

    device: str
    processes: int
    raw: Path
    preprocessed: Path
    data: Path
    scripts: Path


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        key: of its record; a step with a record of the same words is done.
        title: for people.
        words: the command; ``Dataset640_*`` in a path stands for the folder that exists by then.
        machine: further words, which do not change what comes out.
        variables: of the environment.
        settings: a file to write before, and what it holds.
        checkpoints: folder (a pattern) in which checkpoints mean that ``--c`` continues.
        makes: a folder (a pattern) that appears only when it is complete: where it is there, the step is done.
    """

    key: str
    title: str
    words: tuple[str, ...]
    machine: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    settings: tuple[Path, Mapping[str, Any]] | None = None
    checkpoints: Path | None = None
    makes: Path | None = None

    def shell(self) -> str:
        """As typed into a shell."""
        assignments = [f"{name}={quoted(value)}" for name, value in self.variables.items()]
        return " ".join([*assignments, *map(quoted, [*self.words, *self.machine])])


def quoted(word: str) -> str:
    """Quoted for a shell, but for the ``*`` of a dataset's folder, which the shell shall fill in."""
    pieces = re.split(r"(?<=Dataset\d{3}_)(\*)", word)
    return "*".join(shlex.quote(piece) if piece else "" for piece in pieces[::2])


@dataclass(frozen=True)
class Run:
    """One training: a row with a labelled set, a seed and a budget.

    Attributes:
        epochs: of each training.
        iterations: steps of an epoch; None as long as a budget in time has no measurement.
    """

    row: Row
    labeled: Labeled
    seed: int
    budget: Budget
    epochs: int
    iterations: int | None
    folder: Path

    @property
    def key(self) -> str:
        """Of records."""
        return f"{self.budget.key}/{self.folder.name}"

    @property
    def steps_before(self) -> int:
        """Steps of the trainings before the last one."""
        return self.iterations * self.epochs * (self.row.trainings - 1)

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.row.name}, {self.labeled} labelled, seed {self.seed}, {self.budget.key}"


class Plan:
    """The steps of a protocol.

    Args:
        protocol: what is to be done.
        home: folder of the benchmark.
        machine: where.
        ids: known dataset ids, see ``dataset_key``; more are chosen as they are needed.
    """

    def __init__(self, protocol: Protocol, home: Path, machine: Machine, ids: Mapping[str, int] | None = None) -> None:
        self.protocol, self.home, self.machine = protocol, home, machine
        self.ids = self._choose_ids(dict(ids or {}))
        self.training_variables = ONE_THREAD if machine.device == "cpu" else {}

    # ------------------------------------------------------------------------------------------------ datasets

    def dataset_key(self, labeled: Labeled, seed: int) -> str:
        """Which dataset a run learns from. All labels have no order."""
        ordered = self.protocol.data.order_by_seed and labeled != "all"
        return f"{labeled} labelled, order {seed}" if ordered else f"{labeled} labelled"

    def dataset(self, labeled: Labeled, seed: int) -> Path:
        """The raw dataset, as a pattern: a script gives it its name."""
        return self.machine.raw / f"Dataset{self.ids[self.dataset_key(labeled, seed)]:03d}_*"

    def _sources(self) -> dict[str, tuple[Labeled, int]]:
        """The labelled sets and orders that are needed, by ``dataset_key``."""
        wanted = {}
        own = [row.labeled for row in self.protocol.rows if row.labeled is not None]
        for labeled in dict.fromkeys([*self.protocol.labeled, *own]):
            for seed in self.protocol.seeds:
                wanted.setdefault(self.dataset_key(labeled, seed), (labeled, seed))
        return wanted

    def _choose_ids(self, ids: dict[str, int]) -> dict[str, int]:
        """A free id, from ``first_id`` on, for each dataset that has none; one after the other for self-training."""
        taken = {
            int(match[1])
            for folder in (self.machine.raw, self.machine.preprocessed)
            for path in folder.glob("Dataset*")
            if (match := re.match(r"Dataset(\d{3})_", path.name))
        } | set(ids.values())
        wanted = {**dict.fromkeys(self._sources(), 1), **{run.key: run.row.rounds for run in self.queue()}}
        wanted = {key: count for key, count in wanted.items() if count}
        taken |= {ids[key] + n for key, count in wanted.items() if key in ids for n in range(count)}
        for key, count in wanted.items():
            if key not in ids:
                free = (n for n in range(self.protocol.first_id, 1001 - count) if not taken & set(range(n, n + count)))
                ids[key] = next(free, 0)
                taken |= set(range(ids[key], ids[key] + count))
                if not ids[key]:
                    raise UserError(
                        f"no dataset id from {self.protocol.first_id} to 999 is free in {self.machine.raw}; set a "
                        f"lower 'first_id' in the protocol {self.protocol.name}."
                    )
        return ids

    def prepare(self) -> Iterator[Step]:
        """Make each dataset, plan it, prepare labelled and unlabelled images."""
        p, processes = self.protocol, str(self.machine.processes)
        # planning hands nnUNet_n_proc_DA to torch as a number of threads, so it must not be 0
        variables = {"nnUNet_results": str(self.home / "results")}
        planning = {**variables, **({"nnUNet_n_proc_DA": "1"} if self.machine.device == "cpu" else {})}
        for key, (labeled, seed) in self._sources().items():
            number = str(self.ids[key])
            make = self._make(key, labeled, seed, number)
            yield replace(make, variables=variables, makes=self.dataset(labeled, seed))
            words = ["nnUNetv2_plan_and_preprocess", "-d", number, "-c", p.configuration, *p.planning]
            words += ["-overwrite_plans_name", p.plans]
            machine = ("-np", processes, "-npfp", processes)
            yield Step(f"plan_{number}", f"Plan and prepare {key}", tuple(words), machine, planning)
            if p.shrink:
                yield Step(f"shrink_{number}", f"Smaller network for {key}", self._shrink(number))
            if self._needs_unlabeled(key):
                words = ["nnUNetv2_ssl_preprocess", "-d", number, "-c", p.configuration, "-p", p.plans]
                title = f"Prepare the unlabelled images of {key}"
                yield Step(f"unlabeled_{number}", title, tuple(words), ("-np", processes), variables)

    def _make(self, key: str, labeled: Labeled, seed: int, number: str) -> Step:
        data = self.protocol.data
        if data.dataset is not None:
            words = ["nnUNetv2_ssl_split", "-d", str(data.dataset), "-o", number, "--labeled", str(labeled)]
            words += ["--val", data.validation] if data.validation is not None else []
            name = re.sub(r"\W+", "_", f"{self.protocol.name} {key}")
            words += ["--test", data.test, "--seed", str(seed if data.order_by_seed else 0), "--name", name]
            return Step(f"dataset_{number}", f"Make the dataset with {key}", tuple(words))
        script = self.machine.scripts / data.script
        options = [option.replace("{data}", str(self.machine.data)) for option in data.options]
        words = ["python", str(script), "--labeled", str(labeled), "-d", number]
        words += ["--seed", str(seed)] if data.order_by_seed else []
        machine = ("--data", str(self.machine.data), *options, "-np", str(self.machine.processes))
        return Step(f"dataset_{number}", f"Make the dataset with {key}", tuple(words), machine)

    def _shrink(self, number: str) -> tuple[str, ...]:
        """Plans small enough for a CPU; nnU-Net has no command for that."""
        file = self.machine.preprocessed / f"Dataset{int(number):03d}_*" / f"{self.protocol.plans}.json"
        s = self.protocol.shrink
        code = "import sys; from nnunet_ssl.demo.plans import shrink_plans; "
        code += f"shrink_plans(sys.argv[1], {self.protocol.configuration!r}, {list(s.features)}, "
        code += f"patch_size={list(s.patch_size)}, batch_size={s.batch_size})"
        return ("python", "-c", code, str(file))

    def _needs_unlabeled(self, key: str) -> bool:
        """Whether a row that learns from this dataset wants its unlabelled images."""
        from nnunet_ssl import trainers

        p = self.protocol
        return any(
            self.dataset_key(labeled if row.labeled is None else row.labeled, seed) == key
            for row in p.rows
            if any(getattr(trainers, stage.trainer).uses_unlabeled for stage in row.stages)
            for labeled in p.labeled
            for seed in p.seeds
        )

    # ------------------------------------------------------------------------------------------------ measuring

    def measure(self) -> Iterator[Step]:
        """Short trainings, each kind in turn, forwards and backwards: whatever drifts drifts for all."""
        p = self.protocol
        if all(budget.steps is not None for budget in p.budgets):
            return
        timed = self._to_be_timed()
        rows = [(row, number) for number in range(p.measure.rounds) for row in (timed if number % 2 == 0
                                                                                else timed[::-1])]  # fmt: skip
        for row, number in rows:
            folder = self._measure_folder(row, number)
            settings = {**self._settings(row, p.seeds[0], p.measure.iterations), "save_every": p.measure.epochs + 1}
            step = self._train(row, p.labeled[0], p.seeds[0], p.measure.epochs, folder, settings)
            yield Step(f"measure_{folder.name}", f"Time {row.name}, round {number + 1}", *step)

    def seconds_a_step(self) -> dict[str, float]:
        """Seconds of a step by row: those that the protocol gives, those that were kept, and those that were measured.

        Measured seconds are those of the fastest epoch: whatever else the machine does makes one longer, never shorter.
        """
        seconds = self._known_seconds()
        for row in self.protocol.rows:
            stages = [] if row.key in seconds else [self._seconds_of(stage) for stage in row.stages]
            if stages and None not in stages:
                seconds[row.key] = sum(stages) / len(stages)
        return seconds

    def _seconds_of(self, stage: Row) -> float | None:
        """Known of a row that is but this, or measured; None as long as it is neither."""
        p, known = self.protocol, self._known_seconds()
        for row in p.rows:
            if row.key in known and row.trainings == 1 and row.alike(stage):
                return known[row.key]
        timed = next(other for other in self._to_be_timed() if other.alike(stage))
        folders = [self._measure_folder(timed, number) for number in range(p.measure.rounds)]
        rounds = [epoch_seconds(fold) for folder in folders for fold in trainings(folder)]
        if [len(found) for found in rounds] != [p.measure.epochs] * p.measure.rounds:
            return None
        # the first epoch is warm-up: allocators, compilation, the choice of algorithms
        seconds = min(time for found in rounds for epoch, time in found.items() if epoch > 0) / p.measure.iterations
        if seconds == 0:
            raise UserError(
                f"the short runs of {timed.name} took no time that nnU-Net's log can show; set measure.iterations in "
                f"{p.name} above {p.measure.iterations} and take another -o."
            )
        return seconds

    def _to_be_timed(self) -> list[Row]:
        """The first stage of each kind whose seconds are not known."""
        p, known = self.protocol, self._known_seconds()
        plain = [row for row in p.rows if row.key in known and row.trainings == 1]
        timed: list[Row] = []
        for stage in (stage for row in p.rows if row.key not in known for stage in row.stages):
            if not any(stage.alike(other) for other in [*plain, *timed]):
                timed.append(stage)
        return timed

    def keep_seconds(self) -> None:
        """Write down the seconds a step, so that runs that are added later get their length from the same."""
        seconds = kept_seconds(self.home) | self.seconds_a_step()
        if seconds:
            write_json(str(self.home / SECONDS), seconds)

    def _known_seconds(self) -> dict[str, float]:
        """Of rows that need no measuring: given by the protocol, or kept; the mean of a row's trainings."""
        known = kept_seconds(self.home) | {
            row_key(name): value for name, value in self.protocol.measure.seconds.items()
        }
        return {row.key: known[row.key] for row in self.protocol.rows if row.key in known}

    def _measure_folder(self, row: Row, number: int) -> Path:
        p = self.protocol
        return self.home / "measure" / f"{row.key}_{p.labeled[0]}labeled_seed{p.seeds[0]}_{number}"

    # ------------------------------------------------------------------------------------------------ runs

    def runs(self, budget: Budget, labeled: Labeled) -> list[Run]:
        """The runs of a table, seed by seed."""
        return [self._run(row, labeled, seed, budget) for seed in self.protocol.seeds for row in self.protocol.rows]

    def tables(self) -> Iterator[tuple[Budget, Labeled, list[Run]]]:
        """Each table: a budget and a labelled set, with its runs."""
        for budget in self.protocol.budgets:
            for labeled in self.protocol.labeled:
                yield budget, labeled, self.runs(budget, labeled)

    def queue(self) -> list[Run]:
        """All runs once; a run may be in several tables."""
        return list({run.folder: run for _, _, runs in self.tables() for run in runs}.values())

    def _run(self, row: Row, labeled: Labeled, seed: int, budget: Budget) -> Run:
        p = self.protocol
        labeled = labeled if row.labeled is None else row.labeled
        name = f"{row.key}_{labeled}labeled_seed{seed}"
        iterations = self._iterations(row, budget, self.home / "runs" / budget.key / name)
        if p.equal_steps is not None and budget.steps is None:
            same = self._steps_of_an_epoch(row, p.equal_steps.steps)
            if budget.time_of == row.name or (iterations and abs(iterations - same) <= SAME_LENGTH * same):
                budget, iterations = p.equal_steps, same
        return Run(row, labeled, seed, budget, p.epochs, iterations, self.home / "runs" / budget.key / name)

    def _steps_of_an_epoch(self, row: Row, steps: int) -> int:
        """So many that all trainings of the row together have these steps."""
        return steps // self.protocol.epochs // row.trainings

    def _iterations(self, row: Row, budget: Budget, folder: Path) -> int | None:
        """Steps of an epoch. Epochs are the same for all, so that schedules and curves are."""
        p = self.protocol
        if budget.steps is not None:
            return self._steps_of_an_epoch(row, budget.steps)
        for file in (folder / "settings.json", folder / PRETRAINING):
            if file.is_file():  # a run that was started keeps its length, whatever is measured later
                name = "num_iterations_per_epoch"
                return read_json(file, "Restore it: a run that was begun keeps its length.", keys={name: int})[name]
        seconds = self.seconds_a_step()
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

    def steps_of(self, run: Run) -> Iterator[Step]:
        """Train; predict and evaluate the test cases at each point of the (last training's) curve."""
        p, m, key = self.protocol, self.machine, run.key
        settings = {**self._settings(run.row, run.seed, run.iterations), "save_every": max(1, p.curve_epochs[0])}
        settings["keep_epochs"] = list(p.curve_epochs)
        step = self._train(run.row, run.labeled, run.seed, p.epochs, run.folder, settings)
        if run.row.pretrained_by:
            *before, checkpoints = self._pretrain(run)
            yield Step(f"{key}/pretrain", f"Pretrain {run.title}", *before, checkpoints)
            step = ((*step[0], PRETRAINED, str(checkpoints / "checkpoint_final.pth")), *step[1:])
        yield Step(f"{key}/train", f"Train {run.title}", *step)
        dataset = self.dataset(run.labeled, run.seed)
        number = self.ids[self.dataset_key(run.labeled, run.seed)]
        variables = {name: value for name, value in step[2].items() if name != "nnUNet_ssl_config"}
        if again := run.row.self_training:
            words = ["nnUNetv2_ssl_pseudolabel", "-d", number, "-c", p.configuration, "-f", 0, "-p", p.plans]
            words += ["-tr", self._trainer(run.row), "-o", self.ids[run.key], "--rounds", again.rounds]
            words += ["--student", self._last_trainer(run.row)] if again.student else []
            words += again.options
            machine = ("-device", m.device, "-np", str(m.processes))
            yield Step(f"{key}/self_training", f"Self-training: {run.title}", tuple(map(str, words)), machine, step[2])
            number = self._last_dataset(run)
        for epoch in p.curve_epochs:
            words = ["nnUNetv2_predict", "-i", dataset / "imagesTs", "-o", self.predictions(run, epoch)]
            words += ["-d", number, "-c", p.configuration, "-f", 0, "-p", p.plans, "-tr", self._last_trainer(run.row)]
            words += ["-chk", f"checkpoint_epoch{epoch}.pth", *p.predict]
            machine = ("-device", m.device, *(("-npp", "0", "-nps", "0") if m.device == "cpu" else ()))
            title = f"Predict the test cases after epoch {epoch}: {run.title}"
            yield Step(f"{key}/predict_{epoch}", title, tuple(map(str, words)), machine, variables)
            # on the way there the leading metric is enough
            metrics = p.metrics if epoch == p.epochs else p.metrics[:1]
            words = [*self._evaluate(dataset, metrics), "-pred", self.predictions(run, epoch)]
            words += ["-o", self.summary(run, epoch).parent]
            title = f"Evaluate after epoch {epoch}: {run.title}"
            yield Step(f"{key}/evaluate_{epoch}", title, tuple(map(str, words)), ("-np", str(m.processes)))

    def compare(self) -> Iterator[tuple[list[Run], Step]]:
        """For each table and seed, the rows side by side; with the runs that have to be finished."""
        for budget, labeled, runs in self.tables():
            for seed in self.protocol.seeds:
                own = [run for run in runs if run.seed == seed]
                if len(own) < 2:
                    continue
                name = f"{budget.key}_{labeled}labeled_seed{seed}"
                words = [*self._evaluate(self.dataset(labeled, seed), self.protocol.metrics), "-pred"]
                words += [self.predictions(run, self.protocol.epochs) for run in own]
                words += ["--names", *(run.row.name for run in own), "-o", self.home / "compared" / name]
                title = f"Compare the rows: {labeled} labelled, seed {seed}, {budget.key}"
                words = tuple(map(str, words))
                yield own, Step(f"compare_{name}", title, words, ("-np", str(self.machine.processes)))

    def figures(self) -> Iterator[tuple[list[Run], Step]]:
        """Of the first budget and seed the rows that the protocol names, for each labelled set.

        They show the predictions of the last epoch that are evaluated; only probabilities are predicted anew.
        """
        p = self.protocol
        for labeled in p.labeled if p.figures else ():
            runs = {run.row.name: run for run in self.runs(p.budgets[0], labeled) if run.seed == p.seeds[0]}
            own = [runs[name] for name in p.figures]
            name = f"{p.budgets[0].key}_{labeled}labeled_seed{p.seeds[0]}"
            number = self.ids[self.dataset_key(labeled, p.seeds[0])]
            words = ["nnUNetv2_ssl_figures", "-d", number, "-f", 0, "-m", *(self.model(run) for run in own)]
            words += ["-pred", *(self.predictions(run, p.epochs) for run in own)]
            words += ["--names", *p.figures, "-o", self.home / "figures" / name]
            words += ["--disable_tta"] if "--disable_tta" in p.predict else []
            machine = ("-device", self.machine.device, "-np", str(self.machine.processes))
            title = f"Figures: {labeled} labelled, seed {p.seeds[0]}, {p.budgets[0].key}"
            variables = {"nnUNet_results": str(self.home / "results"), **self.training_variables}
            yield own, Step(f"figures_{name}", title, tuple(map(str, words)), machine, variables)

    # ------------------------------------------------------------------------------------------------ places

    def model(self, run: Run) -> Path:
        """nnU-Net's folder of the (last) trained model, as a pattern."""
        p, number = self.protocol, self._last_dataset(run)
        name = f"{self._last_trainer(run.row)}__{p.plans}__{p.configuration}"
        return run.folder / "results" / f"Dataset{number:03d}_*" / name

    def _last_dataset(self, run: Run) -> int:
        """The id of the one that its last training learns from."""
        source = self.ids[self.dataset_key(run.labeled, run.seed)]
        return self.ids[run.key] + run.row.rounds - 1 if run.row.rounds else source

    def predictions(self, run: Run, epoch: int) -> Path:
        """Predicted test cases after an epoch."""
        return run.folder / f"test_epoch{epoch}"

    def summary(self, run: Run, epoch: int) -> Path:
        """Their evaluation."""
        return run.folder / f"evaluated_epoch{epoch}" / "summary.json"

    # ------------------------------------------------------------------------------------------------ parts of commands

    def _trainer(self, row: Row) -> str:
        return f"{row.trainer}_{self.protocol.epochs}epochs"

    def _last_trainer(self, row: Row) -> str:
        return self._trainer(row.stages[-1])

    def _settings(self, row: Row, seed: int, iterations: int | None) -> dict[str, Any]:
        """What the run is told. Nothing is chosen by validation, so one step of it will do."""
        run = {"seed": seed, "num_iterations_per_epoch": iterations, "num_val_iterations_per_epoch": 1}
        return {**run, **self.protocol.settings, **row.settings}

    def _pretrain(self, run: Run) -> tuple[Any, ...]:
        """As ``_train``; beside the training that follows, with nothing of its settings but seed and length."""
        row = run.row.stages[0]
        settings = {**self._settings(row, run.seed, run.iterations), "save_every": run.epochs}
        return self._train(row, run.labeled, run.seed, run.epochs, run.folder, settings, PRETRAINING)

    def _train(
        self,
        row: Row,
        labeled: Labeled,
        seed: int,
        epochs: int,
        folder: Path,
        settings: Mapping[str, Any],
        settings_file: str = "settings.json",
    ) -> tuple[Any, ...]:
        """Words, machine, variables, settings and checkpoints of a training step."""
        p, file = self.protocol, folder / settings_file
        number, trainer = str(self.ids[self.dataset_key(labeled, seed)]), f"{row.trainer}_{epochs}epochs"
        words = ("nnUNetv2_train", number, p.configuration, "0", "-p", p.plans, "-tr", trainer)
        variables = {"nnUNet_results": str(folder / "results"), "nnUNet_ssl_config": str(file)}
        model = folder / "results" / f"Dataset{int(number):03d}_*" / f"{trainer}__{p.plans}__{p.configuration}"
        machine = ("-device", self.machine.device)
        return words, machine, {**variables, **self.training_variables}, (file, settings), model / "fold_0"

    def _evaluate(self, dataset: Path, metrics: tuple[str, ...]) -> list[Any]:
        """The command without predictions; the metrics in the order that the command knows."""
        words = ["nnUNetv2_ssl_evaluate", "-ref", dataset / "labelsTs", "-djfile", dataset / "dataset.json"]
        return [*words, "--metrics", *(name for name in METRICS if name in metrics), *self.protocol.evaluate]


def kept_seconds(home: Path) -> dict[str, float]:
    """Seconds a step by row's key that a benchmark has kept."""
    return read_numbers(home / SECONDS, "Restore it, or remove it to have seconds a step measured again.")


def read_numbers(file: Path, remedy: str) -> dict[str, Any]:
    """An object of numbers that a benchmark has kept; empty where there is none.

    Raises:
        UserError: the file is something else; ``remedy`` says what to do.
    """
    kept = read_json(file, remedy) if file.exists() else {}
    if wrong := [name for name, value in kept.items() if type(value) not in (int, float)]:
        raise UserError(f"{file} has {kept[wrong[0]]!r} under '{wrong[0]}', not a number. {remedy}")
    return kept


def trainings(folder: Path) -> list[Path]:
    """nnU-Net's folders of the trainings in the folder of a run; with self-training there are several."""
    return sorted(folder.glob("results/*/*/fold_0"))


def epoch_seconds(fold: Path) -> dict[int, float]:
    """Epoch -> seconds, from nnU-Net's training logs; of an epoch that was repeated, the last.

    Args:
        fold: nnU-Net's folder of a training.
    """
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
