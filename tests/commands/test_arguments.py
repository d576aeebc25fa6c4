"""All command lines: shared arguments alike, and numbers digits, in range, or one sentence and exit code 1."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import pytest
import torch

from nnunet_ssl.commands.arguments import NEW_DATASET, SHARED, Parser, find_device
from nnunet_ssl.datasets import MADE_UP, PUBLISHED
from nnunet_ssl.errors import UserError

REQUIRED = {  # what each command wants besides, so that the number alone is wrong
    "benchmark": ["la"],
    "demo": [],
    "evaluate": ["-ref", "a", "-pred", "b"],
    "export": ["-d", "4", "-c", "2d", "-tr", "nnUNetTrainer", "-o", "out"],
    "figures": ["-d", "4", "-c", "2d", "-tr", "nnUNetTrainer", "-o", "out"],
    "preprocess": ["-d", "4"],
    "pseudolabel": ["-d", "4", "-c", "2d", "-tr", "nnUNetTrainer"],
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


COMMANDS = [*REQUIRED, "trainers", "warp", *(f"dataset {name}" for name in (*PUBLISHED, *MADE_UP))]
NEW_DATASETS = {("split", "-o"), ("pseudolabel", "-o"), *((c, "-d") for c in COMMANDS if c.startswith("dataset "))}


class Made(Exception):  # noqa: N818 - says what it is
    """A command has made its parser."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that ``main`` makes, for instance of ``benchmark`` or, for a subcommand, of ``dataset la``."""

    def made(parser, *_):
        raise Made(parser)

    name, *sub = command.split()
    main = importlib.import_module(f"nnunet_ssl.commands.{name}").main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_known_args", made)
        with pytest.raises(Made) as caught:
            main([])
    [parser] = caught.value.args
    return parser._subparsers._group_actions[0].choices[sub[0]] if sub else parser


def options_of(command: str) -> dict[str, argparse.Action]:
    """The options that its help shows; each has one spelling."""
    shown = [a for a in parser_of(command)._actions if a.option_strings and a.help != argparse.SUPPRESS]
    assert all(len(action.option_strings) == 1 for action in shown if action.dest != "help")
    return {action.option_strings[-1]: action for action in shown}


def test_these_are_all_commands():
    folder = Path(importlib.import_module("nnunet_ssl.commands").__file__).parent
    modules = {file.stem for file in folder.glob("[!_]*.py")} - {"arguments"}
    assert modules == {command.split()[0] for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_shared_arguments_are_alike(command):
    """The same name, kind and beginning of the sentence everywhere; those that take several say so by an s."""
    for option, action in options_of(command).items():
        if option not in SHARED:
            continue
        shared = NEW_DATASET if (command, option) in NEW_DATASETS else SHARED[option]
        name = shared.get("dest", option.strip("-").replace("-", "_"))
        assert action.dest in {name, f"{name}s"}, option
        assert action.metavar in {shared.get("metavar"), name.upper()}, option
        assert action.choices == shared.get("choices"), option
        if (command.split()[0], option) != ("dataset", "--seed"):  # an order's number
            assert action.type is shared.get("type"), option
        begins, should = (re.match(r"\w+", text)[0] for text in (action.help, shared["help"]))
        assert begins in {should, f"{should}s"}, option


@pytest.mark.parametrize("command", COMMANDS)
def test_rules_of_options(command):
    options = options_of(command)
    for option, action in options.items():
        if action.dest == "device":
            assert option == "-device"
        if action.type is Path:
            assert action.metavar in {"DIR", "FILE"}, option
        if action.nargs != 0:  # what it takes has a name in the usage
            assert action.metavar or action.choices or len(action.dest) > 1, option
        assert re.match(r"[A-Z0-9]|show this help message", action.help), option
    if "-o" in options:
        assert options["-o"].metavar in {"DIR", "FILE", "ID"}
    if "-tr" in options and command != "figures":  # which takes -m in its place, and one of the two is required
        assert options["-tr"].required


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    for name, place in {"cuda": torch.cuda, "mps": torch.backends.mps}.items():
        monkeypatch.setattr(place, "is_available", lambda: False)
        with pytest.raises(UserError, match=f"-device {name}: torch sees no such GPU here; leave -device out"):
            find_device(name)
    assert find_device(None) == find_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device(None) == find_device("cuda") == "cuda"


@pytest.mark.parametrize("command", ["benchmark", "demo", "pseudolabel"])
def test_commands_that_run_commands_have_a_dry_run(command):
    assert options_of(command)["--dry-run"].help == SHARED["--dry-run"]["help"]


def test_old_spellings_work_and_the_rest_goes_to_snakemake():
    words = "la --device cpu --executor slurm --retries 2 --data-dir x --out y".split()
    args, passed_on = parser_of("benchmark").parse_known_args(words)
    assert (args.device, args.folder, args.data) == ("cpu", None, None)
    assert passed_on == words[3:]
    args = parser_of("demo").parse_args(["--device", "mps", "--dir", "here"])
    assert (args.device, args.folder) == ("mps", Path("here"))
    assert parser_of("demo").parse_args([]).folder == Path("demo")
