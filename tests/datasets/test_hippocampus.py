"""``nnUNetv2_ssl_dataset hippocampus`` on a made-up folder of the same layout, and on the real one if it is there."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.raw_files import REAL, fold, nothing_written, write

from nnunet_ssl.commands.dataset import main
from nnunet_ssl.datasets.protocol_json import Drawn, draw_lists
from nnunet_ssl.errors import UserError

TRAIN, TEST = [f"case_{i}" for i in range(6)], ["test_0", "test_1"]


@pytest.fixture
def data(tmp_path):
    """Eight cases and two orders."""
    folder = tmp_path / "data"
    rng = np.random.default_rng(0)
    for sub in ("images", "labels"):
        (folder / sub).mkdir(parents=True)
    for case in TRAIN + TEST:
        image = rng.normal(size=(6, 7, 8)).astype(np.float32)
        label = rng.integers(0, 3, image.shape).astype(np.float32)
        sitk.WriteImage(sitk.GetImageFromArray(image), str(folder / "images" / f"{case}.nii.gz"))
        sitk.WriteImage(sitk.GetImageFromArray(label), str(folder / "labels" / f"{case}.nii.gz"))
    protocol = {"train": TRAIN, "test": TEST, "labelled_order": [TRAIN, TRAIN[::-1]]}
    (folder / "protocol.json").write_text(json.dumps(protocol))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(file.name.replace("_0000", "").removesuffix(".nii.gz") for file in folder.iterdir())


def test_first_cases_of_the_order_keep_their_labels(data, fresh_folders):
    main(["hippocampus", "--data", str(data), "--seed", "1", "--labeled", "2", "-d", "640"])
    dataset = fresh_folders.raw / "Dataset640_HippocampusSeed1Labeled2"
    assert names(dataset / "imagesTr") == names(dataset / "labelsTr") == ["case_4", "case_5"]
    assert names(dataset / "imagesUn") == ["case_0", "case_1", "case_2", "case_3"]
    assert names(dataset / "imagesTs") == names(dataset / "labelsTs") == TEST
    assert fold(fresh_folders, dataset.name) == {"train": ["case_4", "case_5"], "val": ["case_4", "case_5"]}
    label = sitk.ReadImage(str(dataset / "labelsTr" / "case_4.nii.gz"))
    assert label.GetPixelID() == sitk.sitkUInt8


def test_all_labels(data, fresh_folders):
    main(["hippocampus", "--data", str(data), "--labeled", "all", "-d", "649"])
    dataset = fresh_folders.raw / "Dataset649_HippocampusAllLabels"
    assert names(dataset / "labelsTr") == TRAIN
    assert not (dataset / "imagesUn").exists()


def truncate(data):
    file = data / "images" / "case_3.nii.gz"
    file.write_bytes(file.read_bytes()[:100])


def other_label(data):
    file = data / "labels" / "test_1.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(np.full((6, 7, 8), 7, np.float32)), str(file))


def not_finite(data):
    sitk.WriteImage(
        sitk.GetImageFromArray(np.full((6, 7, 8), np.nan, np.float32)), str(data / "images" / "case_0.nii.gz")
    )


def other_size(data):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((6, 7, 9), np.float32)), str(data / "labels" / "case_1.nii.gz"))


def order_with_a_stranger(data):
    protocol = json.loads((data / "protocol.json").read_text())
    protocol["labelled_order"][0][0] = "stranger"
    (data / "protocol.json").write_text(json.dumps(protocol))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "case_3: .*cannot be read"),
        (other_label, r"test_1: the label holds \[7\]"),
        (not_finite, "case_0: .*case_0.nii.gz: 336 voxel.* are NaN"),
        (other_size, "case_1: image and label differ"),
        (lambda data: (data / "labels" / "case_1.nii.gz").unlink(), r"case_1.nii.gz is missing"),
        (order_with_a_stranger, "order 0"),
    ],
    ids=["truncated", "foreign label", "NaN", "size", "missing", "order"],
)
def test_nothing_is_written_where_a_file_is_wrong(data, fresh_folders, harm, message):
    harm(data)
    with pytest.raises(UserError, match=message):
        main(["hippocampus", "--data", str(data), "--labeled", "2", "-d", "640"])
    assert all(file.name.endswith("-lock") for file in fresh_folders.raw.iterdir())
    assert list(fresh_folders.preprocessed.iterdir()) == []


@pytest.mark.parametrize("labeled", ["0", "6", "some"])
def test_impossible_numbers_of_labels(data, fresh_folders, labeled):
    with pytest.raises(UserError, match=f"--labeled {labeled}"):
        main(["hippocampus", "--data", str(data), "--labeled", labeled, "-d", "640"])


def test_an_id_is_not_taken_twice(data, fresh_folders):
    main(["hippocampus", "--data", str(data), "--labeled", "2", "-d", "640"])
    with pytest.raises(UserError, match="Dataset640_HippocampusSeed0Labeled2 exists"):
        main(["hippocampus", "--data", str(data), "--labeled", "3", "-d", "640"])


def test_labels_of_unlabeled_cases_are_not_opened(data, fresh_folders):
    (data / "labels" / "case_3.nii.gz").unlink()
    (data / "labels" / "case_4.nii.gz").write_bytes(b"not a label")
    main(["hippocampus", "--data", str(data), "--labeled", "2", "-d", "640"])


@pytest.fixture
def published(tmp_path):
    """The archive of the Decathlon: gaps in the numbers, files of macOS, test images without labels, dataset.json."""
    folder = tmp_path / "Task04_Hippocampus"
    content = {
        "images": write(tmp_path / "image.nii.gz", np.arange(120, dtype=np.float32).reshape(4, 5, 6)).read_bytes(),
        "labels": write(tmp_path / "label.nii.gz", np.resize(np.uint8([0, 1, 2]), (4, 5, 6))).read_bytes(),
    }
    for kind, data in content.items():
        (folder / f"{kind}Tr").mkdir(parents=True)
        for case in PUBLISHED:
            (folder / f"{kind}Tr" / f"{case}.nii.gz").write_bytes(data)
            (folder / f"{kind}Tr" / f"._{case}.nii.gz").write_bytes(b"\0\5\x16\7Mac OS X")
    (folder / "imagesTs").mkdir()
    (folder / "imagesTs" / "hippocampus_002.nii.gz").write_bytes(content["images"])
    (folder / "dataset.json").write_text('{"name": "Hippocampus", "modality": {"0": "MRI"}}')
    return folder


PUBLISHED = [f"hippocampus_{number:03d}" for number in range(1, 310) if number % 3]  # 206 cases


def parts(dataset: Path) -> dict[str, set[str]]:
    return {sub: set(names(dataset / sub)) for sub in ("imagesTr", "labelsTr", "imagesUn", "imagesTs", "labelsTs")}


def test_the_published_folder(published, fresh_folders, capsys):
    for seed in (0, 1):
        main(["hippocampus", "--data", str(published), "--seed", str(seed), "-d", str(640 + seed)])
    said = capsys.readouterr().out
    assert "the lists were drawn (160 for training and 40 for testing, of 206)" in said
    assert "not with docs/results.md" in said
    zero, one = (parts(fresh_folders.raw / f"Dataset64{seed}_HippocampusSeed{seed}Labeled5") for seed in (0, 1))
    for found in (zero, one):
        assert found["imagesTr"] == found["labelsTr"]
        assert found["imagesTs"] == found["labelsTs"]
        assert [len(found[sub]) for sub in ("imagesTr", "imagesUn", "imagesTs")] == [5, 155, 40]
        assert set.union(*found.values()) < set(PUBLISHED)
        assert not found["imagesTs"] & (found["imagesTr"] | found["imagesUn"])
    assert zero["imagesTs"] == one["imagesTs"]
    assert zero["imagesTr"] | zero["imagesUn"] == one["imagesTr"] | one["imagesUn"]
    assert zero["imagesTr"] != one["imagesTr"]


def test_drawn_lists_are_those_of_the_documented_rule(tmp_path):
    order = np.random.default_rng(0).permutation(sorted(PUBLISHED)).tolist()
    train, test = draw_lists(PUBLISHED[::-1], 3, tmp_path, Drawn(40, 160))
    assert test == order[:40]
    assert train == np.random.default_rng(3).permutation(sorted(order[40:200])).tolist()
    # whatever version of NumPy: results on drawn lists are to compare
    assert [*test[:2], *train[:2]] == ["hippocampus_194", "hippocampus_175", "hippocampus_271", "hippocampus_061"]


def test_a_smaller_dataset_has_fewer_training_cases(tmp_path):
    train, test = draw_lists(PUBLISHED[:60], 0, tmp_path, Drawn(40, 160))
    assert (len(train), len(test)) == (20, 40)
    with pytest.raises(UserError, match="holds 41 cases"):
        draw_lists(PUBLISHED[:41], 0, tmp_path, Drawn(40, 160))
    with pytest.raises(UserError, match="--seed -1"):
        draw_lists(PUBLISHED, -1, tmp_path, Drawn(40, 160))


def test_a_protocol_beside_the_published_folders(published, fresh_folders, capsys):
    protocol = {"train": PUBLISHED[:3], "test": PUBLISHED[3:5], "labelled_order": [PUBLISHED[:3]]}
    (published / "protocol.json").write_text(json.dumps(protocol))
    main(["hippocampus", "--data", str(published), "--labeled", "1", "-d", "640"])
    assert "drawn" not in capsys.readouterr().out
    found = parts(fresh_folders.raw / "Dataset640_HippocampusLabeled1")
    assert found["labelsTr"] == {PUBLISHED[0]}
    assert found["labelsTs"] == set(PUBLISHED[3:5])


@pytest.mark.parametrize("text", ["{", "[]", '{"train": [], "test": []}'])
def test_a_protocol_of_another_form(data, fresh_folders, text):
    (data / "protocol.json").write_text(text)
    with pytest.raises(UserError, match=r"protocol.json .*Write \{\"train\""):
        main(["hippocampus", "--data", str(data), "-d", "640"])


def test_another_folder(tmp_path, fresh_folders):
    with pytest.raises(UserError, match="holds neither imagesTr nor images"):
        main(["hippocampus", "--data", str(tmp_path), "-d", "640"])


@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_full_disk_is_a_sentence(data, fresh_folders, kind):
    """Files cannot grow beyond a size that leaves no room for one kind of them; images are copied, labels made."""
    rng = np.random.default_rng(0)
    for case in TRAIN + TEST:
        for sub in ("images", "labels"):
            big = sub.startswith(kind)
            content = rng.integers(0, 3, (20, 20, 20)) if big else np.zeros((20, 20, 20))
            sitk.WriteImage(sitk.GetImageFromArray(content.astype(np.uint8)), str(data / sub / f"{case}.nii.gz"))
    command = [sys.executable, "-B", "-m", "nnunet_ssl.commands", "dataset", "hippocampus"]
    run = subprocess.run(
        [*command, "--data", str(data), "--labeled", "2", "-d", "640"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "cannot be written (" in run.stderr
    assert "Nothing was kept." in run.stderr
    assert nothing_written(fresh_folders)


@pytest.mark.skipif(not (REAL / "hippocampus").is_dir(), reason="the hippocampus data are not beside the project")
def test_real_data(fresh_folders):
    main(["hippocampus", "--data", str(REAL / "hippocampus"), "--seed", "2", "-d", "640"])
    dataset = fresh_folders.raw / "Dataset640_HippocampusSeed2Labeled5"
    count = {sub: len(list((dataset / sub).iterdir())) for sub in ("imagesTr", "labelsTr", "imagesUn", "imagesTs")}
    assert count == {"imagesTr": 5, "labelsTr": 5, "imagesUn": 155, "imagesTs": 40}
