"""``predict_with: ema``: what is averaged is validated, saved and predicted with; what trains is as it was."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from helpers.runs import assert_equal, assert_resumed_equals_uninterrupted, train
from helpers.steps import a_batch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN

from nnunet_ssl import trainers

EMA = {"predict_with": "ema", "ema_share": 0.5, "save_every": 1, "num_iterations_per_epoch": 3}
NAME = "nnUNetTrainerCPS_2epochs"


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def average_of(steps, share):
    """Of the parameters after each step, one step after the other."""
    average = [p.double() for p in steps[0]]
    for step, of_step in enumerate(steps):
        new = min(1.0, 1 / (share * (step + 1)))
        average = [(1 - new) * a + new * p for a, p in zip(average, of_step, strict=True)]
    return average


def checkpoint(trainer, name="checkpoint_final.pth"):
    return torch.load(Path(trainer.output_folder) / name, weights_only=False)


def recorded(trainer, monkeypatch):
    """The trained weights after each step, and those of the network at each validation step."""
    steps, validations = [], []
    step, validation_step = trainer.train_step, trainer.validation_step
    monkeypatch.setattr(
        trainer, "train_step", lambda batch: (step(batch), steps.append(weights(trainer.plans_network)))[0]
    )
    monkeypatch.setattr(
        trainer,
        "validation_step",
        lambda batch: (validations.append(weights(trainer.plans_network)), validation_step(batch))[1],
    )
    return steps, validations


def test_the_average_validates_is_saved_and_predicts_and_training_is_what_it_was(tiny, make_trainer, monkeypatch):
    trainer = make_trainer(NAME, tiny(), settings={**EMA, "keep_epochs": [1]})
    steps, validations = recorded(trainer, monkeypatch)
    train(trainer)
    names = dict(trainer.plans_network.named_parameters())
    for epoch, file in ((1, "checkpoint_epoch1.pth"), (2, "checkpoint_final.pth")):
        saved = checkpoint(trainer, file)["network_weights"]
        for name, average, of_validation in zip(
            names, average_of(steps[: 3 * epoch], 0.5), validations[epoch - 1], strict=True
        ):
            torch.testing.assert_close(saved[name], average.float(), msg=name)
            assert torch.equal(saved[name], of_validation), name
    assert not torch.equal(validations[1][0], steps[-1][0])

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(Path(trainer.output_folder).parent), (0,))
    assert predictor.trainer_name == "nnUNetTrainer"
    final = checkpoint(trainer)["network_weights"]
    assert_equal(dict(predictor.network.state_dict()), final)
    assert_equal(dict(trainer.plans_network.state_dict()), final)  # which perform_actual_validation goes on with

    last = make_trainer(NAME, tiny(), settings={**EMA, "predict_with": "last", "keep_epochs": [1]})
    assert last.average is None
    of_last, _ = recorded(last, monkeypatch)
    train(last)
    assert all(torch.equal(a, b) for x, y in zip(steps, of_last, strict=True) for a, b in zip(x, y, strict=True))
    kept = torch.load(Path(trainer.output_folder) / "checkpoint_final_ssl.pth", weights_only=True)["modules"]
    assert not any(name.startswith("average.") for name in kept)  # of the run with "last", in the same folder


BATCH_NORM = type("NormalizedByBatch", (trainers.nnUNetTrainerCPS, nnUNetTrainerBN), {"epochs": 2})


@pytest.mark.parametrize("name", ["batch norm", "nnUNetTrainerMagicNet_2epochs", "nnUNetTrainerSASNet_2epochs"])
def test_resumed_it_ends_as_if_uninterrupted(tiny, make_trainer, monkeypatch, name):
    if name == "batch norm":
        name = BATCH_NORM.__name__
        monkeypatch.setattr(trainers, name, BATCH_NORM, raising=False)
    folder = assert_resumed_equals_uninterrupted(lambda: make_trainer(name, tiny(), settings=EMA))
    state = torch.load(folder / "checkpoint_final_ssl.pth", weights_only=True)
    raw = [t for n, t in state["modules"].items() if n.startswith("average.")]
    final = torch.load(folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert raw
    assert not any(torch.equal(raw[0], t) for t in final.values())  # the training state keeps the weights that train


def test_saved_within_an_epoch_it_is_the_average_too(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings=EMA)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    for seed in range(4):
        trainer.train_step(a_batch(trainer, seed))
    before, average = weights(trainer.plans_network), weights(trainer.average)
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    saved = checkpoint(trainer, "checkpoint_latest.pth")["network_weights"]
    for (name, now), then, averaged in zip(trainer.plans_network.named_parameters(), before, average, strict=True):
        assert torch.equal(now, then)
        assert torch.equal(saved[name], averaged)


def test_the_average_starts_from_pretrained_weights(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings=EMA)
    with torch.no_grad():
        for p in trainer.plans_network.parameters():  # as -pretrained_weights, after initialize
            p.fill_(0.5)
    trainer.on_train_start()
    assert all((p == 0.5).all() for p in trainer.average.parameters())


def test_only_validation_needs_neither_settings_nor_the_training_state(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings=EMA)
    train(trainer)
    final = checkpoint(trainer)["network_weights"]
    (Path(trainer.output_folder) / "checkpoint_final_ssl.pth").unlink()
    other = make_trainer(NAME, tiny())
    other.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    assert_equal(dict(other.plans_network.state_dict()), final)


def test_a_compiled_network_sees_the_exchange(tiny, make_trainer, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(trainers.nnUNetTrainerLabeledOnly, "_do_i_compile", lambda self: True)
    trainer = make_trainer("nnUNetTrainerLabeledOnly", tiny("2d"), settings=EMA)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    for seed in range(4):
        trainer.train_step(a_batch(trainer, seed))
    images, outputs = a_batch(trainer)["data"], []
    for start in (trainer.on_validation_epoch_start, trainer.on_train_epoch_start):
        start()
        with torch.no_grad():
            outputs.append(trainer.network(images)[0])
            torch.testing.assert_close(outputs[-1], trainer.plans_network(images)[0])
    assert not torch.allclose(*outputs)
