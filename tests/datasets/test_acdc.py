"""``nnUNetv2_ssl_dataset acdc``: lists of patients, of whom each has several cases."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
from helpers.raw_files import REAL, cases, fold, image, label, nothing_written, write

from nnunet_ssl.commands.dataset import main
from nnunet_ssl.datasets.acdc import make
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
    lists = {key: value for key, value in PROTOCOL.items() if key != "cases_of_patient"}
    (data / "protocol.json").write_text(json.dumps(lists))
    with pytest.raises(UserError, match=r"protocol\.json needs 'cases_of_patient'"):
        main(["acdc", "--data", str(data), "-d", "780"])


def test_without_lists_patients_are_counted(data, fresh_folders):
    (data / "protocol.json").unlink()
    with pytest.raises(UserError, match=r"holds 4 patients .* 20 of them are drawn for testing"):
        main(["acdc", "--data", str(data), "-d", "780"])


def test_the_published_folders(tmp_path, fresh_folders, capsys):
    """25 patients below two folders, each with two frames, their labels, the whole film and a text."""
    files = {"": write(tmp_path / "i.nii.gz", image()), "_gt": write(tmp_path / "l.nii.gz", label(0, 1, 2, 3))}
    patients = [f"patient{number:03d}" for number in range(1, 26)]
    for number, patient in enumerate(patients):
        folder = tmp_path / "ACDC" / ("testing" if number > 20 else "training") / patient
        folder.mkdir(parents=True)
        for end, file in files.items():
            for frame in (1, 9 + number):
                (folder / f"{patient}_frame{frame:02d}{end}.nii.gz").write_bytes(file.read_bytes())
        (folder / f"{patient}_4d.nii.gz").write_bytes(b"the whole film")
        (folder / "Info.cfg").write_text("ED: 1\n")
    main(["acdc", "--data", str(tmp_path / "ACDC"), "--seed", "1", "--labeled", "2", "-d", "780"])
    assert "(5 for training and 20 for testing, of 25)" in capsys.readouterr().out
    dataset = fresh_folders.raw / "Dataset780_ACDCSeed1Labeled2"
    order = np.random.default_rng(0).permutation(patients).tolist()
    train = np.random.default_rng(1).permutation(sorted(order[20:])).tolist()

    def of(folder):
        return {case.split("_")[0] for case in cases(dataset / folder)}

    assert of("imagesTs") == of("labelsTs") == set(order[:20])
    assert of("imagesTr") == of("labelsTr") == set(train[:2])
    assert of("imagesUn") == set(train[2:])
    assert [len(cases(dataset / folder)) for folder in ("imagesTr", "imagesUn", "imagesTs")] == [4, 6, 40]


def test_the_other_fifty_patients_change_no_list(tmp_path, monkeypatch):
    """Whether --data names the training folder or the one above it."""
    drawn = []
    monkeypatch.setattr("nnunet_ssl.datasets.acdc.from_protocol", lambda *given: drawn.append(given[-1]))
    for number in range(1, 151):
        folder = tmp_path / ("training" if number <= 100 else "testing") / f"patient{number:03d}"
        folder.mkdir(parents=True)
        (folder / f"patient{number:03d}_frame01_gt.nii.gz").touch()
    for data in (tmp_path, tmp_path / "training"):
        make(argparse.Namespace(data=data))
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 100


@pytest.mark.skipif(not (REAL / "acdc").is_dir(), reason="the ACDC data are not beside the project")
def test_real_protocol(fresh_folders):
    """Eight orders of 60 patients; the images are left alone, since reading them takes long."""
    train, test, several, cases_of = read_protocol(REAL / "acdc" / "protocol.json", 7)
    assert (len(train), len(test), several) == (60, 20, True)
    assert {len(cases_of[patient]) for patient in train + test} == {2}
