"""Folders: every case is measured or named."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.label_maps import SHAPE, SPACING, labels, write, write_dataset

from nnunet_ssl import pools
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation import folders
from nnunet_ssl.evaluation.classes import read_dataset
from nnunet_ssl.evaluation.folders import evaluate_folders
from nnunet_ssl.evaluation.metrics import Options, case_metrics


def evaluate(home, methods=("a",), options=None, **more):
    """Evaluate what ``write_dataset`` has written."""
    predictions = {method: str(home / method) for method in methods}
    dataset = read_dataset(str(home / "labels"), list(predictions.values()))
    return evaluate_folders(str(home / "labels"), predictions, dataset, options or Options(), **more)


def test_each_case_and_method_has_its_own_metrics(tmp_path):
    write_dataset(tmp_path, ("a", "b"))
    cases = evaluate(tmp_path, ("a", "b"))
    assert [case.name for case in cases] == ["case_0", "case_1", "case_2", "case_3"]
    for i, case in enumerate(cases):
        for j, method in enumerate("ab", start=1):
            expected = case_metrics(labels(10 * i), labels(10 * i + j), [1, 2, 3], SPACING, Options())
            np.testing.assert_equal(case.metrics[method], expected)
            assert case.predictions[method] == str(tmp_path / method / f"case_{i}.nii.gz")


def test_pool_gives_the_same(tmp_path, monkeypatch):
    write_dataset(tmp_path)
    serial = evaluate(tmp_path)
    monkeypatch.setattr(pools, "PAYS_AFTER", 0)
    np.testing.assert_equal([c.metrics for c in evaluate(tmp_path, num_processes=2)], [c.metrics for c in serial])


def test_problem_in_a_worker_is_named(tmp_path, monkeypatch):
    write_dataset(tmp_path)
    monkeypatch.setattr(pools, "PAYS_AFTER", 0)
    write(tmp_path / "a" / "case_3.nii.gz", labels(0).astype(np.float32) + 0.5)
    with pytest.raises(UserError, match=r"case_3.nii.gz cannot be read \(its voxels are not whole numbers\)"):
        evaluate(tmp_path, num_processes=2)


def test_all_files_that_are_missing_are_named(tmp_path):
    write_dataset(tmp_path, ("a", "b"))
    (tmp_path / "a" / "case_1.nii.gz").unlink()
    (tmp_path / "b" / "case_2.nii.gz").unlink()
    (tmp_path / "labels" / "case_3.nii.gz").unlink()
    with pytest.raises(UserError) as error:
        evaluate(tmp_path, ("a", "b"))
    for text in ("4 problem", f"{tmp_path}/a/case_1.nii.gz is missing", f"{tmp_path}/b/case_2.nii.gz is missing",
                 f"{tmp_path}/labels/case_3.nii.gz is missing, but a has", "but b has", "--chill"):  # fmt: skip
        assert text in str(error.value)


def test_what_is_missing_and_what_lies_on_another_grid_are_named_at_once(tmp_path):
    write_dataset(tmp_path)
    (tmp_path / "a" / "case_1.nii.gz").unlink()
    write(tmp_path / "a" / "case_2.nii.gz", SMALL)
    with pytest.raises(UserError, match=r"2 problem(.|\n)*case_1.nii.gz is missing(.|\n)*case_2.nii.gz has .*shape"):
        evaluate(tmp_path)


def test_chill_evaluates_what_all_have_and_names_the_rest(tmp_path, capsys):
    write_dataset(tmp_path, ("a", "b"))
    (tmp_path / "a" / "case_1.nii.gz").unlink()
    (tmp_path / "labels" / "case_3.nii.gz").unlink()
    assert [case.name for case in evaluate(tmp_path, ("a", "b"), chill=True)] == ["case_0", "case_2"]
    assert f"Left out: {tmp_path}/a/case_1.nii.gz is missing" in capsys.readouterr().out


def test_no_case_in_common(tmp_path):
    write_dataset(tmp_path)
    for file in (tmp_path / "a").iterdir():
        file.rename(file.with_name(f"other_{file.name}"))
    with pytest.raises(UserError, match=r"no \.nii\.gz file of .*labels is in every prediction folder"):
        evaluate(tmp_path, chill=True)


SMALL = np.zeros((SHAPE[0], SHAPE[1], SHAPE[2] - 1), np.uint8)
FLIPPED = (-1, 0, 0, 0, 1, 0, 0, 0, 1)


@pytest.mark.parametrize(
    ("array", "geometry", "message"),
    [
        (SMALL, {}, r"has the shape \(6, 8, 9\), the truth \(6, 8, 10\)"),
        (labels(0), {"spacing": (2, 1, 0.6)}, r"has the spacing \(2.0, 1.0, 0.6\), the truth \(2.0, 1.0, 0.5\)"),
        (labels(0), {"origin": (0, 0, 3)}, r"has the origin \(0.0, 0.0, 3.0\), the truth \(0.0, 0.0, 0.0\)"),
        (labels(0), {"direction": FLIPPED}, r"has the direction \(-1.0, 0.0"),
    ],
)
@pytest.mark.parametrize("headers", [True, False])
def test_another_grid_is_refused(tmp_path, monkeypatch, array, geometry, message, headers):
    """Before anything is measured, by the headers; and where these cannot be compared, by what was read."""
    write_dataset(tmp_path, num_cases=2)
    write(tmp_path / "a" / "case_1.nii.gz", array, **geometry)
    measured = []
    monkeypatch.setattr(folders, "evaluate_case", lambda *args, f=folders.evaluate_case: measured.append(1) or f(*args))
    if not headers:
        monkeypatch.setattr(folders, "_header_problems", lambda case, reader: [])
    with pytest.raises(UserError, match=rf"1 problem\(s\)\.\n  .*case_1.nii.gz {message}"):
        evaluate(tmp_path)
    assert bool(measured) != headers


def test_rounding_of_headers_is_no_difference(tmp_path):
    write_dataset(tmp_path, num_cases=1)
    write(tmp_path / "a" / "case_0.nii.gz", labels(1), (2.0000001, 1.0000001, 0.5), origin=(1e-5, 0, 0))
    assert len(evaluate(tmp_path)) == 1


def test_files_that_are_cut_off_or_no_images_are_all_named(tmp_path):
    """SimpleITK reads the first one as a whole one."""
    write_dataset(tmp_path)
    file = tmp_path / "a" / "case_1.nii.gz"
    write(file, np.random.default_rng(0).integers(0, 4, SHAPE).astype(np.uint8))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"a/case_1.nii.gz cannot be read \(Compressed file ended before"):
        evaluate(tmp_path)
    (tmp_path / "a" / "case_2.nii.gz").write_text("no image")
    with pytest.raises(UserError, match=r"a/case_2.nii.gz cannot be read"):
        evaluate(tmp_path)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd"])
@pytest.mark.parametrize("share", ["one", "all"])
def test_predictions_that_are_not_numbers(tmp_path, ending, share):
    """SimpleITK reads NaN of a NIfTI file as 0, the background."""
    write_dataset(tmp_path, num_cases=2, ending=ending)
    array = labels(11).astype(np.float32)
    array[(0, 0, 0) if share == "one" else ...] = np.nan
    write(tmp_path / "a" / f"case_1{ending}", array)
    with pytest.raises(UserError, match=rf"a/case_1{ending}: \d+ voxel\(s\) are NaN or infinite"):
        evaluate(tmp_path)


@pytest.mark.parametrize("where", ["a", "labels"])
def test_labels_that_nobody_declared_are_named(tmp_path, where):
    """They would count as background: Dice 0 for a perfect prediction whose 255 should be 1."""
    truth = write_dataset(tmp_path)
    write(tmp_path / where / "case_2.nii.gz", 255 * (labels(20) > 0).astype(np.uint8))
    message = r"case_2.nii.gz holds the label\(s\) 255, but .*dataset.json has only 0, 1, 2, 3$"
    with pytest.raises(UserError, match=rf"1 problem.*\n  .*{where}/{message}"):
        evaluate(tmp_path)
    write(truth / "case_2.nii.gz", np.arange(480, dtype=np.int16).reshape(SHAPE))  # an image for a label map
    with pytest.raises(UserError, match=r"holds the label\(s\) 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, \.\.\., but"):
        evaluate(tmp_path)


def test_labels_of_regions_and_the_ignore_label_are_declared(tmp_path):
    regions = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    write_dataset(tmp_path, labels=regions, regions_class_order=[1, 2])
    assert len(evaluate(tmp_path)) == 4
    write(tmp_path / "a" / "case_1.nii.gz", labels(11) + 1)
    with pytest.raises(UserError, match=r"case_1.nii.gz holds the label\(s\) 4, but"):
        evaluate(tmp_path)


def test_without_dataset_json_predictions_hold_the_labels_of_the_truth(tmp_path):
    truth = write_dataset(tmp_path)
    (tmp_path / "dataset.json").unlink()
    assert len(evaluate(tmp_path)) == 4
    for case in range(4):
        write(truth / f"case_{case}.nii.gz", 255 * (labels(10 * case) > 0).astype(np.uint8))
    with pytest.raises(UserError, match=r"a/case_0.nii.gz holds the label\(s\) 1, 2, 3, but .*labels .* only 0, 255"):
        evaluate(tmp_path)


def test_many_problems_are_counted(tmp_path, monkeypatch):
    write_dataset(tmp_path)
    monkeypatch.setattr(folders, "MAX_PROBLEMS", 1)
    for i in range(4):
        (tmp_path / "a" / f"case_{i}.nii.gz").unlink()
    with pytest.raises(UserError, match=r"4 problem\(s\)(.|\n)*case_0(.|\n)*and 3 more$"):
        evaluate(tmp_path)


@pytest.mark.parametrize("ending", [".png", ".nii", ".nrrd"])
def test_other_formats(tmp_path, ending):
    write_dataset(tmp_path, num_cases=1, ending=ending)
    [case] = evaluate(tmp_path)
    truth, guess, spacing = labels(0), labels(1), SPACING
    if ending == ".png":
        truth, guess, spacing = truth[0], guess[0], (1, 1)
    np.testing.assert_equal(case.metrics["a"], case_metrics(truth, guess, [1, 2, 3], spacing, Options()))


def test_shift_is_seen_by_nibabel_too(tmp_path):
    write_dataset(tmp_path, num_cases=1, ending=".nii")
    write(tmp_path / "a" / "case_0.nii", labels(1), origin=(5, 0, 0))
    with pytest.raises(UserError, match="has the origin"):
        evaluate(tmp_path)
