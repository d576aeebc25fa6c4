"""A checkpoint names a trainer whose network is the one that was trained, whatever a subclass builds."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN
from torch import nn

from nnunet_ssl import trainers
from nnunet_ssl.errors import UserError

# What somebody puts into a folder of nnUNet_extTrainer.
OWN_TRAINERS = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from nnunet_ssl.trainers import nnUNetTrainerCPS, nnUNetTrainerMagicNet

def tanh(*args, **kwargs):
    network = nnUNetTrainer.build_network_architecture(*args, **kwargs)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LeakyReLU):
                setattr(module, name, nn.Tanh())
    return network

class nnUNetTrainerTanhCPS(nnUNetTrainerCPS):
    epochs = 1
    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, num_input_channels, num_output_channels,
                                   enable_deep_supervision=True):
        return tanh(plans_manager, configuration_manager, num_input_channels, num_output_channels,
                    enable_deep_supervision)

class nnUNetTrainerTanhMagicNet(nnUNetTrainerMagicNet):
    epochs = 1
    build_network_architecture = staticmethod(nnUNetTrainerTanhCPS.build_network_architecture)
"""


@pytest.fixture
def own_trainers(tmp_path, monkeypatch):
    """A folder of nnUNet_extTrainer, set in the environment."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_trainers.py").write_text(OWN_TRAINERS)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "mine"))


def logits(network: nn.Module, patch: torch.Tensor) -> torch.Tensor:
    network.decoder.deep_supervision = False
    with torch.no_grad():
        return network.eval()(patch)


@pytest.mark.parametrize("name", ["nnUNetTrainerTanhCPS", "nnUNetTrainerTanhMagicNet"])
def test_a_network_of_ones_own_is_the_one_that_predicts(tiny, make_trainer, own_trainers, name):
    trainer = make_trainer(name, tiny())
    trainer.run_training()
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(Path(trainer.output_folder).parent), (0,))
    assert predictor.trainer_name == name
    patch = torch.randn(1, 1, 16, 16, 16)
    assert torch.equal(logits(predictor.network, patch), logits(trainer.plans_network, patch))


class OfANetwork:
    """Builds something of the plans' shape that is not the plans'."""

    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, channels, classes, enable_deep_supervision):
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, channels, classes, enable_deep_supervision
        )
        network.more = nn.Conv3d(1, 1, 1)
        return network


def subclass(name: str, *bases: type, **body: object) -> type:
    return type(name, bases, {"__module__": __name__, **body})


CPS, SASNET = trainers.nnUNetTrainerCPS, trainers.nnUNetTrainerSASNet
MIXED = subclass("Mixed", OfANetwork, CPS)


@pytest.mark.parametrize(
    ("trainer", "named"),
    [
        (CPS, "nnUNetTrainer"),
        (trainers.nnUNetTrainerSHTA_MagicNet_5epochs, "nnUNetTrainer"),
        (subclass("OtherLosses", CPS, losses=lambda self, batch: iter(())), "nnUNetTrainer"),
        (SASNET, "nnUNetTrainerSASNet"),
        (trainers.nnUNetTrainerSASNet_5epochs, "nnUNetTrainerSASNet"),
        (subclass("Sub", SASNET), "nnUNetTrainerSASNet"),
        (subclass("SubOfANetwork", OfANetwork, SASNET), "SubOfANetwork"),
        (subclass("NormalizedByBatch", CPS, nnUNetTrainerBN), "nnUNetTrainerBN"),  # plain nnU-Net knows it
        (MIXED, "Mixed"),
        (subclass("Mixed_5epochs", MIXED, epochs=5), "Mixed_5epochs"),
        (subclass("Named", MIXED, inference_trainer="nnUNetTrainer"), "nnUNetTrainer"),
        (subclass("Later", OfANetwork, subclass("Before", CPS, inference_trainer="nnUNetTrainer")), "Later"),
        (subclass("Pretrained", OfANetwork, trainers.nnUNetTrainerMAE), "nnUNetTrainerMAE"),  # which refuses to predict
        (subclass("PretrainedBN", nnUNetTrainerBN, trainers.nnUNetTrainerMAE), "nnUNetTrainerMAE"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_the_trainer_that_checkpoints_name(trainer, named):
    assert trainer.trainer_of_checkpoints() == named


def started(trainer_class, tiny, own_results, kind="3d"):
    dataset = tiny(kind)
    plans = {**dataset.plans, "continue_training": False}
    trainer = trainer_class(plans, dataset.configuration, 0, dataset.dataset_json, torch.device("cpu"))
    trainer.on_train_start()
    return trainer


def test_batch_normalization_mixed_in_is_predicted_with(tiny, own_results):
    trainer = started(subclass("NormalizedByBatch", CPS, nnUNetTrainerBN), tiny, own_results)
    assert any(isinstance(module, nn.BatchNorm3d) for module in trainer.plans_network.modules())
    trainer.save_checkpoint(str(own_results / "checkpoint.pth"))
    assert torch.load(own_results / "checkpoint.pth", weights_only=False)["trainer_name"] == "nnUNetTrainerBN"


def replaced_before(self):
    nnUNetTrainer.initialize(self)
    self.network = OfANetwork.build_network_architecture(
        self.plans_manager, self.configuration_manager, self.num_input_channels, 3, True
    )
    self.optimizer, self.lr_scheduler = self.configure_optimizers()


def replaced_after(self):
    CPS.initialize(self)
    self.network = nnUNetTrainer.build_network_architecture(
        self.plans_manager, self.configuration_manager, self.num_input_channels, 3, True
    )


def replaced_on_the_instance(self):
    self.build_network_architecture = partial(OfANetwork.build_network_architecture)
    CPS.initialize(self)


def with_other_activations(self):
    CPS.initialize(self)
    for module in self.plans_network.modules():
        if isinstance(module, nn.LeakyReLU):
            module.negative_slope = 0.5


@pytest.mark.parametrize(
    ("trainer", "why"),
    [
        (subclass("A", CPS, subclass("Base", nnUNetTrainer, initialize=replaced_before)), "the weights do not fit"),
        (subclass("B", CPS, initialize=replaced_after), "self.network was replaced after"),
        (subclass("C", CPS, initialize=replaced_on_the_instance), "the weights do not fit"),
        (subclass("D", CPS, initialize=with_other_activations), "their layers differ"),
        (subclass("Named", MIXED, inference_trainer="nnUNetTrainer"), "the weights do not fit"),
        (subclass("E", MIXED, inference_trainer="nnUNetTrainerMisspelt"), "building it fails: Could not find"),
        (subclass("F", CPS, build_network_architecture=lambda self, plans_manager, *more: (
            OfANetwork.build_network_architecture(plans_manager, *more))), "building it fails"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_what_prediction_could_not_build_is_refused_at_the_start(tiny, own_results, trainer, why):
    with pytest.raises(UserError, match=f"{trainer.__name__} trains another network than .*{why}"):
        started(trainer, tiny, own_results)
    assert not list(own_results.rglob("*.json"))


def test_dropout_is_no_other_network(tiny, own_results):
    class Dropping(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.dropout = nn.Dropout(p)

    def build(p):
        def network(*args, **kwargs):
            network = nnUNetTrainer.build_network_architecture(*args, **kwargs)
            network.more = Dropping(p)
            return network

        return network

    def initialize(self):
        self.build_network_architecture = lambda plans_manager, *more: build(0.3)(plans_manager, *more)
        CPS.initialize(self)

    static = staticmethod(lambda plans_manager, *more, **options: build(0.0)(plans_manager, *more, **options))
    started(subclass("G", CPS, initialize=initialize, build_network_architecture=static), tiny, own_results)


@pytest.mark.slow
def test_nnunets_commands_predict_with_the_network_that_validated(tiny_copy, own_trainers, run_nnunet, own_results):
    dataset, name = tiny_copy(), "nnUNetTrainerTanhCPS"
    arguments = ["-c", dataset.configuration, "-f", 0, "-tr", name, "-device", "cpu"]
    run_nnunet("nnUNetv2_train", dataset.id, dataset.configuration, 0, "-tr", name, "-device", "cpu", settings={})
    [validation] = own_results.rglob("validation")
    for file in validation.glob("*.nii.gz"):
        (own_results / "images").mkdir(exist_ok=True)
        image = file.name.replace(".nii.gz", "_0000.nii.gz")
        shutil.copy(dataset.raw / "imagesTr" / image, own_results / "images" / image)
    out = own_results / "out"
    run_nnunet("nnUNetv2_predict", "-i", own_results / "images", "-o", out, "-d", dataset.id, *arguments)
    for file in validation.glob("*.nii.gz"):
        predicted, validated = (sitk.GetArrayFromImage(sitk.ReadImage(str(f / file.name))) for f in (out, validation))
        assert len(np.unique(validated)) > 1
        assert np.array_equal(predicted, validated)
