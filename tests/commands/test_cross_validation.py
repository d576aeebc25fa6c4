"""Whether warps help where there is no test set: five folds of two trainers, as docs/which-trainer.md says."""

from __future__ import annotations

import json

import pytest

TRAINERS = ("nnUNetTrainerLabeledOnly_1epochs", "nnUNetTrainerWarps_1epochs")


@pytest.mark.slow
def test_two_trainers_are_compared_case_by_case_over_all_folds(tiny_copy, run_nnunet, tmp_path):
    """Two folds here, of all cases."""
    dataset = tiny_copy()
    cases = dataset.cases("imagesTr")
    folds = [{"train": cases[2:], "val": cases[:2]}, {"train": cases[:2], "val": cases[2:]}]
    (dataset.preprocessed / "splits_final.json").write_text(json.dumps(folds))
    folders = [tmp_path / f"cv_{trainer}" for trainer in TRAINERS]
    for trainer, folder in zip(TRAINERS, folders, strict=True):
        arguments = ["-tr", trainer, "-device", "cpu"]
        for fold in range(2):
            run_nnunet("nnUNetv2_train", dataset.id, "3d_fullres", fold, *arguments, settings={})
        arguments = ["-c", "3d_fullres", "-tr", trainer, "-f", 0, 1, "-o", folder]
        run_nnunet("nnUNetv2_accumulate_crossval_results", dataset.id, *arguments)
    run_nnunet("nnUNetv2_ssl_evaluate", "-ref", dataset.raw / "labelsTr", "-pred", *folders, "-o", tmp_path / "cv")
    lines = (tmp_path / "cv" / "comparison.md").read_text()
    assert all(folder.name in lines for folder in folders)
    cases = (tmp_path / "cv" / folders[1].name / "cases.csv").read_text()
    assert all(case in cases for case in dataset.cases("imagesTr"))
