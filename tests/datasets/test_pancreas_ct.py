"""``nnUNetv2_ssl_dataset pancreas_ct`` on made-up DICOM series and labels with the archive's names and quirks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.raw_files import array, cases, fold, nothing_written, write, write_dicom

from nnunet_ssl.commands.dataset import main
from nnunet_ssl.datasets.cases import Case
from nnunet_ssl.datasets.pancreas_ct import LABELED, LISTS, TEST, edit, resample
from nnunet_ssl.errors import UserError

SHAPE, SPACING = (4, 8, 10), (0.8, 0.8, 1.0)
FEW = {"train": [*LABELED[:6], "0002"], "test": TEST[:2]}
UP, DOWN = FEW["train"][:2]  # slices numbered from the feet and from the head


def scan() -> np.ndarray:
    """Fat with an organ of 80 HU in one corner, and air."""
    content = np.full(SHAPE, -100, np.int16)
    content[0, 0, 0] = -1000
    content[2:, 5:, 1:4] = 80
    return content


def truth(numbers: list[int]) -> np.ndarray:
    """The organ, slices in the order of their numbers."""
    return (scan() == 80).astype(np.uint8)[np.argsort(numbers)]


def series(case: str) -> list[int]:
    return [4, 3, 2, 1] if case == DOWN else [1, 2, 3, 4]


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "manifest"
    for case in FEW["train"] + FEW["test"]:
        folder = root / "Pancreas-CT" / f"PANCREAS_{case}" / f"11-24-2015-PANCREAS{case}" / "Pancreas-99667"
        write_dicom(folder, scan(), SPACING, series(case))
        write(
            root / "TCIA_pancreas_labels-02-05-2017" / f"label{case}.nii.gz",
            truth(series(case)),
            spacing=SPACING,
            direction="LAS",  # the header does not fit the DICOM one
        )
    for name, found in FEW.items():
        (tmp_path / f"{name}.list").write_text("".join(f"image{case}\n" for case in found))
    return root


def run(data, *more):
    lists = [f"--{name}-list={data.parent / name}.list" for name in FEW]
    main(["pancreas_ct", "--data", str(data), "-d", "721", *lists, *more])


def label_file(data: Path, case: str) -> Path:
    return data / "TCIA_pancreas_labels-02-05-2017" / f"label{case}.nii.gz"


def dicom_folder(data: Path, case: str) -> Path:
    return next((data / "Pancreas-CT" / f"PANCREAS_{case}").glob("*/*"))


def test_the_lists_are_mc_nets():
    assert len(LISTS.train) == len(set(LISTS.train)) == 62
    assert not set(LISTS.train) & set(LISTS.test)
    parts = LISTS.parts("12")
    assert [case for case, part in parts.items() if part == "labeled"][5:7] == ["0017", "0032"]
    assert set(parts) == {f"{number:04d}" for number in range(1, 83)}


def test_archive_files(data, fresh_folders):
    run(data)
    dataset = fresh_folders.raw / "Dataset721_PancreasCTLabeled6"
    labeled = sorted(f"pancreas_{case}" for case in LABELED[:6])
    assert fold(fresh_folders, dataset.name)["train"] == labeled
    assert fold(fresh_folders, dataset.name)["val"] == sorted(f"pancreas_{case}" for case in LABELED[:5])
    assert cases(dataset / "imagesUn") == ["pancreas_0002"]
    assert cases(dataset / "labelsTs") == sorted(f"pancreas_{case}" for case in TEST[:2])
    for case in (UP, DOWN):
        written = sitk.ReadImage(str(dataset / "imagesTr" / f"pancreas_{case}_0000.nii.gz"))
        organ = sitk.ReadImage(str(dataset / "labelsTr" / f"pancreas_{case}.nii.gz"))
        assert (sitk.GetArrayFromImage(written) == scan().clip(-125, 275)).all()
        assert (sitk.GetArrayFromImage(organ) == (scan() == 80)).all()
        assert organ.GetPixelID() == sitk.sitkUInt8
        for volume in (written, organ):
            assert np.allclose(volume.GetSpacing(), SPACING)
            assert np.allclose(volume.GetOrigin(), (-10, -20, 0))


def misplaced(data):
    write(label_file(data, UP), truth([4, 3, 2, 1])[:, ::-1].copy(), spacing=SPACING)


def gap(data):
    (dicom_folder(data, UP) / "1-002.dcm").unlink()


def emptied(data):
    shutil.rmtree(data / "Pancreas-CT" / "PANCREAS_0002")


def second_series(data):
    folder = dicom_folder(data, UP)
    shutil.copytree(folder, folder.with_name("again"))


def broken(data):
    for file in dicom_folder(data, UP).iterdir():
        file.write_bytes(b"no DICOM")


def renumbered(data):
    folder = dicom_folder(data, UP)
    shutil.rmtree(folder)
    write_dicom(folder, scan(), SPACING, [1, 3, 2, 4])


HARMS = {
    "misplaced": (misplaced, f"pancreas_{UP}: the label's median is -100 HU"),
    "gap": (gap, f"pancreas_{UP}: .*slices are 1 to 2 mm apart"),
    "empty": (emptied, r"PANCREAS_0002/\*\*/\*.dcm is missing"),
    "two": (second_series, "is there 2 times"),
    "broken": (broken, f"pancreas_{UP}: .*holds 0 DICOM series"),
    "order": (renumbered, f"pancreas_{UP}: .*not numbered in the order"),
    "depth": (lambda d: write(label_file(d, UP), truth([1, 2, 3, 4])[1:], spacing=SPACING), "differ in size"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_nothing_is_written_where_a_file_is_wrong(data, fresh_folders, harm):
    do, message = HARMS[harm]
    do(data)
    with pytest.raises(UserError, match=message):
        run(data)
    assert nothing_written(fresh_folders)


def test_cases_can_be_left_out(data, fresh_folders):
    emptied(data)
    label_file(data, UP).unlink()
    run(data, "--leave-out", "0002", UP)
    assert len(cases(fresh_folders.raw / "Dataset721_PancreasCTLabeled5" / "imagesTr")) == 5


def test_resampling_keeps_the_extent():
    """A linear ramp sampled elsewhere is the same ramp."""
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32), (6, 8, 40)).copy()
    old = sitk.GetImageFromArray(ramp)
    old.SetSpacing((0.5, 1.0, 2.0))
    old.SetOrigin((7.0, 0.0, 0.0))
    new = resample(old, (1.0, 1.0, 1.0), sitk.sitkLinear)
    assert new.GetSize() == (20, 8, 12)
    assert np.allclose(new.GetOrigin(), (7.25, 0, -0.5))
    row = sitk.GetArrayFromImage(new)[5, 4]
    assert np.allclose(row, np.arange(20) * 2 + 0.5)


def test_crop_and_resample_are_asked_for(data, fresh_folders):
    run(data, "--crop-to-label")  # also opens the label of the unlabeled case
    dataset = fresh_folders.raw / "Dataset721_PancreasCTLabeled6"
    assert array(dataset / "imagesUn" / "pancreas_0002_0000.nii.gz").shape == (4, 6, 8)  # 1 mm; smaller than 96 is kept
    assert not (dataset / "labelsUn").exists()
    large = np.zeros((3, 200, 300), np.int16)
    large[:, 100:150, 100:110] = 80
    volume = sitk.GetImageFromArray(large)
    organ = sitk.Cast(volume > 0, sitk.sitkUInt8)
    case = Case("pancreas_0002", "unlabeled", Path(), None)
    cut, _ = edit(case, volume, organ, to_1mm=True, crop=True)
    assert cut.GetSize() == (96, 100, 3)  # x: 10 + 50 is less than 96; y: 50 + 50; z whole
    assert edit(case, volume, None, to_1mm=False, crop=False)[1] is None


def test_h5_files(data, fresh_folders, tmp_path):
    h5py = pytest.importorskip("h5py")
    folder = tmp_path / "h5"
    folder.mkdir()
    for case in FEW["train"] + FEW["test"]:
        with h5py.File(folder / f"image{case}_norm.h5", "w") as file:
            file["image"] = scan().transpose(2, 1, 0) / np.float32(100)
            file["label"] = truth([1, 2, 3, 4]).transpose(2, 1, 0)
    run(data, "--data", str(folder))
    dataset = fresh_folders.raw / "Dataset721_PancreasCTLabeled6"
    assert np.allclose(array(dataset / "imagesTs" / f"pancreas_{TEST[0]}_0000.nii.gz"), scan() / 100)
    with pytest.raises(UserError, match="cut already"):
        run(data, "--data", str(folder), "--crop-to-label")
