"""``nnUNetv2_ssl_dataset acdc``: lists of patients, of whom each has several cases."""

from __future__ import annotations

import json

import pytest
from helpers.raw_files import REAL, cases, fold, image, label, nothing_written, write

from nnunet_ssl.commands.dataset import main
from nnunet_ssl.datasets.protocol_json import read_protocol
from nnunet_ssl.errors import UserError

TRAIN, TEST = ["p1", "p2", "p3"], ["p4"]
CASES = {patient: [f"{patient}_frame01", f"{patient}_frame{i + 7:02d}"] for i, patient in enumerate(TRAIN + TEST)}
PROTOCOL = {
    "train": TRAIN,
    "test": TEST,
    "labelled_order": [TRAIN, TRAIN[::-1]],
    "cases_of_patient": CASES | {"p5": ["p5_frame01"]},  # in no list
}


@pytest.fixture
def data(tmp_path):
    """Four patients with two cases each, and two orders."""
    folder = tmp_path / "data"
    for case in (case for patient in TRAIN + TEST for case in CASES[patient]):
        write(folder / "images" / f"{case}.nii.gz", image())
        write(folder / "labels" / f"{case}.nii.gz", label(0, 1, 2, 3))
    (folder / "protocol.json").write_text(json.dumps(PROTOCOL))
    return folder


def test_all_cases_of_a_patient_are_in_one_part(data, fresh_folders):
    main(["acdc", "--data", str(data), "--seed", "1", "--labeled", "2", "-d", "780"])
    dataset = fresh_folders.raw / "Dataset780_ACDCSeed1Labeled2"
    labeled = sorted(CASES["p3"] + CASES["p2"])
    assert cases(dataset / "imagesTr") == cases(dataset / "labelsTr") == labeled
    assert cases(dataset / "imagesUn") == CASES["p1"]
    assert cases(dataset / "imagesTs") == cases(dataset / "labelsTs") == CASES["p4"]
    assert fold(fresh_folders, dataset.name)["train"] == labeled
    groups = json.loads((dataset / "groups.json").read_text())
    assert groups == {case: patient for patient in TRAIN + TEST for case in CASES[patient]}


@pytest.mark.parametrize("labeled", ["3", "0"])
def test_numbers_are_of_patients(data, fresh_folders, labeled):
    with pytest.raises(UserError, match=rf"--labeled {labeled}: expected 1 to 2 or all"):
        main(["acdc", "--data", str(data), "--labeled", labeled, "-d", "780"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p2": []}, "names no case of p2"),
        ({"p2": CASES["p4"]}, "names a case twice: p4_frame01, p4_frame10"),
        ({"p2": ["other"]}, "other.nii.gz is missing"),
        ([], "cannot be read"),
    ],
    ids=["none", "of two patients", "no such file", "list"],
)
def test_wrong_cases_of_patients(data, fresh_folders, change, message):
    patients = CASES | change if isinstance(change, dict) else change
    (data / "protocol.json").write_text(json.dumps(PROTOCOL | {"cases_of_patient": patients}))
    with pytest.raises(UserError, match=message):
        main(["acdc", "--data", str(data), "--labeled", "2", "-d", "780"])
    assert nothing_written(fresh_folders)


def test_lists_of_cases_would_split_patients(data, fresh_folders):
    (data / "protocol.json").unlink()
    with pytest.raises(UserError, match=r"protocol\.json with 'cases_of_patient' is needed"):
        main(["acdc", "--data", str(data), "-d", "780"])


@pytest.mark.skipif(not (REAL / "acdc").is_dir(), reason="the ACDC data are not beside the project")
def test_real_protocol(fresh_folders):
    """Eight orders of 60 patients; the images are left alone, since reading them takes long."""
    train, test, several, cases_of = read_protocol(REAL / "acdc" / "protocol.json", 7)
    assert (len(train), len(test), several) == (60, 20, True)
    assert {len(cases_of[patient]) for patient in train + test} == {2}
