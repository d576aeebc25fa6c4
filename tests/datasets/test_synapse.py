"""``nnUNetv2_ssl_dataset synapse``, and with it what the shared part refuses and mends."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.raw_files import SHAPE, array, cases, fold, image, label, nothing_written, write

from nnunet_ssl import pools
from nnunet_ssl.commands.dataset import main
from nnunet_ssl.datasets import writing
from nnunet_ssl.datasets.synapse import ALL, SPLITS
from nnunet_ssl.errors import UserError

LABELED, UNLABELED = "0023", "0001"  # of --split ga


@pytest.fixture
def data(tmp_path):
    """The 30 cases in RawData/Training, labels as float."""
    folder = tmp_path / "RawData" / "Training"
    first_image = write(folder / "img" / "img0001.nii.gz", image())
    first_label = write(folder / "label" / "label0001.nii.gz", label(*range(14), dtype=np.float32))
    for case in ALL[1:]:
        (folder / "img" / f"img{case}.nii.gz").write_bytes(first_image.read_bytes())
        (folder / "label" / f"label{case}.nii.gz").write_bytes(first_label.read_bytes())
    return tmp_path / "RawData"


def path(data, kind, case):
    return data / "Training" / kind / f"{kind}{case}.nii.gz"


def run(data, *more):
    main(["synapse", "--data", str(data), "-d", "701", *more])


def named(numbers: str) -> list[str]:
    return sorted(f"synapse_{number}" for number in numbers.split())


def test_the_lists_are_those_of_the_protocols():
    """Counts and the unlabeled cases that are published as such."""
    ga = SPLITS["ga"].parts("4")
    assert [case for case, part in ga.items() if part == "unlabeled"] == (
        "0001 0003 0005 0008 0009 0021 0022 0024 0027 0028 0029 0030 0031 0032 0037 0038".split()
    )
    dhc = SPLITS["dhc"]  # as in synapse_data/splits of its authors' repository
    assert (
        dhc.train
        == "0001 0002 0003 0005 0008 0009 0021 0022 0023 0024 0027 0028 0029 0030 0031 0032 0034 0037 0038 0039".split()
    )
    assert dhc.test == "0004 0007 0010 0033 0035 0036".split()
    assert dhc.labeled[8] == "0002 0009 0021 0023 0027 0031 0032 0037".split()
    assert SPLITS["skcdf"].train == (
        "0001 0002 0003 0004 0005 0006 0007 0009 0010 0021 0022 0023 0024 0025 0026 0028 0030 0031 0032 0034".split()
    )
    sizes = {name: tuple(len(x) for x in (s.train, s.validation, s.test)) for name, s in SPLITS.items()}
    assert sizes == {"ga": (20, 4, 6), "dhc": (20, 4, 6), "skcdf": (20, 4, 6), "magicnet": (18, 0, 12)}
    for lists in SPLITS.values():
        for number, labeled in lists.labeled.items():
            assert len(labeled) == number
            assert set(lists.parts(str(number))) == set(ALL)


def test_split_of_ga(data, fresh_folders, monkeypatch):
    monkeypatch.setattr(pools, "PAYS_AFTER", -1.0)  # in other processes, as where there is more to do
    run(data, "-np", "2")
    dataset = fresh_folders.raw / "Dataset701_SynapseGALabeled4"
    labeled, validation = named("0002 0023 0034 0039"), named("0006 0025 0026 0040")
    assert cases(dataset / "imagesTr") == cases(dataset / "labelsTr") == sorted(labeled + validation)
    assert len(cases(dataset / "imagesUn")) == 16
    assert not (dataset / "labelsUn").exists()
    assert cases(dataset / "imagesTs") == cases(dataset / "labelsTs") == named("0004 0007 0010 0033 0035 0036")
    assert fold(fresh_folders, dataset.name) == {"train": labeled, "val": validation}

    content = json.loads((dataset / "dataset.json").read_text())
    assert content["labels"]["portal and splenic veins"] == 10
    assert content["numTraining"] == 8
    assert content["channel_names"] == {"0": "CT"}
    assert content["class_groups"] == {"Large": [1, 2, 3, 6], "Medium": [7, 8, 9, 10, 11], "Small": [4, 5, 12, 13]}

    written = sitk.ReadImage(str(dataset / "imagesTr" / "synapse_0002_0000.nii.gz"))
    assert written.GetPixelID() == sitk.sitkInt16
    assert np.allclose(written.GetSpacing(), (0.7, 0.8, 2.5))
    assert np.allclose(written.GetOrigin(), (3, -4, 5))
    assert (sitk.GetArrayFromImage(written) == image().clip(-125, 275)).all()
    written = sitk.ReadImage(str(dataset / "labelsTr" / "synapse_0002.nii.gz"))
    assert written.GetPixelID() == sitk.sitkUInt8
    assert (sitk.GetArrayFromImage(written) == label(*range(14))).all()


def test_magicnet_validates_on_the_first_five_labeled(data, fresh_folders):
    run(data, "--split", "magicnet", "--labeled", "7")
    found = fold(fresh_folders, "Dataset701_SynapseMagicNetLabeled7")
    assert found["train"] == named("0006 0039 0021 0005 0007 0031 0040")
    assert found["val"] == named("0006 0039 0021 0005 0007")


@pytest.mark.parametrize(
    ("options", "bounds"),
    [(["--split", "dhc"], (-75, 275)), (["--window", "-10", "50"], (-10, 50)), (["--no-window"], (-1000, 1000))],
    ids=["dhc", "own", "none"],
)
def test_windows(data, fresh_folders, options, bounds):
    run(data, *options)
    (dataset,) = fresh_folders.raw.glob("[!.]*")
    assert (array(dataset / "imagesTs" / "synapse_0033_0000.nii.gz") == image().clip(*bounds)).all()
    if "--no-window" in options:  # nothing is done to the image: the same bytes
        assert (dataset / "imagesTs" / "synapse_0033_0000.nii.gz").read_bytes() == path(
            data, "img", "0033"
        ).read_bytes()


def test_own_lists(data, fresh_folders, tmp_path):
    (tmp_path / "labeled.txt").write_text("img0040\n\nimg0039,ct\n")
    (tmp_path / "validation.txt").write_text("0002\n")
    (tmp_path / "train.txt").write_text('["0038", "img0039", "0040"]')
    run(data, "--labeled-list", str(tmp_path / "labeled.txt"), "--validation-list", str(tmp_path / "validation.txt"),
        "--train-list", str(tmp_path / "train.txt"))  # fmt: skip
    dataset = "Dataset701_SynapseGALabeled2"
    assert fold(fresh_folders, dataset) == {"train": named("0039 0040"), "val": named("0002")}
    assert cases(fresh_folders.raw / dataset / "imagesUn") == named("0038")


@pytest.mark.parametrize(
    ("line", "message"),
    [("0006", "not training cases: 0006"), ("0001\n0001", "twice: 0001"), ("no digits", "no case in the line")],
    ids=["a validation case", "twice", "no case"],
)
def test_lists_that_cannot_be(data, fresh_folders, tmp_path, line, message):
    (tmp_path / "labeled.txt").write_text(line)
    with pytest.raises(UserError, match=message):
        run(data, "--labeled-list", str(tmp_path / "labeled.txt"))


def test_sizes_without_a_published_list(data, fresh_folders):
    with pytest.raises(UserError, match=r"--labeled 3: expected 2 or 4 or 8 or all; --labeled-list"):
        run(data, "--labeled", "3")


def test_labels_of_unlabeled_cases_are_not_opened(data, fresh_folders):
    path(data, "label", UNLABELED).unlink()
    path(data, "label", "0003").write_bytes(b"not a label")
    run(data)
    assert "synapse_0001" in cases(fresh_folders.raw / "Dataset701_SynapseGALabeled4" / "imagesUn")


def test_other_orientations_and_an_axis_too_many_are_mended(data, fresh_folders):
    """The label of a LPS image stored as RAS, and an image whose header has a fourth axis."""
    content = label(*range(14))
    write(
        path(data, "label", LABELED),
        content[:, ::-1, ::-1].copy(),
        origin=(3 + 5 * 0.7, -4 + 4 * 0.8, 5),
        direction="RAS",
    )
    stacked = sitk.JoinSeries([sitk.ReadImage(str(path(data, "img", "0034")))])
    assert stacked.GetDimension() == 4
    sitk.WriteImage(stacked, str(path(data, "img", "0034")))
    run(data, "--no-window")
    dataset = fresh_folders.raw / "Dataset701_SynapseGALabeled4"
    assert (array(dataset / "labelsTr" / "synapse_0023.nii.gz") == content).all()
    assert (array(dataset / "imagesTr" / "synapse_0034_0000.nii.gz") == image()).all()


def test_unpacked_files_are_found(data, fresh_folders):
    packed = path(data, "img", LABELED)
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    run(data)
    assert (fresh_folders.raw / "Dataset701_SynapseGALabeled4" / "imagesTr" / "synapse_0023_0000.nii.gz").is_file()


def truncated(data):
    file = path(data, "img", UNLABELED)
    file.write_bytes(file.read_bytes()[:120])


def harm_label(content, **more):
    return lambda data: write(path(data, "label", LABELED), content, **more)


HARMS = {
    "missing image": (lambda data: path(data, "img", UNLABELED).unlink(), "img0001.nii.gz is missing below"),
    "missing label": (lambda data: path(data, "label", LABELED).unlink(), "label0023.nii.gz is missing below"),
    "doubled": (lambda data: write(data / "copy" / "img0001.nii.gz", image()), "img0001.nii.gz is there 2 times"),
    "truncated": (truncated, "synapse_0001: .*img0001.nii.gz cannot be read"),
    "no gzip": (lambda data: path(data, "img", UNLABELED).write_bytes(b"<html>"), "synapse_0001: .*cannot be read"),
    "NaN": (
        lambda data: write(path(data, "img", UNLABELED), image(np.float32) * np.float32("nan")),
        "synapse_0001: .*NaN",
    ),
    "colors": (
        lambda data: sitk.WriteImage(
            sitk.GetImageFromArray(np.zeros((*SHAPE, 3), np.uint8), isVector=True), str(path(data, "img", UNLABELED))
        ),
        "synapse_0001: .*cannot be read|holds 3 values per voxel|expected one volume",
    ),
    "two volumes": (
        lambda data: sitk.WriteImage(
            sitk.JoinSeries([sitk.GetImageFromArray(image())] * 2), str(path(data, "img", UNLABELED))
        ),
        "synapse_0001: .*6 x 5 x 4 x 2, expected one volume",
    ),
    "size": (harm_label(label(0, 1, shape=(4, 5, 7))), "synapse_0023: image and label differ in size: 6 x 5 x 4 and 7"),
    "spacing": (harm_label(label(0, 1), spacing=(0.7, 0.8, 2.0)), "spacing: 0.7 x 0.8 x 2.5 and 0.7 x 0.8 x 2"),
    "origin": (harm_label(label(0, 1), origin=(30.0, -4.0, 5.0)), "differ in origin: 3 x -4 x 5 and 30"),
    # 1.7 voxels, and less than half of a slice's thickness
    "shift in the plane": (harm_label(label(0, 1), origin=(4.2, -4.0, 5.0)), "differ in origin: 3 x -4 x 5 and 4.2"),
    "foreign label": (harm_label(label(0, 14)), r"synapse_0023: the label holds \[14\]"),
    "fractions": (harm_label(label(0, 1).astype(np.float32) / 2), "synapse_0023: the label holds fractions"),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_nothing_is_written_where_a_file_is_wrong(data, fresh_folders, harm):
    do, message = HARMS[harm]
    do(data)
    with pytest.raises(UserError, match=f"nothing was written:\n.*{message}"):
        run(data)
    assert nothing_written(fresh_folders)


def test_all_problems_are_listed_at_once(data, fresh_folders):
    for name in ("missing image", "truncated", "foreign label", "size"):
        if name == "missing image":
            path(data, "img", "0036").unlink()
        elif name == "foreign label":
            write(path(data, "label", "0034"), label(0, 14))
        else:
            HARMS[name][0](data)
    with pytest.raises(UserError) as error:
        run(data)
    text = str(error.value)
    assert [case in text for case in ("img0036", "synapse_0001", "synapse_0034", "synapse_0023")] == [True] * 4
    assert len(text.splitlines()) == 5


def test_voxels_can_be_trusted_over_headers(data, fresh_folders):
    HARMS["origin"][0](data)
    run(data, "--trust-voxels")
    dataset = fresh_folders.raw / "Dataset701_SynapseGALabeled4"
    written = sitk.ReadImage(str(dataset / "labelsTr" / "synapse_0023.nii.gz"))
    assert np.allclose(written.GetOrigin(), (3, -4, 5))


def test_a_killed_run_leaves_no_dataset(data, fresh_folders, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            run(data)
    assert nothing_written(fresh_folders)
    leftover = fresh_folders.raw / ".Dataset701_SynapseGALabeled4.0123" / "imagesTr" / "leftover"  # of a killed one
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    run(data)
    (dataset,) = fresh_folders.raw.glob("[!.]*")
    assert dataset.name == "Dataset701_SynapseGALabeled4"
    assert not (dataset / "imagesTr" / "leftover").exists()


def test_wrong_folders_and_windows(data, fresh_folders):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        run(data / "nowhere")
    with pytest.raises(UserError, match="--window 5 1: the first"):
        run(data, "--window", "5", "1")
