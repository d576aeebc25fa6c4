"""``nnUNetv2_ssl_dataset brats2019`` on made-up files with the challenge's folders and names."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.raw_files import array, cases, fold, label, write

from nnunet_ssl.commands.dataset import main
from nnunet_ssl.errors import UserError

CASES = [f"BraTS19_TCIA01_{number}_1" for number in range(4)] + ["BraTS19_2013_10_1", "BraTS19_CBICA_AAP_1"]
TRAIN, VALIDATION, TEST = CASES[3::-1], CASES[4:5], CASES[5:]


def brain() -> np.ndarray:
    """Zero around a box with one bright voxel among 1199."""
    content = np.zeros((14, 12, 16), np.int16)
    content[1:11, 1:11, 2:14] = np.arange(1200).reshape(10, 10, 12) % 100 + 1
    content[4, 4, 4] = 30000
    return content


@pytest.fixture
def data(tmp_path):
    for number, case in enumerate(CASES):
        folder = tmp_path / "MICCAI_BraTS_2019_Data_Training" / ("HGG" if number % 2 else "LGG") / case
        for kind in ("flair", "t1"):
            write(folder / f"{case}_{kind}.nii.gz", brain(), spacing=(1, 1, 1), direction="LPS")
        write(folder / f"{case}_seg.nii.gz", label(0, 1, 2, 4, shape=(14, 12, 16)), spacing=(1, 1, 1))
    for name, found in (("train", TRAIN), ("val", VALIDATION), ("test", TEST)):
        (tmp_path / f"{name}.txt").write_text("\n".join(found) + "\n")
    return tmp_path


def run(data, *more):
    lists = [("train", "train"), ("validation", "val"), ("test", "test")]
    options = [text for option, name in lists for text in (f"--{option}-list", str(data / f"{name}.txt"))]
    main(["brats2019", "--data", str(data), "-d", "731", "--labeled", "2", *options, *more])


def test_challenge_files(data, fresh_folders):
    run(data)
    dataset = fresh_folders.raw / "Dataset731_BraTS2019Labeled2"
    assert fold(fresh_folders, dataset.name) == {"train": sorted(TRAIN[:2]), "val": VALIDATION}
    assert cases(dataset / "imagesUn") == sorted(TRAIN[2:])
    assert cases(dataset / "imagesTs") == cases(dataset / "labelsTs") == TEST
    assert (array(dataset / "labelsTr" / f"{TRAIN[0]}.nii.gz") == label(0, 1, 1, 1, shape=(14, 12, 16))).all()
    written, original = array(dataset / "imagesUn" / f"{TRAIN[2]}_0000.nii.gz"), brain()
    assert written.shape == original.shape
    assert written[4, 4, 4] == 100  # the 99.9th percentile lies below the one bright voxel of 1200
    written[4, 4, 4] = original[4, 4, 4] = 0
    assert (written == original).all()


def test_h5_files_of_ssl4mis(data, fresh_folders, tmp_path):
    h5py = pytest.importorskip("h5py")
    folder = tmp_path / "data"
    folder.mkdir()
    for case in CASES:
        with h5py.File(folder / f"{case}.h5", "w") as file:
            file["image"], file["label"] = brain().astype(np.float32), label(0, 1, shape=(14, 12, 16))
    run(data, "--data", str(folder))
    dataset = fresh_folders.raw / "Dataset731_BraTS2019Labeled2"
    assert (array(dataset / "imagesTr" / f"{TRAIN[0]}_0000.nii.gz") == brain()).all()


def test_lists_are_needed_and_must_fit_the_files(data, fresh_folders):
    with pytest.raises(UserError, match="--train-list, --validation-list and --test-list are needed"):
        main(["brats2019", "--data", str(data), "-d", "731"])
    (data / "test.txt").write_text("BraTS19_CBICA_XYZ_1\n")
    with pytest.raises(UserError, match=r"BraTS19_CBICA_XYZ_1(_flair.nii.gz|.h5) is missing"):
        run(data)
    (data / "test.txt").write_text(TRAIN[0])
    with pytest.raises(UserError, match=f"hold a case twice: {TRAIN[0]}"):
        run(data)
