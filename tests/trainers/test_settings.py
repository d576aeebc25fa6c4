"""Settings from a file: what overrides what, and that everything else is refused with a sentence."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, get_args, get_origin

import pytest
from pydantic import model_validator

import nnunet_ssl.trainers
from nnunet_ssl.declared import Share, declared, fields_of
from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers import TRAINERS, nnUNetTrainerSHTA_CPS
from nnunet_ssl.trainers.settings import SSLSettings, load_settings, settings_from_dict

CLASSES = {name: getattr(nnunet_ssl.trainers, name).Settings for name in TRAINERS}
NO_NUMBERS = [None, True, "0.5", "much", [], {}]
NO_FLOATS = [math.nan, math.inf, -math.inf, float("1e400"), int("9" * 401), -int("9" * 401), *NO_NUMBERS]
NO_INTS = [1.5, 1.0, math.nan, math.inf, 10**30, -(10**30), int("9" * 401), *NO_NUMBERS]


def load(tmp_path, content):
    file = tmp_path / "settings.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_settings(nnUNetTrainerSHTA_CPS.Settings, str(file))


def test_defaults_without_a_file():
    assert load_settings(nnUNetTrainerSHTA_CPS.Settings, None) == nnUNetTrainerSHTA_CPS.Settings()
    assert load_settings(nnUNetTrainerSHTA_CPS.Settings, "") == nnUNetTrainerSHTA_CPS.Settings()


def test_fields_of_host_and_shta_are_overridden_by_name(tmp_path):
    settings = load(tmp_path, {"cps_weight": 2, "shta_temperature": 0.2, "keep_epochs": [1, 2], "seed": None})
    assert (settings.cps_weight, settings.shta_temperature, settings.keep_epochs) == (2.0, 0.2, (1, 2))
    assert isinstance(settings.cps_weight, float)


def test_the_paper_preset_and_what_overrides_it(tmp_path):
    paper = load(tmp_path, {"preset": "paper"})
    assert (paper.cps_weight, paper.cps_rampup, paper.cps_loss) == (0.1, 1.0, "ce")
    assert load(tmp_path, {"preset": "paper", "cps_weight": 0.5}).cps_weight == 0.5


def test_a_file_of_a_windows_editor_is_read(tmp_path):
    assert load(tmp_path, '\ufeff{"cps_weight": 0.5}').cps_weight == 0.5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"shta_temprature": 0.1}, ["settings.json", "shta_temprature", "shta_temperature"]),
        ({"zzz": 0.1}, ["settings.json", "'zzz'", "seed, passes"]),
        ({"cps_weight": "high"}, ["cps_weight", "'high'", "a number"]),
        ({"cps_weight": True}, ["cps_weight", "True", "a number"]),
        ('{"cps_weight": NaN}', ["cps_weight", "nan", "a number from 0"]),
        ('{"cps_weight": 1e400}', ["cps_weight", "inf", "a number from 0"]),
        ({"cps_weight": -1}, ["cps_weight", "-1", "a number from 0"]),
        ({"seed": 1.5}, ["seed", "1.5", "whole number"]),
        ({"num_iterations_per_epoch": True}, ["num_iterations_per_epoch", "True"]),
        ({"passes": "both"}, ["passes", "'both'", "'paired', 'lean', 'joint'"]),
        ({"keep_epochs": 5}, ["keep_epochs", "5", "list"]),
        ({"keep_epochs": [0]}, ["keep_epochs", "[0]", "from 1"]),
        ({"preset": "ours"}, ["preset", "'ours'", "'paper'"]),
        ({"preset": []}, ["preset", "[]", "'paper'"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"save_every": 0}, ["save_every", "0", "from 1"]),
        ({"num_iterations_per_epoch": 0}, ["num_iterations_per_epoch", "from 1"]),
        ({"shta_temperature": 0}, ["shta_temperature", "above 0"]),
        ({"shta_conf_threshold": 30}, ["shta_conf_threshold", "from 0 to 1"]),
        ({"shta_hard_ratio": 1.5}, ["shta_hard_ratio", "1.5"]),
        ({"shta_hard_ratio": 0}, ["shta_hard_ratio", "above 0 and at most 1"]),
        ("{", ["settings.json", "JSON"]),
        ("[1]", ["settings.json", "list"]),
        ("", ["settings.json", "empty"]),
        ("[" * 100_000, ["settings.json", "JSON"]),
        ('{"cps_weight": ' + "[" * 500 + "]" * 500 + "}", ["settings.json", "cannot be read"]),
        ('{"passes": "\\ud800"}', ["settings.json", "cannot be read"]),
        ('{"cps_weight": ' + "9" * 5000 + "}", ["settings.json"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, words):
    with pytest.raises(UserError) as error:
        load(tmp_path, content)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert len(str(error.value)) < 1500


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match="nowhere"):
        load_settings(nnUNetTrainerSHTA_CPS.Settings, "/nowhere/settings.json")


@pytest.mark.parametrize("given", [None, [], "text", 3, {1: 2}, {"keep_epochs": [[[]]]}, {"self": 1}])
def test_stored_settings_in_any_shape_give_a_sentence(given):
    with pytest.raises(UserError, match=r"checkpoint_ssl\.pth"):
        settings_from_dict(SSLSettings, given, "checkpoint_ssl.pth")


def test_every_listed_trainer_exists_with_a_paper_and_settings():
    for name in TRAINERS:
        trainer = getattr(nnunet_ssl.trainers, name)
        assert trainer.__name__ == name
        assert trainer.paper
        assert trainer.__doc__
        assert trainer.Settings()


# ------------------------------------------------------------------ every field of every trainer


def types_in(kind: Any) -> set[type]:
    """``Annotated[int, ...] | None`` -> int and None."""
    return {kind} if isinstance(kind, type) else set().union(*map(types_in, get_args(kind)))


def fields(kind: type, of_list: bool = False) -> list[Any]:
    """The number fields of this type, one parameter a trainer and field."""
    return [
        pytest.param(cls, name, id=f"{trainer}-{name}")
        for trainer, cls in CLASSES.items()
        for name, field in fields_of(cls).items()
        if kind in types_in(field.annotation) and (get_origin(field.annotation) is tuple) == of_list
    ]


def may_be_none(cls: type, name: str) -> bool:
    """Whether null is a value too."""
    return type(None) in types_in(fields_of(cls)[name].annotation)


def assert_refused(cls: type, name: str, value: Any) -> None:
    with pytest.raises(UserError) as error:
        settings_from_dict(cls, {name: value}, "mine.json")
    assert str(error.value).startswith(f"nnunet_ssl: mine.json sets '{name}' to ")
    assert "; it must be " in str(error.value)


@pytest.mark.parametrize(("cls", "name"), fields(float))
def test_every_float_refuses_what_is_no_finite_number(cls, name):
    for value in NO_FLOATS:
        if not (value is None and may_be_none(cls, name)):
            assert_refused(cls, name, value)
    assert_refused(cls, name, -1e-6)  # nothing here means anything below 0


@pytest.mark.parametrize(("cls", "name"), fields(int))
def test_every_int_refuses_what_is_no_whole_number_that_libraries_take(cls, name):
    for value in NO_INTS:
        if not (value is None and may_be_none(cls, name)):
            assert_refused(cls, name, value)
    assert_refused(cls, name, -1)


@pytest.mark.parametrize(("cls", "name"), fields(float, of_list=True) + fields(int, of_list=True))
def test_every_list_refuses_what_is_no_list_of_such_numbers(cls, name):
    for value in NO_FLOATS:
        assert_refused(cls, name, [value])
        if value != []:
            assert_refused(cls, name, value)
    assert_refused(cls, name, "12")


@pytest.mark.parametrize(
    ("trainer", "name", "value"),
    [
        ("GACPS", "ga_topk", 0.0),
        ("GACPS", "ga_topk", 101.0),
        ("GACPS", "ga_gamma", 1.5),
        ("SASNet", "sasnet_temperature", 0.0),
        ("SASNet", "sasnet_view_angle", 0.0),
        ("SASNet", "sasnet_views", "flip"),
        ("SASNet", "sasnet_sar", "median"),
    ],
)
def test_what_no_loss_checks_by_itself_is_refused_here(trainer, name, value):
    assert_refused(CLASSES[f"nnUNetTrainer{trainer}"], name, value)


def test_the_tests_above_see_every_number():
    seen = {p.values[1] for of_list in (False, True) for kind in (int, float) for p in fields(kind, of_list)}
    numbers = {
        name
        for cls in CLASSES.values()
        for name, field in fields_of(cls).items()
        if not isinstance(field.default, (bool, str))
    }
    assert seen == numbers
    assert {"cps_weight", "seed", "keep_epochs", "urpc_dropout"} <= seen


@pytest.mark.parametrize("name", TRAINERS)
def test_defaults_and_presets_lie_in_their_own_ranges(name):
    cls = CLASSES[name]
    for preset in ("nnunet", "paper"):
        settings = settings_from_dict(cls, {"preset": preset}, "the preset")
        again = settings_from_dict(cls, json.loads(json.dumps(dataclasses.asdict(settings))), "ssl_settings.json")
        assert again == settings


def test_a_default_out_of_range_is_seen():
    @declared
    class Wrong(SSLSettings):
        share: Share = 2.0

    with pytest.raises(UserError, match=r"'share' to 2\.0; it must be a number from 0 to 1"):
        settings_from_dict(Wrong, {}, "defaults")


def test_a_check_across_fields_is_a_sentence_too():
    @declared
    class Both(SSLSettings):
        lower: Share = 0.0
        upper: Share = 1.0

        @model_validator(mode="after")
        def _in_order(self) -> Any:
            if self.lower > self.upper:
                raise ValueError("sets 'lower' above 'upper'; exchange them")
            return self

    with pytest.raises(UserError, match=r"mine\.json sets 'lower' above 'upper'; exchange them\."):
        settings_from_dict(Both, {"lower": 0.5, "upper": 0.25}, "mine.json")


def test_a_plain_dataclass_which_nothing_would_check_is_refused():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Unchecked(SSLSettings):
        share: float = 2.0

    with pytest.raises(TypeError, match="Unchecked needs the decorator"):
        settings_from_dict(Unchecked, {}, "defaults")
