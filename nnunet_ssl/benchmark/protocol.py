"""A protocol: which trainers are compared, on which data, with which budget. ``reading.py`` reads it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from nnunet_ssl.datasets import PUBLISHED
from nnunet_ssl.declared import Count, DatasetId, Part, Positive, Seed, Text, TwoOrMore, declared
from nnunet_ssl.evaluation.metrics import METRICS

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
    """A row that is trained again on its own predictions, by ``nnUNetv2_ssl_pseudolabel``, for a number of rounds."""

    rounds: Count = 1
    student: Text | None = None  # a trainer for these rounds, without epochs; None takes the row's
    options: Arguments = ()


def row_key(name: str) -> str:
    """A row's name as it stands in file names; names that differ in signs or case alone have the same."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_").lower()


@declared
class Row:
    """A row of the table."""

    name: Name  # in tables and, simplified, in file names
    trainer: Text  # class, without epochs
    settings: Settings = Field(default_factory=dict)  # of the method, in addition to those that all rows share
    labeled: Labeled | None = None  # another number for this row, for instance "all"; None takes the protocol's
    against: Text | None = None  # name of the row that it is compared with; None takes the first
    # a trainer whose training comes first; the row's starts with -pretrained_weights from it
    pretrained_by: Text | None = None
    self_training: SelfTraining | None = None  # what follows the training, if anything
    # minutes of work before the training, such as registering, known from elsewhere; they are taken off a budget in
    # time
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
    """Where the datasets with few labels come from: a published one, or a raw dataset that is split."""

    # published, options: of nnUNetv2_ssl_dataset: the dataset's name, and the command's further options --data,
    # --labeled and -d; {data} stands for the folder of the published data
    published: Literal[PUBLISHED] | None = None
    options: Arguments = ()
    # dataset, test, validation: of nnUNetv2_ssl_split: the labeled dataset, the file that lists the test cases, and the
    # validation cases
    dataset: Dataset | None = None
    test: Text | None = None
    validation: Validation | None = None
    order_by_seed: bool = False  # whether each seed has its own labeled cases


@declared
class Measure:
    """The short runs by which seconds per step are measured: each row in turn, forwards and backwards.

    An epoch costs more than its steps (0.1 to 0.3 s on a CPU), which short epochs would count as the steps' own.
    """

    epochs: TwoOrMore = 3  # the first is warm-up
    iterations: Count = 100
    rounds: Count = 2
    # of a step by row's name, where they are known from elsewhere: such a row is not measured, and a budget in time
    # gives it the same steps on every machine
    seconds: Annotated[
        dict[str, Positive], Field(description="an object of rows and their seconds per step, numbers above 0")
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
        tuple[Count, ...], Field(min_length=3, description="a list of channels, one per stage, three or more")
    ]
    patch_size: Annotated[tuple[Count, ...], Field(min_length=2, description="a list of voxels, one per axis")]
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
