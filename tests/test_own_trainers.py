"""A user's own trainers in ``nnUNet_extTrainer``: ``_<N>epochs`` and SHTA on them, by nnU-Net's own look-up."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find

from nnunet_ssl import _startup, trainers
from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers.settings import settings_from_dict

FOLDER = Path(__file__).parent / "own_trainers"
OWN = """
from __future__ import annotations
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunet_ssl.declared import Weight, declared
from nnunet_ssl.trainers import nnUNetTrainerCPS

@declared
class MineSettings(nnUNetTrainerCPS.Settings):
    mine_weight: Weight = 1.0

class nnUNetTrainerMine(nnUNetTrainerCPS):
    Settings = MineSettings

class nnUNetTrainerMine_4epochs(nnUNetTrainerMine):
    of_the_user = True

class nnUNetTrainerPlain(nnUNetTrainer):
    pass
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with trainers, as a user has it: behind ours, another copy of ours and a folder that is gone."""
    (tmp_path / "mine.py").write_text(OWN)
    copy = tmp_path / "elsewhere" / "nnunet_ssl" / "_ext"
    copy.mkdir(parents=True)
    (copy / "nnunet_ssl_ext.py").write_text(Path(_startup.EXT_FOLDER, "nnunet_ssl_ext.py").read_text())
    folders = [_startup.EXT_FOLDER, str(copy), str(tmp_path / "gone"), str(tmp_path)]
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(folders))
    before = set(vars(trainers))
    yield tmp_path
    for name in set(vars(trainers)) - before:
        delattr(trainers, name)


@pytest.mark.parametrize(
    ("name", "base", "epochs"),
    [
        ("nnUNetTrainerMine_20epochs", "nnUNetTrainerMine", 20),
        ("nnUNetTrainerSHTA_Mine", "nnUNetTrainerMine", None),
        ("nnUNetTrainerSHTA_Mine_20epochs", "nnUNetTrainerSHTA_Mine", 20),
    ],
)
def test_a_users_class_has_them_too(own: Path, name: str, base: str, epochs: int | None) -> None:
    found = find(name)
    assert (found.__name__, found.epochs) == (name, epochs)
    assert base in [cls.__name__ for cls in found.__mro__[1:]]
    assert issubclass(found, trainers.nnUNetTrainerCPS)
    assert find(name) is found
    assert pickle.loads(pickle.dumps(found)) is found
    assert settings_from_dict(found.Settings, {"mine_weight": 2}, "mine.json").mine_weight == 2
    with pytest.raises(UserError, match="mine_weight"):
        settings_from_dict(found.Settings, {"mine_weight": -2}, "mine.json")
    assert ("shta_weight" in found.Settings.__dataclass_fields__) == ("SHTA" in name)
    assert found.trainer_of_checkpoints() == "nnUNetTrainer"


def test_what_the_user_has_written_under_a_name_is_theirs(own: Path) -> None:
    assert find("nnUNetTrainerMine_4epochs").of_the_user
    assert find("nnUNetTrainerPlain").__name__ == "nnUNetTrainerPlain"


@pytest.mark.parametrize(
    "name",
    ["nnUNetTrainerPlain_5epochs", "nnUNetTrainerSHTA_Plain", "nnUNetTrainerSHTA_SASNet", "nnUNetTrainerNo_5epochs"],
)
def test_what_derives_from_none_of_ours_has_them_not(own: Path, name: str) -> None:
    with pytest.raises(RuntimeError, match=f"Could not find requested nnunet trainer {name}"):
        find(name)


def test_epochs_that_cannot_be_are_a_sentence(own: Path) -> None:
    with pytest.raises(UserError, match=r"nnUNetTrainerMine_<N>epochs: N must be"):
        find("nnUNetTrainerMine_0epochs")


@pytest.mark.slow
def test_the_real_commands_take_them(
    tiny: Callable, own_results: Path, run_nnunet: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained from the user's folder; predicted where that folder is unknown, for the file is a plain nnU-Net's."""
    dataset, name = tiny(), "nnUNetTrainerSHTA_Adversarial_1epochs"
    monkeypatch.setenv("nnUNet_extTrainer", str(FOLDER))
    which = [dataset.id, dataset.configuration, 0, "-tr", name, "-device", "cpu"]
    run_nnunet("nnUNetv2_train", *which, settings={})
    [checkpoint] = own_results.rglob("checkpoint_final.pth")
    assert torch.load(checkpoint, weights_only=False)["current_epoch"] == 1
    columns = (checkpoint.parent / "ssl_log.csv").read_text().splitlines()[0].split(",")
    assert {"loss_sup", "loss_adversarial", "loss_discriminator", "loss_shta"} <= set(columns)

    monkeypatch.setenv("nnUNet_extTrainer", "")
    images, which = dataset.raw / "imagesTs", ["-d", dataset.id, "-c", dataset.configuration, "-f", 0, "-tr", name]
    run_nnunet("nnUNetv2_predict", "-i", images, "-o", tmp_path / "out", *which, "-device", "cpu", "-npp", 0, "-nps", 0)
    assert list((tmp_path / "out").glob("*.nii.gz"))
