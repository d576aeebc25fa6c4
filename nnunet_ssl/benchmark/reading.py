"""Reading a protocol: the file, and the checks of what its fields say together."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunet_ssl.benchmark.protocol import Data, Protocol
from nnunet_ssl.datasets import ORDERED
from nnunet_ssl.declared import build
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json

SHIPPED = Path(__file__).parent / "protocols"
OURS = ("seed", "num_iterations_per_epoch", "save_every", "keep_epochs")  # settings that the benchmark makes itself
OF_DATA = {"dataset": ("test", "validation"), "published": ("options",)}  # what belongs to each kind of data


def shipped() -> dict[str, Path]:
    """The protocols that come with the package, by name."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.json"))}


def load_json(which: str) -> tuple[dict[str, Any], Path]:
    """A protocol as it stands in its file: the one named, or one of this name that comes with the package.

    Raises:
        UserError: there is none, or it is not a JSON object.
    """
    file = Path(which)
    if not file.is_file():
        file = shipped().get(which.removesuffix(".json"), file)
    if not file.is_file():
        raise UserError(f"{which} does not exist; name a JSON file, or one of {', '.join(shipped())}.")
    return read_json(file, "Write one JSON object, as docs/benchmark.md shows."), file


def read_protocol(which: str) -> Protocol:
    """Read and check a protocol, found as by :func:`load_json`.

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
    """Check what belongs together, and find the files next to the protocol."""
    if (data.published is None) == (data.dataset is None):
        raise UserError(f"{file}, data, needs either 'published' or 'dataset': one to make, or one to split.")
    other = "dataset" if data.dataset is None else "published"
    for name in OF_DATA[other]:
        if getattr(data, name):
            raise UserError(f"{file}, data, has {name!r}, which is for {other!r}; remove it.")
    if data.dataset is None:
        if data.order_by_seed and data.published not in ORDERED:
            raise UserError(
                f"{file}, data, sets 'order_by_seed', but {data.published} has one published list: remove it."
            )
        return data
    if data.test is None:
        raise UserError(f"{file}, data, lacks 'test'; give a file that lists the test cases, one per line.")
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
        if row.self_training and any(option.startswith("--f") for option in row.self_training.options):  # or --fin=9
            raise UserError(
                f"{where} gives 'self_training' the option --finish, but the model that is tested is that of fold 0, "
                "not the finished one of fold 1; remove it."
            )
        student = row.self_training.student if row.self_training else None
        for field, trainer in (("trainer", row.trainer), ("pretrained_by", row.pretrained_by), ("student", student)):
            if trainer is None:
                continue
            if trainer not in TRAINERS:
                near = difflib.get_close_matches(trainer, TRAINERS, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise UserError(
                    f"{where} sets '{field}' to {trainer!r}; {hint}nnUNetv2_ssl_trainers lists the trainers, "
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
    named = [(f"rows[{number}], sets 'against' to", row.against) for number, row in enumerate(protocol.rows)]
    named += [(f"budgets[{number}], sets 'time_of' to", b.time_of) for number, b in enumerate(protocol.budgets)]
    named += [("sets 'figures' to", name) for name in protocol.figures]
    named += [("measure, gives 'seconds' of", name) for name in protocol.measure.seconds]
    named += [("gap, names the row", name) for name in (vars(protocol.gap).values() if protocol.gap else ())]
    for where, name in named:
        if name is not None and name not in names:
            raise UserError(f"{file}, {where} {name!r}; the rows are {', '.join(names)}.")
    if protocol.data.dataset is not None and "all" in [*protocol.labeled, *(row.labeled for row in protocol.rows)]:
        raise UserError(
            f"{file} sets 'labeled' to \"all\"; for a dataset that is split, give the number of cases (or patients)."
        )


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
            if protocol.row(budget.time_of).offline:
                raise UserError(f"{where} sets 'time_of' to a row with 'offline' minutes; give 'minutes' instead.")
            if protocol.equal_steps is None:
                raise UserError(f"{where} sets 'time_of', which also needs a budget in 'steps'; add one.")
    epochs = protocol.curve_epochs
    if epochs[-1] != protocol.epochs or list(epochs) != sorted(set(epochs)) or epochs[0] < 1:
        raise UserError(
            f"{file} sets 'curve' to {list(protocol.curve)}, which of {protocol.epochs} epochs are {list(epochs)}; "
            "give increasing shares that end with 1 and fall on different epochs."
        )


def _check_settings(protocol: Protocol, file: Path) -> None:
    from nnunet_ssl import trainers
    from nnunet_ssl.trainers.settings import settings_from_dict

    for name in OURS:
        if any(name in settings for settings in (protocol.settings, *(row.settings for row in protocol.rows))):
            raise UserError(f"{file} sets '{name}' among the settings; use seeds, epochs, budgets and curve instead.")
    for number, row in enumerate(protocol.rows):
        where = f"{file}, rows[{number}] ({row.name}),"
        for stage in row.stages:
            settings = {**protocol.settings, **stage.settings}
            settings_from_dict(getattr(trainers, stage.trainer).Settings, settings, where)
