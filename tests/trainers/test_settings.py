import json

import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers import TRAINERS
from nnunet_ssl.trainers.settings import load_settings
from nnunet_ssl.trainers.shta import SHTA_CPSSettings


def load(tmp_path, content):
    file = tmp_path / "settings.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_settings(SHTA_CPSSettings, str(file))


def test_defaults_without_a_file():
    assert load_settings(SHTA_CPSSettings, None) == SHTA_CPSSettings()
    assert load_settings(SHTA_CPSSettings, "") == SHTA_CPSSettings()


def test_fields_of_host_and_shta_are_overridden_by_name(tmp_path):
    settings = load(tmp_path, {"cps_weight": 2, "shta_temperature": 0.2, "keep_epochs": [1, 2], "seed": None})
    assert (settings.cps_weight, settings.shta_temperature, settings.keep_epochs) == (2.0, 0.2, (1, 2))
    assert isinstance(settings.cps_weight, float)


def test_the_paper_preset_and_what_overrides_it(tmp_path):
    paper = load(tmp_path, {"preset": "paper"})
    assert (paper.cps_weight, paper.cps_rampup, paper.cps_loss) == (0.1, 1.0, "ce")
    assert load(tmp_path, {"preset": "paper", "cps_weight": 0.5}).cps_weight == 0.5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"shta_temprature": 0.1}, ["settings.json", "shta_temprature", "shta_temperature"]),
        ({"cps_weight": "high"}, ["cps_weight", "'high'", "a number"]),
        ({"cps_weight": True}, ["cps_weight", "True", "a number"]),
        ({"seed": 1.5}, ["seed", "1.5", "whole number"]),
        ({"num_iterations_per_epoch": True}, ["num_iterations_per_epoch", "True"]),
        ({"passes": "both"}, ["passes", "'both'", "'lean', 'joint'"]),
        ({"keep_epochs": 5}, ["keep_epochs", "5", "list"]),
        ({"preset": "ours"}, ["preset", "'ours'", "'paper'"]),
        ({"preset": []}, ["preset", "[]", "a text"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"save_every": 0}, ["save_every", "0", "at least 1"]),
        ({"num_iterations_per_epoch": 0}, ["num_iterations_per_epoch", "at least 1"]),
        ({"shta_temperature": 0}, ["shta_temperature", "positive"]),
        ({"shta_hard_ratio": 1.5}, ["shta_hard_ratio", "1.5"]),
        ("{", ["settings.json", "JSON"]),
        ("[1]", ["settings.json", "list"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, words):
    with pytest.raises(UserError) as error:
        load(tmp_path, content)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match="nowhere"):
        load_settings(SHTA_CPSSettings, "/nowhere/settings.json")


def test_every_listed_trainer_exists_with_a_paper_and_settings():
    import nnunet_ssl.trainers

    for name in TRAINERS:
        trainer = getattr(nnunet_ssl.trainers, name)
        assert trainer.__name__ == name
        assert trainer.paper
        assert trainer.__doc__
        assert trainer.Settings()
