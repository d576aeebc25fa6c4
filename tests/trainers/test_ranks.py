"""What ranks do apart, and the first one alone, with a trainer that takes itself for the second."""

from __future__ import annotations

import os
import time

import torch
from helpers.steps import on_two_ranks

from nnunet_ssl.trainers import base, data
from nnunet_ssl.unlabeled.store import PreparedFolder


def test_ranks_draw_apart_and_the_first_one_alone_saves(tiny, make_trainer):
    trainer = make_trainer("nnUNetTrainerLabeledOnly", tiny("2d"))
    drawn, seeds = [], []
    for rank in (0, 1):
        trainer.local_rank = rank
        drawn.append(trainer.draws("x").random())
        trainer.on_train_epoch_start()
        seeds.append(torch.initial_seed())
    assert drawn[0] != drawn[1]
    assert seeds[0] != seeds[1]
    before = os.listdir(trainer.output_folder)
    trainer.save_checkpoint(os.path.join(trainer.output_folder, "checkpoint_latest.pth"))
    assert os.listdir(trainer.output_folder) == before


def test_no_rank_goes_on_before_the_fold_is_ours(tiny, make_trainer, monkeypatch, tmp_path):
    """nnU-Net's loggers, which come next, would remove files of a training that is under way."""
    trainer, held = make_trainer("nnUNetTrainerLabeledOnly", tiny("2d")), tmp_path / "held"

    def slow(*_, **__):
        time.sleep(1)
        held.touch()

    def locked(rank):
        trainer._lock_fold(trainer.plans_manager, "2d", 0)
        return held.exists()

    monkeypatch.setattr(base, "take", slow)
    assert on_two_ranks(tmp_path, locked) == [True, True]


def test_the_others_wait_for_what_the_first_one_prepares(tiny, make_trainer, monkeypatch):
    trainer = make_trainer("nnUNetTrainerCPS", tiny("2d"))
    trainer.local_rank, prepared = 1, PreparedFolder("", {}, {})
    monkeypatch.setattr(data, "prepare_unlabeled", None)
    monkeypatch.setattr(data, "wait_until_prepared", lambda *_: prepared)  # the real one has a day's patience
    assert trainer._prepared_unlabeled() is prepared
