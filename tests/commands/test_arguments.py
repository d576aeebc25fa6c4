"""Numbers on every command line: digits, in range, or one sentence and exit code 1."""

from __future__ import annotations

import importlib
import re

import pytest

from nnunet_ssl.errors import UserError

REQUIRED = {  # what each command wants besides, so that the number alone is wrong
    "benchmark": ["la"],
    "demo": [],
    "evaluate": ["-ref", "a", "-pred", "b"],
    "export": ["-d", "4", "-c", "2d", "-o", "out"],
    "figures": ["-d", "4", "-c", "2d", "-tr", "nnUNetTrainer", "-o", "out"],
    "preprocess": ["-d", "4"],
    "pseudolabel": ["-d", "4", "-c", "2d"],
    "split": ["-d", "4", "--labeled", "5"],
}
WHOLE = {
    "benchmark": ["--jobs", "-np"],
    "demo": ["--epochs", "--seed"],
    "evaluate": ["--seed", "-np"],
    "export": ["-f"],
    "figures": ["-f", "--seed", "-np"],
    "preprocess": ["-np"],
    "pseudolabel": ["-f", "-o", "--rounds", "--parts", "-np"],
    "split": ["-o", "--seed"],
}
REAL = {"evaluate": ["--tolerance"], "pseudolabel": ["--min-confidence", "--keep"]}
NO_WHOLE = ["-1", "²", "٣", "1_0", "1.5", "nan", "inf", "", "five", "1" * 401, "1" * 5000]
NO_REAL = ["-1", "²", "٣", "1_0", "nan", "inf", "1e400", "", "half", "9" * 401]


def refused(command: str, option: str, value: str) -> str:
    main = importlib.import_module(f"nnunet_ssl.commands.{command}").main
    with pytest.raises(UserError) as error:
        main(
            [
                *REQUIRED[command],
                f"{option}={value}" if option.startswith("--") else option,
                *[value] * (option[1] != "-"),
            ]
        )
    return str(error.value)


@pytest.mark.parametrize("value", NO_WHOLE, ids=lambda value: value[:8])
@pytest.mark.parametrize(("command", "option"), [(c, o) for c, options in WHOLE.items() for o in options])
def test_whole_numbers(command, option, value):
    message = refused(command, option, value)
    assert re.match(rf"nnunet_ssl: argument {option}: .* (must be a|is not a fold)", message), message
    assert f"nnUNetv2_ssl_{command} --help" in message
    assert len(message) < 300


@pytest.mark.parametrize("value", NO_REAL, ids=lambda value: value[:8])
@pytest.mark.parametrize(("command", "option"), [(c, o) for c, options in REAL.items() for o in options])
def test_real_numbers(command, option, value):
    message = refused(command, option, value)
    assert re.match(rf"nnunet_ssl: argument {option}: .* must be a number", message), message


def test_rounds_whose_ids_do_not_exist():
    main = importlib.import_module("nnunet_ssl.commands.pseudolabel").main
    with pytest.raises(UserError, match=r"-o 998 --rounds 3: .* ids end at 999"):
        main([*REQUIRED["pseudolabel"], "-o", "998", "--rounds", "3"])


def test_every_number_of_every_command_is_among_these():
    """No command goes back to ``int`` and ``float``, which take what no library does."""
    import inspect

    for command in [*REQUIRED, "trainers"]:
        source = inspect.getsource(importlib.import_module(f"nnunet_ssl.commands.{command}"))
        assert not re.search(r"type=(int|float)\b|argparse\.ArgumentParser|isdigit\(\) or not", source), command
