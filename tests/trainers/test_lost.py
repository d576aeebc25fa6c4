"""A training that is lost ends with a sentence, and the last good checkpoint stays."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from nnunet_ssl.errors import UserError

NAME = "nnUNetTrainerCPS_3epochs"


def test_infinite_terms_end_the_training_and_keep_the_checkpoint(tiny, make_trainer, monkeypatch):
    trainer = make_trainer(NAME, tiny(), settings={"save_every": 1})
    weights = trainer.term_weights
    monkeypatch.setattr(trainer, "term_weights", lambda: weights() if trainer.current_epoch < 1 else {"sup": math.inf})
    with pytest.raises(UserError) as error:
        trainer.run_training()
    assert all(
        word in str(error.value)
        for word in (trainer.output_folder, "in epoch 1 ", "no step", "loss_cps", "ssl_settings.json", "initial_lr")
    ), str(error.value)
    folder = Path(trainer.output_folder)
    assert not list(folder.glob("checkpoint_final*"))
    for file in ("checkpoint_latest.pth", "checkpoint_best.pth"):
        checkpoint = torch.load(folder / file, weights_only=False)
        assert checkpoint["current_epoch"] == 1
        assert all(weight.isfinite().all() for weight in checkpoint["network_weights"].values())
    assert "no step had a finite loss" in next(folder.glob("training_log_*.txt")).read_text()


@pytest.mark.parametrize("module", ["plans_network", "training_modules"])
def test_weights_that_broke_within_an_epoch_are_not_saved(tiny, make_trainer, module):
    trainer = make_trainer(NAME, tiny())
    finite = torch.tensor(1.0)
    trainer._end_if_lost(torch.stack([finite, finite]))
    trainer.log_value("loss_sup", finite)
    with torch.no_grad():
        next(getattr(trainer, module).parameters()).view(-1)[0] = math.nan
    with pytest.raises(UserError, match="in epoch 0 the weights became NaN or infinite"):
        trainer.on_train_epoch_end([{"loss": finite}] * 2)


def test_a_step_that_overflows_is_no_reason(tiny, make_trainer):
    """With half precision that is how the scale of the loss is found."""
    trainer = make_trainer(NAME, tiny())
    trainer._end_if_lost(torch.tensor([math.inf, math.nan, 1.0]))


def test_the_real_command_ends(tiny, own_results, run_nnunet):
    """With background workers running."""
    dataset = tiny()
    process = run_nnunet(
        "nnUNetv2_train", dataset.id, dataset.configuration, 0, "-tr", NAME, "-device", "cpu",
        settings={"cps_weight": 1e300}, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    messages = [line for line in process.stderr.splitlines() if line.startswith("nnunet_ssl:")]
    assert len(messages) == 1, process.stderr
    assert "in epoch 0 no step had a finite loss" in messages[0]
    assert not list(own_results.rglob("checkpoint_*"))


def test_epochs_to_keep_that_will_not_be(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings={"keep_epochs": [3, 4]}, initialize=False)
    with pytest.raises(UserError, match=r"sets 'keep_epochs' to \[3, 4\], but .* ends with epoch 3; leave out 4"):
        trainer.on_train_start()


def test_a_derived_class_may_train_longer(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings={"keep_epochs": [4]})
    trainer.num_epochs = 4
    trainer._refuse_epochs_that_will_not_be()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"settings": []}', '{"settings": {"cps_weight": NaN}}', '{"settings": {"x": 1}}', "[" * 99999],
)
def test_continued_settings_in_a_wrong_shape_give_a_sentence(tiny, make_trainer, content):
    trainer = make_trainer(NAME, tiny(), initialize=False)
    Path(trainer.settings_file).write_text(content)
    with pytest.raises(UserError, match=r"ssl_settings\.json"):
        trainer._settings_in_force(trainer.settings, continue_training=True)
    Path(trainer.settings_file).write_text("\ufeff" + json.dumps({"settings": {"seed": 5}}))
    override = trainer.Settings(seed=5)
    assert trainer._settings_in_force(override, continue_training=True).seed == 5
