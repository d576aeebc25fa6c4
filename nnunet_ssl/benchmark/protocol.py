"""A protocol: which trainers are compared, on which data, with which budget. A JSON file, read and checked here."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from nnunet_ssl.datasets import PUBLISHED
from nnunet_ssl.declared import (
    Count,
    DatasetId,
    Part,
    Positive,
    Seed,
    Text,
    TwoOrMore,
    build,
    declared,
)
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.metrics import METRICS
from nnunet_ssl.files import read_json

SHIPPED = Path(__file__).parent / "protocols"
OURS = ("seed", "num_iterations_per_epoch", "save_every", "keep_epochs")  # settings that the benchmark makes itself

Word = Annotated[str, Field(pattern=r"^[\w-]+$", description="letters, digits, - and _")]
Plans = Annotated[str, Field(pattern=r"^[\w.-]+$", description="letters, digits, -, _ and .")]
Name = Annotated[str, Field(pattern=r"^\w[\w +.,()%-]*$", description="a name of letters, digits, spaces and +-_.,()%")]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Labeled = Annotated[
    Literal["all"] | Count | Fraction, Field(description='a number of cases, a fraction below 1, or "all"')
]
Dataset = Annotated[Text | DatasetId, Field(description="the name or id of a dataset")]
Validation = Annotated[Text | Count | Fraction, Field(description="a number, a fraction or a file")]
Arguments = Annotated[
    tuple[str | int | float, ...],
    Field(description="a list of texts and numbers"),
    AfterValidator(lambda words: tuple(map(str, words))),
]
Settings = Annotated[dict[str, Any], Field(description="an object of settings")]


@declared
class SelfTraining:
    """A row that is trained again on its own predictions, by ``nnUNetv2_ssl_pseudolabel``, so many rounds long.

    Attributes:
        student: a trainer for these rounds, without epochs; None takes the row's.
    """

    rounds: Count = 1
    student: Text | None = None
    options: Arguments = ()


def row_key(name: str) -> str:
    """A row's name as it stands in file names; names that differ in signs or case alone have the same."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_").lower()


@declared
class Row:
    """A row of the table.

    Attributes:
        name: in tables and, simplified, in file names.
        trainer: class, without epochs.
        settings: of the method, beside those that all rows share.
        labeled: a number of its own for this row, for instance "all"; None takes the protocol's.
        against: name of the row that it is compared with; None takes the first.
        pretrained_by: a trainer whose training comes first; the row's starts with ``-pretrained_weights`` from it.
        self_training: what follows the training, if anything.
        offline: minutes of work before the training, such as registering, known from elsewhere; they are taken off a
            budget in time.
    """

    name: Name
    trainer: Text
    settings: Settings = Field(default_factory=dict)
    labeled: Labeled | None = None
    against: Text | None = None
    pretrained_by: Text | None = None
    self_training: SelfTraining | None = None
    offline: Positive | None = None

    @property
    def key(self) -> str:
        """In file names."""
        return row_key(self.name)

    @property
    def stages(self) -> tuple[Row, ...]:
        """Its trainings, one after the other, each as a row of one. They share the budget, with the same steps each."""
        own = student = replace(self, pretrained_by=None, self_training=None)
        before = []
        if self.pretrained_by is not None:
            before = [replace(own, name=f"{self.name}, pretraining", trainer=self.pretrained_by, settings={})]
        if self.self_training is not None and self.self_training.student is not None:
            student = replace(own, name=f"{self.name}, student", trainer=self.self_training.student)
        return (*before, own, *[student] * self.rounds)

    def alike(self, other: Row) -> bool:
        """Whether a step of these stages is the same computation, so that it takes the same time."""
        return (self.trainer, self.settings) == (other.trainer, other.settings)

    @property
    def rounds(self) -> int:
        """Of self-training."""
        return 0 if self.self_training is None else self.self_training.rounds

    @property
    def trainings(self) -> int:
        """How many stages it has."""
        return len(self.stages)


@declared
class Budget:
    """How long each row trains: by steps, by minutes, or by the minutes that another row takes for its steps."""

    steps: Count | None = None
    minutes: Positive | None = None
    time_of: Text | None = None

    @property
    def key(self) -> str:
        """In file names."""
        if self.steps is not None:
            return f"steps{self.steps}"
        return f"minutes{self.minutes:g}" if self.minutes is not None else f"time_of_{row_key(self.time_of)}"


@declared
class Data:
    """Where the datasets with few labels come from: a published one, or a raw dataset that is split.

    Attributes:
        published, options: of ``nnUNetv2_ssl_dataset``: the dataset's name, and what the command is called with besides
            ``--data``, ``--labeled`` and ``-d``; ``{data}`` stands for the folder of the published data.
        dataset, test, validation: of ``nnUNetv2_ssl_split``: the labelled dataset, the file that lists the test cases,
            and the validation cases.
        order_by_seed: whether each seed has labelled cases of its own.
    """

    published: Literal[PUBLISHED] | None = None
    options: Arguments = ()
    dataset: Dataset | None = None
    test: Text | None = None
    validation: Validation | None = None
    order_by_seed: bool = False


@declared
class Measure:
    """The short runs by which seconds a step are measured: each row in turn, forwards and backwards.

    An epoch costs more than its steps (0.1 to 0.3 s on a CPU), which short epochs would count as the steps' own.

    Attributes:
        seconds: of a step by row's name, where they are known from elsewhere: such a row is not measured, and a budget
            in time gives it the same steps on every machine.
    """

    epochs: TwoOrMore = 3  # the first is warm-up
    iterations: Count = 100
    rounds: Count = 2
    seconds: Annotated[
        dict[str, Positive], Field(description="an object of rows and their seconds a step, numbers above 0")
    ] = Field(default_factory=dict)


@declared
class Gap:
    """The two rows between which other rows are placed: what share of the way from one to the other they go."""

    lower: Text
    upper: Text


@declared
class Shrink:
    """A smaller network; with two stages nnU-Net's deep supervision has one output, to which it gives the weight 0."""

    features: Annotated[
        tuple[Count, ...], Field(min_length=3, description="a list of channels, one a stage, of three or more")
    ]
    patch_size: Annotated[tuple[Count, ...], Field(min_length=2, description="a list of voxels, one an axis")]
    batch_size: Count = 2


@declared
class Protocol:
    """What the file says, with defaults filled in; see ``docs/benchmark.md``."""

    name: Word
    about: str = ""
    data: Data
    first_id: DatasetId
    labeled: Annotated[
        tuple[Labeled, ...],
        Field(min_length=1, description='a list of numbers of cases, fractions below 1, or "all"'),
    ]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, description="a list of whole numbers from 0 and below 2^32")]
    configuration: Word = "3d_fullres"
    planning: Arguments = ()
    plans: Plans = "nnUNetPlans"
    shrink: Shrink | None = None
    rows: Annotated[tuple[Row, ...], Field(min_length=1, description="a list of objects")]
    epochs: Count
    budgets: Annotated[tuple[Budget, ...], Field(min_length=1, description="a list of objects")]
    curve: Annotated[
        tuple[Part, ...], Field(min_length=1, description="a list of shares of the training, from 0 to 1")
    ] = (1.0,)
    settings: Settings = Field(default_factory=dict)
    predict: Arguments = ()
    metrics: Annotated[
        tuple[Literal[tuple(METRICS)], ...], Field(min_length=1, description=f"a list of metrics: {', '.join(METRICS)}")
    ] = ("dice",)
    evaluate: Arguments = ()
    measure: Measure = Field(default_factory=Measure)
    gap: Gap | None = None
    figures: Annotated[tuple[str, ...], Field(description="a list of names of rows")] = ()

    @property
    def curve_epochs(self) -> tuple[int, ...]:
        """Epochs after which the test cases are predicted."""
        return tuple(round(share * self.epochs) for share in self.curve)

    @property
    def equal_steps(self) -> Budget | None:
        """The first budget in steps, which ``time_of`` refers to."""
        return next((budget for budget in self.budgets if budget.steps is not None), None)

    def row(self, name: str) -> Row:
        """The row of this name."""
        return next(row for row in self.rows if row.name == name)

    def against(self, row: Row) -> Row:
        """The row that ``row`` is compared with."""
        return self.rows[0] if row.against is None else self.row(row.against)


def shipped() -> dict[str, Path]:
    """The protocols that come with the package, by name."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.json"))}


def load_json(which: str) -> tuple[dict[str, Any], Path]:
    """A protocol as it stands in its file.

    Args:
        which: a file, or the name of a shipped protocol.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    file = Path(which)
    if not file.is_file():
        file = shipped().get(which.removesuffix(".json"), file)
    if not file.is_file():
        raise UserError(f"{which} does not exist; name a JSON file, or one of {', '.join(shipped())}.")
    return read_json(file, "Write one JSON object, as docs/benchmark.md shows."), file


def read_protocol(which: str) -> Protocol:
    """Read and check a protocol.

    Args:
        which: a file, or the name of a shipped protocol.

    Raises:
        UserError: names file, field and remedy of the first thing that is wrong.
    """
    given, file = load_json(which)
    protocol = build(Protocol, given, str(file), "a field here")
    for name in ("labeled", "seeds", "curve", "metrics", "figures"):
        values = list(getattr(protocol, name))
        if len(set(values)) < len(values):
            raise UserError(f"{file} names something twice in '{name}': {values}. Remove one.")
    protocol = replace(protocol, data=_data(protocol.data, file))
    _check_rows(protocol, file)
    _check_budgets(protocol, file)
    _check_settings(protocol, file)
    return protocol


def _data(data: Data, file: Path) -> Data:
    """Check what belongs together, and find the files beside the protocol."""
    if (data.published is None) == (data.dataset is None):
        raise UserError(f"{file}, data, needs either 'published' or 'dataset': one to make, or one to split.")
    if data.dataset is None:
        if data.test or data.validation:
            raise UserError(f"{file}, data, has 'test' or 'validation', which are for 'dataset'; use 'options'.")
        return data
    if data.options:
        raise UserError(f"{file}, data, has 'options', which are for 'published'; remove them.")
    if data.test is None:
        raise UserError(f"{file}, data, lacks 'test'; give a file that lists the test cases, one a line.")
    test = (file.parent / data.test).resolve()
    if not test.is_file():
        raise UserError(f"{file}, data, sets 'test' to {data.test!r}, but {test} does not exist.")
    validation = data.validation
    if isinstance(validation, str) and (file.parent / validation).is_file():
        validation = (file.parent / validation).resolve()
    return replace(data, test=str(test), validation=None if validation is None else str(validation))


def _check_rows(protocol: Protocol, file: Path) -> None:
    from nnunet_ssl import trainers
    from nnunet_ssl.trainers import TRAINERS

    names = [row.name for row in protocol.rows]
    keys = [row.key for row in protocol.rows]
    for number, row in enumerate(protocol.rows):
        where = f"{file}, rows[{number}],"
        if keys.index(row.key) < number:
            raise UserError(f"{where} is named {row.name!r}, as another row is (but for signs); rename one.")
        student = row.self_training.student if row.self_training else None
        for field, trainer in (("trainer", row.trainer), ("pretrained_by", row.pretrained_by), ("student", student)):
            if trainer is None:
                continue
            if trainer not in TRAINERS:
                near = difflib.get_close_matches(trainer, TRAINERS, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise UserError(
                    f"{where} sets '{field}' to {trainer!r}; {hint}The trainers are those of nnUNetv2_ssl_trainers, "
                    "without _<N>epochs."
                )
            if field != "pretrained_by" and issubclass(getattr(trainers, trainer), trainers.nnUNetTrainerMAE):
                raise UserError(
                    f"{where} sets '{field}' to {trainer!r}, which does not segment; set 'pretrained_by' to it, and "
                    "'trainer' to one that starts from its weights."
                )
        if row.pretrained_by == row.trainer:
            raise UserError(f"{where} sets 'pretrained_by' to its own trainer; leave it out, or take another.")
        if row.pretrained_by and issubclass(getattr(trainers, row.trainer), trainers.nnUNetTrainerSASNet):
            raise UserError(
                f"{where} sets 'pretrained_by', but nnU-Net refuses weights without the second decoder of "
                f"{row.trainer}; leave it out."
            )
        if row.against is not None and row.against not in names:
            raise UserError(f"{where} sets 'against' to {row.against!r}; the rows are {', '.join(names)}.")
    for name in protocol.figures:
        if name not in names:
            raise UserError(f"{file} sets 'figures' to {list(protocol.figures)}; the rows are {', '.join(names)}.")
    for name in protocol.measure.seconds:
        if name not in names:
            raise UserError(f"{file}, measure, gives 'seconds' of {name!r}; the rows are {', '.join(names)}.")
    for name in (protocol.gap.lower, protocol.gap.upper) if protocol.gap else ():
        if name not in names:
            raise UserError(f"{file}, gap, names the row {name!r}; the rows are {', '.join(names)}.")
    if protocol.data.dataset is not None and "all" in [*protocol.labeled, *(row.labeled for row in protocol.rows)]:
        raise UserError(f"{file} sets 'labeled' to \"all\"; for a dataset that is split, give the number of cases.")


def _check_budgets(protocol: Protocol, file: Path) -> None:
    for number, budget in enumerate(protocol.budgets):
        where = f"{file}, budgets[{number}],"
        if [budget.steps, budget.minutes, budget.time_of].count(None) != 2:
            raise UserError(f"{where} needs one of 'steps', 'minutes' and 'time_of'.")
        if budget.key in [other.key for other in protocol.budgets[:number]]:
            raise UserError(f"{where} is there twice; remove one.")
        for row in protocol.rows:
            if budget.minutes is not None and budget.minutes <= (row.offline or 0):
                raise UserError(
                    f"{where} sets 'minutes' to {budget.minutes:g}, of which the {row.offline:g} 'offline' minutes of "
                    f"{row.name} leave nothing to train in; take more."
                )
            unit = protocol.epochs * row.trainings
            if budget.steps is not None and budget.steps % unit:
                why = f"epochs ({protocol.epochs})"
                why += f" x trainings of {row.name} ({row.trainings})" if row.trainings > 1 else ""
                raise UserError(f"{where} sets 'steps' to {budget.steps}; take a multiple of {why}, {unit}.")
        if budget.time_of is not None:
            names = [row.name for row in protocol.rows]
            if budget.time_of not in names:
                raise UserError(f"{where} sets 'time_of' to {budget.time_of!r}; the rows are {', '.join(names)}.")
            if protocol.row(budget.time_of).offline:
                raise UserError(f"{where} sets 'time_of' to a row with 'offline' minutes; give 'minutes' instead.")
            if protocol.equal_steps is None:
                raise UserError(f"{where} sets 'time_of', which needs a budget in 'steps' besides; add one.")
    epochs = protocol.curve_epochs
    if epochs[-1] != protocol.epochs or list(epochs) != sorted(set(epochs)) or epochs[0] < 1:
        raise UserError(
            f"{file} sets 'curve' to {list(protocol.curve)}, which of {protocol.epochs} epochs are {list(epochs)}; "
            "take growing shares that end with 1 and are epochs of their own."
        )


def _check_settings(protocol: Protocol, file: Path) -> None:
    from nnunet_ssl import trainers
    from nnunet_ssl.trainers.settings import settings_from_dict

    for name in OURS:
        if any(name in settings for settings in (protocol.settings, *(row.settings for row in protocol.rows))):
            raise UserError(f"{file} sets '{name}' among the settings; seeds, epochs, budgets and curve say that.")
    for number, row in enumerate(protocol.rows):
        where = f"{file}, rows[{number}] ({row.name}),"
        for stage in row.stages:
            settings = {**protocol.settings, **stage.settings}
            settings_from_dict(getattr(trainers, stage.trainer).Settings, settings, where)
