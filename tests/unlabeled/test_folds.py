"""Folds that nnU-Net cannot train are refused before anything is prepared, by the rules of nnU-Net itself."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.damage import JSON_DAMAGE, with_byte_order_mark
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ssl.errors import UserError
from nnunet_ssl.unlabeled.folds import Fold, read_splits, refuse_fold

CASES = [f"case_{i}" for i in range(6)]


def split_by_nnunet(fold: int | str, cases: list[str], folder: Path) -> tuple[list[str], list[str]]:
    """nnU-Net's own method, on these cases."""

    class Dataset:
        def __init__(self, *args: object, **kwargs: object) -> None:
            self.identifiers = cases

        @staticmethod
        def get_identifiers(folder: str) -> list[str]:
            return cases

    trainer = SimpleNamespace(
        fold=fold,
        dataset_class=Dataset,
        preprocessed_dataset_folder="",
        preprocessed_dataset_folder_base=str(folder),
        folder_with_segs_from_previous_stage=None,
        print_to_log_file=lambda *_: None,
    )
    return nnUNetTrainer.do_split(trainer)


@pytest.mark.parametrize("fold", [0, 4, 5, "all"])
@pytest.mark.parametrize("num_cases", range(1, 7))
@pytest.mark.parametrize("with_file", [False, True])
def test_refuses_just_what_nnunet_cannot_split(tmp_path, fold, num_cases, with_file):
    cases = CASES[:num_cases]
    if with_file:
        (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["case_0"], "val": ["case_0"]}]))
    try:
        refuse_fold(fold, cases, str(tmp_path))
        refused = False
    except UserError as error:
        refused = True
        message = str(error)
    try:
        train, val = split_by_nnunet(fold, cases, tmp_path)
        works = bool(train) and bool(val)
    except ValueError:
        works = False
    assert refused is not works
    assert not refused or "Train fold all, or choose the cases with nnUNetv2_ssl_split." in message


@pytest.mark.parametrize(
    ("fold", "says"),
    [
        ({"train": [], "val": ["case_1"]}, "fold 0 has no case under 'train'"),
        ({"train": ["case_0"], "val": []}, "fold 0 has no case under 'val'"),
        ({"train": ["nobody"], "val": ["case_1"]}, "fold 0 names nobody under 'train', which is not preprocessed"),
        ({"train": ["case_0"], "val": ["nobody"]}, "fold 0 names nobody under 'val', which is not preprocessed"),
        ({"train": ["case_0"]}, "fold 0 is not written as"),
        ({"train": "case_0", "val": ["case_1"]}, "fold 0 is not written as"),
        ({"train": ["../case_0"], "val": ["case_1"]}, "case '../case_0' begins with a dot"),
        ({"train": [3], "val": ["case_1"]}, "case 3 is not a text"),
        ([], "fold 0 is not written as"),
    ],
)
def test_a_fold_that_cannot_train_is_named(tmp_path, fold, says):
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps([fold]))
    with pytest.raises(UserError, match=f"{file}: {says}"):
        refuse_fold(0, CASES, str(tmp_path))


@pytest.mark.parametrize("damage", [name for name in JSON_DAMAGE if name != "a list"])
def test_a_damaged_file_is_named(tmp_path, damage):
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps([{"train": ["case_0"], "val": ["case_1"]}]))
    with_byte_order_mark(file)
    assert read_splits(str(file), "") == [Fold(["case_0"], ["case_1"])]
    JSON_DAMAGE[damage](file)
    with pytest.raises(UserError, match=f"{file}.* Train fold all, or"):
        refuse_fold(0, CASES, str(tmp_path))


def test_nothing_is_preprocessed(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} holds no preprocessed case. Run nnUNetv2_plan_and_preprocess"):
        refuse_fold("all", [], str(tmp_path))


def test_a_training_is_refused_before_its_images_are_prepared(tiny_copy, make_trainer):
    dataset = tiny_copy("3d")
    splits = dataset.preprocessed / "splits_final.json"
    splits.write_text(json.dumps([{"train": ["nobody"], "val": ["tr_00"]}]))
    for name in ("nnUNetTrainerCPS", "nnUNetTrainerLabeledOnly"):
        with pytest.raises(UserError, match=f"{splits}: fold 0 names nobody under 'train'"):
            make_trainer(name, dataset).on_train_start()
    assert not list(dataset.preprocessed.glob("*_unlabeled"))


def test_a_subclass_may_split_as_it_likes(tiny_copy, make_trainer, monkeypatch):
    dataset = tiny_copy("3d")
    (dataset.preprocessed / "splits_final.json").write_text("[]")
    trainer = make_trainer("nnUNetTrainerLabeledOnly", dataset)
    monkeypatch.setattr(type(trainer), "do_split", lambda self: (["tr_00"], ["tr_01"]))
    trainer.on_train_start()
