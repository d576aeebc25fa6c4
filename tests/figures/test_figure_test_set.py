"""Which cases are shown, of the test set or of the fold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.figure_folders import MadeUp, make_folders, set_environment, write

from nnunet_ssl.errors import UserError
from nnunet_ssl.figures.test_set import cases_in_words, find_cases


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    set_environment(monkeypatch, tmp_path)
    return make_folders(tmp_path)


def test_validation_cases_where_there_is_no_test_set(made: MadeUp) -> None:
    cases = find_cases(990, "0")
    assert [case.name for case in cases] == ["a", "b", "c"]
    assert all(case.kind == "validation" and case.label.is_file() and case.images[0].is_file() for case in cases)
    with pytest.raises(UserError, match=r"has 1 fold\(s\), but not -f 3. It must name the validation cases"):
        find_cases(990, "3")
    cases = find_cases(990, "all")
    assert len(cases) == 3
    assert cases_in_words(cases) == f"3 training cases, truth from `{made.raw / 'labelsTr'}`"


def test_test_cases_with_a_truth_come_first(made: MadeUp, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("t1", "t2"):
        write(np.zeros((3, 4, 5), np.float32), made.raw / f"imagesTs/{name}_0000.nii.gz")
    assert find_cases(990, "0")[0].kind == "validation", "no labelsTs"
    write(np.zeros((3, 4, 5), np.uint8), made.raw / "labelsTs/t2.nii.gz")
    (case,) = find_cases(990, "0")
    assert (case.name, case.kind) == ("t2", "test")
    assert capsys.readouterr().out.rstrip().endswith(": t1")


def test_a_validation_case_without_image(made: MadeUp) -> None:
    (made.raw / "imagesTr/b_0000.nii.gz").unlink()
    with pytest.raises(UserError, match="validation case b"):
        find_cases(990, "0")
