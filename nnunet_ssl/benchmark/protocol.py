"""A protocol: which trainers are compared, on which data, with which budget. A JSON file, read and checked here."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.metrics import METRICS

SHIPPED = Path(__file__).parent / "protocols"
OURS = ("seed", "num_iterations_per_epoch", "save_every", "keep_epochs")  # settings that the benchmark makes itself

Labeled = int | float | str  # a number of cases, a fraction of them, or "all"


@dataclass(frozen=True)
class SelfTraining:
    """A row that is trained again on its own predictions, by ``nnUNetv2_ssl_pseudolabel``, so many rounds long."""

    rounds: int = 1
    options: tuple[str, ...] = ()


def row_key(name: str) -> str:
    """A row's name as it stands in file names; names that differ in signs or case alone have the same."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_").lower()


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: in tables and, simplified, in file names.
        trainer: class, without epochs.
        settings: of the method, beside those that all rows share.
        labeled: a number of its own for this row, for instance "all"; None takes the protocol's.
        against: name of the row that it is compared with; None takes the first.
        self_training: what follows the training, if anything.
    """

    name: str
    trainer: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    labeled: Labeled | None = None
    against: str | None = None
    self_training: SelfTraining | None = None

    @property
    def key(self) -> str:
        """In file names."""
        return row_key(self.name)

    def alike(self, other: Row) -> bool:
        """Whether a step of both is the same computation, so that it takes the same time."""
        return (self.trainer, self.settings) == (other.trainer, other.settings)

    @property
    def trainings(self) -> int:
        """How many trainings share its budget."""
        return 1 if self.self_training is None else 1 + self.self_training.rounds


@dataclass(frozen=True)
class Budget:
    """How long each row trains: by steps, by minutes, or by the minutes that another row takes for its steps."""

    steps: int | None = None
    minutes: float | None = None
    time_of: str | None = None

    @property
    def key(self) -> str:
        """In file names."""
        if self.steps is not None:
            return f"steps{self.steps}"
        return f"minutes{self.minutes:g}" if self.minutes is not None else f"time_of_{row_key(self.time_of)}"


@dataclass(frozen=True)
class Data:
    """Where the datasets with few labels come from: a script of ``scripts/``, or a raw dataset that is split.

    Attributes:
        script, options: ``prepare_*.py`` and what it is called with besides ``--data``, ``--labeled`` and ``-d``;
            ``{data}`` stands for the folder of the published data.
        dataset, test, validation: of ``nnUNetv2_ssl_split``: the labelled dataset, the file that lists the test cases,
            and the validation cases.
        order_by_seed: whether each seed has labelled cases of its own.
    """

    script: str | None = None
    options: tuple[str, ...] = ()
    dataset: int | str | None = None
    test: str | None = None
    validation: str | None = None
    order_by_seed: bool = False


@dataclass(frozen=True)
class Measure:
    """The short runs by which seconds a step are measured: each row in turn, forwards and backwards.

    An epoch costs more than its steps (0.1 to 0.3 s on a CPU), which short epochs would count as the steps' own.

    Attributes:
        seconds: of a step by row's name, where they are known from elsewhere: such a row is not measured, and a budget
            in time gives it the same steps on every machine.
    """

    epochs: int = 3
    iterations: int = 100
    rounds: int = 2
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """What the file says, with defaults filled in; see ``docs/benchmark.md``."""

    name: str
    about: str
    data: Data
    first_id: int
    labeled: tuple[Labeled, ...]
    seeds: tuple[int, ...]
    configuration: str
    planning: tuple[str, ...]
    plans: str
    shrink: Mapping[str, Any]
    rows: tuple[Row, ...]
    epochs: int
    budgets: tuple[Budget, ...]
    curve: tuple[float, ...]
    settings: Mapping[str, Any]
    predict: tuple[str, ...]
    metrics: tuple[str, ...]
    evaluate: tuple[str, ...]
    measure: Measure
    figures: tuple[str, ...]

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


# ----------------------------------------------------------------------------------------------------------- checking


class Kind(NamedTuple):
    """What a value must be, in words, and the test of it."""

    words: str
    test: Callable[[Any], bool]


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _is_labeled(value: Any) -> bool:
    return value == "all" or _is_whole(value, 1) or (isinstance(value, float) and 0 < value < 1)


def _list_of(words: str, test: Callable[[Any], bool], least: int = 1) -> Kind:
    return Kind(f"a list of {words}", lambda v: isinstance(v, list) and len(v) >= least and all(map(test, v)))


TEXT = Kind("a text", lambda v: isinstance(v, str) and v.strip() != "")
WORD = Kind("letters, digits, - and _", lambda v: isinstance(v, str) and re.fullmatch(r"[\w-]+", v) is not None)
NAME = Kind("a name of letters, digits, spaces and +-_.,()%", lambda v: isinstance(v, str)
            and re.fullmatch(r"\w[\w +.,()%-]*", v) is not None)  # fmt: skip
COUNT = Kind("a whole number from 1", lambda v: _is_whole(v, 1))
POSITIVE = Kind("a number above 0", _is_number)
YES_OR_NO = Kind("true or false", lambda v: isinstance(v, bool))
OBJECT = Kind("an object", lambda v: isinstance(v, dict))
LABELED = Kind('a number of cases, a fraction below 1, or "all"', _is_labeled)
ARGUMENTS = _list_of("texts and numbers", lambda v: isinstance(v, (str, int, float)) and not isinstance(v, bool), 0)
REQUIRED = object()

FIELDS: dict[str, tuple[Kind, Any]] = {
    "name": (WORD, REQUIRED),
    "about": (TEXT, ""),
    "data": (OBJECT, REQUIRED),
    "first_id": (Kind("a dataset id from 1 to 999", lambda v: _is_whole(v, 1) and v <= 999), REQUIRED),
    "labeled": (_list_of('numbers of cases, fractions below 1, or "all"', _is_labeled), REQUIRED),
    "seeds": (_list_of("whole numbers from 0", lambda v: _is_whole(v, 0)), REQUIRED),
    "configuration": (WORD, "3d_fullres"),
    "planning": (ARGUMENTS, []),
    "plans": (Kind("letters, digits, -, _ and .", lambda v: isinstance(v, str)
                   and re.fullmatch(r"[\w.-]+", v) is not None), "nnUNetPlans"),
    "shrink": (OBJECT, {}),
    "rows": (_list_of("objects", lambda v: isinstance(v, dict)), REQUIRED),
    "epochs": (COUNT, REQUIRED),
    "budgets": (_list_of("objects", lambda v: isinstance(v, dict)), REQUIRED),
    "curve": (_list_of("shares of the training, from 0 to 1", lambda v: _is_number(v) and v <= 1), [1]),
    "settings": (OBJECT, {}),
    "predict": (ARGUMENTS, []),
    "metrics": (_list_of(f"metrics: {', '.join(METRICS)}", lambda v: v in METRICS), ["dice"]),
    "evaluate": (ARGUMENTS, []),
    "measure": (OBJECT, {}),
    "figures": (_list_of("names of rows", lambda v: isinstance(v, str), 0), []),
}  # fmt: skip
DATA_FIELDS: dict[str, tuple[Kind, Any]] = {
    "script": (Kind("the name of a script, prepare_<dataset>.py", lambda v: isinstance(v, str)
                    and re.fullmatch(r"\w+\.py", v) is not None), None),
    "options": (ARGUMENTS, []),
    "dataset": (Kind("the name or id of a dataset", lambda v: TEXT.test(v) or _is_whole(v, 1)), None),
    "test": (TEXT, None),
    "validation": (Kind("a number, a fraction or a file", lambda v: TEXT.test(v) or _is_number(v)), None),
    "order_by_seed": (YES_OR_NO, False),
}  # fmt: skip
ROW_FIELDS: dict[str, tuple[Kind, Any]] = {
    "name": (NAME, REQUIRED),
    "trainer": (TEXT, REQUIRED),
    "settings": (OBJECT, {}),
    "labeled": (LABELED, None),
    "against": (TEXT, None),
    "self_training": (OBJECT, None),
}
SELF_TRAINING_FIELDS: dict[str, tuple[Kind, Any]] = {"rounds": (COUNT, 1), "options": (ARGUMENTS, [])}
BUDGET_FIELDS: dict[str, tuple[Kind, Any]] = {
    "steps": (COUNT, None),
    "minutes": (POSITIVE, None),
    "time_of": (TEXT, None),
}
SHRINK_FIELDS: dict[str, tuple[Kind, Any]] = {
    # with two stages nnU-Net's deep supervision has one output, to which it gives the weight 0
    "features": (_list_of("channels, one a stage, of three or more", lambda v: _is_whole(v, 1), 3), REQUIRED),
    "patch_size": (_list_of("voxels, one an axis", lambda v: _is_whole(v, 1), 2), REQUIRED),
    "batch_size": (COUNT, 2),
}
MEASURE_FIELDS: dict[str, tuple[Kind, Any]] = {
    "epochs": (Kind("a whole number from 2", lambda v: _is_whole(v, 2)), Measure.epochs),  # the first is warm-up
    "iterations": (COUNT, Measure.iterations),
    "rounds": (COUNT, Measure.rounds),
    "seconds": (Kind("an object of rows and their seconds a step, numbers above 0", lambda v: isinstance(v, dict)
                     and all(map(_is_number, v.values()))), {}),
}  # fmt: skip


def checked(given: Any, fields: Mapping[str, tuple[Kind, Any]], where: str) -> dict[str, Any]:
    """The fields of an object, defaults filled in.

    Args:
        given: what the file says.
        fields: name -> what it must be, and its default.
        where: file and place in it, for messages.

    Raises:
        UserError: ``given`` is no object, or a field is unknown, missing or of a wrong kind.
    """
    if not isinstance(given, dict):
        raise UserError(f"{where} holds {given!r}; write a JSON object.")
    for name in given:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            remedy = f"did you mean '{near[0]}'?" if near else f"the fields are {', '.join(fields)}."
            raise UserError(f"{where} has '{name}', which means nothing here; {remedy}")
    values = {}
    for name, (kind, default) in fields.items():
        value = given.get(name, default)
        if value is REQUIRED:
            raise UserError(f"{where} lacks '{name}'; give {kind.words}.")
        if name in given and not kind.test(value):
            raise UserError(f"{where} sets '{name}' to {value!r}; it must be {kind.words}.")
        values[name] = value
    return values


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
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); correct the file.") from None
    if not isinstance(given, dict):
        raise UserError(f"{file} holds {type(given).__name__}; write one JSON object.")
    return given, file


def read_protocol(which: str) -> Protocol:
    """Read and check a protocol.

    Args:
        which: a file, or the name of a shipped protocol.

    Raises:
        UserError: names file, field and remedy of the first thing that is wrong.
    """
    given, file = load_json(which)
    values = checked(given, FIELDS, str(file))
    values["data"] = _data(values["data"], file)
    values["rows"] = tuple(_row(row, f"{file}, rows[{number}],") for number, row in enumerate(values["rows"]))
    values["budgets"] = tuple(
        Budget(**checked(budget, BUDGET_FIELDS, f"{file}, budgets[{number}],"))
        for number, budget in enumerate(values["budgets"])
    )
    values["measure"] = Measure(**checked(values["measure"], MEASURE_FIELDS, f"{file}, measure,"))
    if values["shrink"]:
        values["shrink"] = checked(values["shrink"], SHRINK_FIELDS, f"{file}, shrink,")
    for name in ("planning", "predict", "evaluate"):
        values[name] = tuple(map(str, values[name]))
    for name in ("labeled", "seeds", "curve", "metrics", "figures"):
        values[name] = tuple(values[name])
        if len(set(values[name])) < len(values[name]):
            raise UserError(f"{file} names something twice in '{name}': {list(values[name])}. Remove one.")
    protocol = Protocol(**values)
    _check_rows(protocol, file)
    _check_budgets(protocol, file)
    _check_settings(protocol, file)
    return protocol


def _data(given: dict[str, Any], file: Path) -> Data:
    values = checked(given, DATA_FIELDS, f"{file}, data,")
    if (values["script"] is None) == (values["dataset"] is None):
        raise UserError(f"{file}, data, needs either 'script' or 'dataset': a script that makes it, or one to split.")
    if values["dataset"] is not None:
        if values["options"]:
            raise UserError(f"{file}, data, has 'options', which are for 'script'; remove them.")
        if values["test"] is None:
            raise UserError(f"{file}, data, lacks 'test'; give a file that lists the test cases, one a line.")
        values["test"] = str((file.parent / values["test"]).resolve())
        if not Path(values["test"]).is_file():
            raise UserError(f"{file}, data, sets 'test' to {given['test']!r}, but {values['test']} does not exist.")
        validation = values["validation"]
        if isinstance(validation, str) and (file.parent / validation).is_file():
            validation = (file.parent / validation).resolve()
        values["validation"] = None if validation is None else str(validation)
    elif values["test"] or values["validation"]:
        raise UserError(f"{file}, data, has 'test' or 'validation', which are for 'dataset'; use the script's options.")
    values["options"] = tuple(map(str, values["options"]))
    return Data(**values)


def _row(given: Any, where: str) -> Row:
    values = checked(given, ROW_FIELDS, where)
    if values["self_training"] is not None:
        rounds = checked(values["self_training"], SELF_TRAINING_FIELDS, f"{where} self_training,")
        values["self_training"] = SelfTraining(rounds["rounds"], tuple(map(str, rounds["options"])))
    return Row(**values)


def _check_rows(protocol: Protocol, file: Path) -> None:
    from nnunet_ssl.trainers import TRAINERS

    names = [row.name for row in protocol.rows]
    keys = [row.key for row in protocol.rows]
    for number, row in enumerate(protocol.rows):
        where = f"{file}, rows[{number}],"
        if keys.index(row.key) < number:
            raise UserError(f"{where} is named {row.name!r}, as another row is (but for signs); rename one.")
        if row.trainer not in TRAINERS:
            near = difflib.get_close_matches(row.trainer, TRAINERS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"{where} sets 'trainer' to {row.trainer!r}; {hint}The trainers are those of nnUNetv2_ssl_trainers, "
                "without _<N>epochs."
            )
        if row.against is not None and row.against not in names:
            raise UserError(f"{where} sets 'against' to {row.against!r}; the rows are {', '.join(names)}.")
    for name in protocol.figures:
        if name not in names:
            raise UserError(f"{file} sets 'figures' to {list(protocol.figures)}; the rows are {', '.join(names)}.")
    for name in protocol.measure.seconds:
        if name not in names:
            raise UserError(f"{file}, measure, gives 'seconds' of {name!r}; the rows are {', '.join(names)}.")
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
            unit = protocol.epochs * row.trainings
            if budget.steps is not None and budget.steps % unit:
                why = f"epochs ({protocol.epochs})"
                why += f" x trainings of {row.name} ({row.trainings})" if row.trainings > 1 else ""
                raise UserError(f"{where} sets 'steps' to {budget.steps}; take a multiple of {why}, {unit}.")
        if budget.time_of is not None:
            names = [row.name for row in protocol.rows]
            if budget.time_of not in names:
                raise UserError(f"{where} sets 'time_of' to {budget.time_of!r}; the rows are {', '.join(names)}.")
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
        settings = {**protocol.settings, **row.settings}
        settings_from_dict(getattr(trainers, row.trainer).Settings, settings, f"{file}, rows[{number}] ({row.name}),")
