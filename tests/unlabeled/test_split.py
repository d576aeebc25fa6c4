"""A labeled dataset turned into one with few labels: who is what, what is linked, and what nobody can see."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import datasets
from helpers.datasets import TinyDataset

from nnunet_ssl.commands import split as command
from nnunet_ssl.errors import UserError
from nnunet_ssl.self_training.dataset import read_source
from nnunet_ssl.unlabeled import raw_dataset
from nnunet_ssl.unlabeled.find import with_spacing
from nnunet_ssl.unlabeled.groups import groups_of_dataset
from nnunet_ssl.unlabeled.split import choose, split_dataset

CASES = [f"case_{i:02d}" for i in range(20)]


def files_below(folder: Path) -> dict[str, bytes]:
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and not f.name.endswith("-lock"))
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


GROUPS = {case: f"patient_{i // 3}" for i, case in enumerate(CASES[:18])}  # the last two are patients by themselves


def pick(labeled: str, val: str | None = None, test: str | None = None, seed: int = 0, groups: dict | None = None):
    return choose(CASES, labeled, val, test, seed, "Dataset004_X", groups)


def test_orders_are_nested_whatever_the_validation_cases_are():
    sets = [set(pick(n, val).labeled) for val in (None, "3", "0.2") for n in ("2", "5", "10", "12")]
    assert [len(s) for s in sets] == [2, 5, 10, 12] * 3
    assert sets[0:4] == sets[4:8] == sets[8:12]
    assert sets[0] < sets[1] < sets[2] < sets[3]
    assert pick("2", "3").validation == pick("12", "3").validation
    assert set(pick("2", "3").validation) < set(pick("2", "6").validation)
    assert pick("5", seed=1).labeled != pick("5", seed=0).labeled
    assert pick("5") == pick("5")


def test_every_case_is_one_thing(tmp_path):
    (tmp_path / "test.txt").write_text("case_03\ncase_07\n\n")
    split = pick("0.25", "2", str(tmp_path / "test.txt"))
    assert split.test == ["case_03", "case_07"]
    assert len(split.labeled) == round(0.25 * 18)
    assert len(split.validation) == 2
    assert sorted(itertools.chain(*split)) == CASES
    assert pick("0.001").labeled == pick("1").labeled
    assert len(pick("12", "8").unlabeled) == 0


def test_lists_are_taken_as_they_are_and_nobody_else_gets_their_cases(tmp_path):
    (tmp_path / "labeled.json").write_text('["case_09", "case_01"]')
    (tmp_path / "val.txt").write_text("case_00\r\ncase_02\r\n")
    split = pick(str(tmp_path / "labeled.json"), str(tmp_path / "val.txt"))
    assert split.labeled == ["case_01", "case_09"]
    assert split.validation == ["case_00", "case_02"]
    ten, five = (pick(n, str(tmp_path / "val.txt")).labeled for n in ("10", "5"))
    assert set(five) < set(ten)
    assert not {"case_00", "case_02"} & set(ten)


def patients(cases: list[str]) -> set[str]:
    return {GROUPS.get(case, case) for case in cases}


@pytest.mark.parametrize("seed", range(5))
def test_no_patient_is_in_two_parts(tmp_path, seed):
    """Numbers count patients, each with all cases; what a list leaves of its patients is nobody else's."""
    (tmp_path / "test.txt").write_text("case_00\ncase_03\n")
    for test, free in ((None, 8), (str(tmp_path / "test.txt"), 6)):
        nested = [pick(n, "2", test, seed, GROUPS) for n in ("1", "2", "0.5")]
        assert [len(patients(split.labeled)) for split in nested] == [1, 2, free // 2]
        assert set(nested[0].labeled) < set(nested[1].labeled) < set(nested[2].labeled)
        for split in nested:
            assert len(patients(split.validation)) == 2
            assert split.validation == nested[0].validation
            assert sorted(itertools.chain(*split)) == CASES
            for one, other in itertools.combinations((split.labeled, split.validation, split.test), 2):
                assert not patients(one) & patients(other)
            if test is None:
                assert not patients(split.unlabeled) & patients([*split.labeled, *split.validation])
    with pytest.raises(UserError, match=r"ask for 9 patients, but Dataset004_X has 8 that no list names \(8 in all\)"):
        pick("7", "2", seed=seed, groups=GROUPS)


def test_lists_that_part_a_patient_are_refused(tmp_path):
    files = {}
    for case in ("case_00", "case_01", "case_03"):
        files[case] = str(tmp_path / case)
        (tmp_path / case).write_text(case)
    for options in ((0, 1, None), (0, None, 1), (None, 0, 1)):
        values = [value if value is None else files[f"case_0{value}"] for value in options]
        values[0] = values[0] or "1"
        with pytest.raises(UserError, match="of the patient patient_0; list them under one of the two"):
            pick(*values, groups=GROUPS)
        assert pick(*values)  # without groups they are strangers
    assert pick(files["case_00"], files["case_03"], groups=GROUPS).labeled == ["case_00"]


def test_without_groups_splits_are_as_they_always_were(tmp_path):
    """The cases of a seed, as the version before groups drew them."""
    (tmp_path / "test.txt").write_text("case_03\ncase_07\n")
    split = pick("0.25", "2", str(tmp_path / "test.txt"), 3)
    assert split.labeled == ["case_01", "case_02", "case_14", "case_17"]
    assert split.validation == ["case_08", "case_10"]
    assert pick("0.25", "2", str(tmp_path / "test.txt"), 3, {}) == split


@pytest.fixture
def split(tiny_copy, capsys):
    dataset: TinyDataset = tiny_copy("3d")

    def run(*arguments: str) -> tuple[TinyDataset, Path, str]:
        command.main(["-d", str(dataset.id), "-o", "951", *arguments])
        (folder,) = dataset.folders.raw.glob("Dataset951*")
        return dataset, folder, capsys.readouterr().out

    return run


@pytest.mark.parametrize("copied", [False, True])
def test_writes_what_nnunet_reads(split, copied):
    dataset, folder, out = split("--labeled", "2", "--val", "1", *(["--copy"] if copied else []))
    assert folder.name == "Dataset951_Tiny_2labeled"
    record = json.loads((folder / "ssl_split.json").read_text())
    (fold,) = json.loads((folder / "splits_final.json").read_text())
    assert fold == {"train": record["labeled"], "val": record["validation"]}
    assert (dataset.folders.preprocessed / folder.name / "splits_final.json").read_bytes() == (
        folder / "splits_final.json"
    ).read_bytes()
    dataset_json = json.loads((folder / "dataset.json").read_text())
    assert dataset_json == {**dataset.dataset_json, "numTraining": 3, "name": folder.name}

    seen = {*record["labeled"], *record["validation"]}
    hidden = set(dataset.cases("imagesTr")) - seen
    already = set(dataset.cases("imagesUn"))
    assert set(record["unlabeled"]) == hidden | already
    expected = {"dataset.json", "splits_final.json", "ssl_split.json"}
    expected |= {f"imagesTr/{case}_0000.nii.gz" for case in seen} | {f"labelsTr/{case}.nii.gz" for case in seen}
    expected |= {f"imagesUn/{case}_0000.nii.gz" for case in hidden | already}
    content = files_below(folder)
    assert set(content) == expected
    for name, data in content.items():
        if "/" in name:
            where = "imagesUn" if Path(name).name.removesuffix("_0000.nii.gz") in already else "imagesTr"
            source = dataset.raw / name.replace("imagesUn", where)
            assert data == source.read_bytes()
            assert (folder / name).is_symlink() is not copied
            if not copied:
                assert not os.path.isabs(os.readlink(folder / name))
    assert f"{folder.name}: 2 labeled, 1 validation, 6 unlabeled and 0 test cases" in out
    assert "nnUNetv2_plan_and_preprocess -d 951" in out
    assert all(f.name.endswith("-lock") for f in dataset.folders.raw.glob(".*"))


def test_test_cases_and_no_validation_cases(split, tiny, tmp_path):
    case = tiny("3d").cases("imagesTr")[1]
    (tmp_path / "test.txt").write_text(case)
    _, folder, out = split("--labeled", "2", "--test", str(tmp_path / "test.txt"), "--name", "Mine")
    assert folder.name == "Dataset951_Mine"
    assert "the labeled cases also serve as validation cases" in out
    record = json.loads((folder / "ssl_split.json").read_text())
    (fold,) = json.loads((folder / "splits_final.json").read_text())
    assert fold["train"] == fold["val"] == record["labeled"]
    assert record["test"] == [case]
    assert case not in record["labeled"] + record["unlabeled"]
    assert (folder / "imagesTs" / f"{case}_0000.nii.gz").exists()
    assert (folder / "labelsTs" / f"{case}.nii.gz").exists()


def test_a_dataset_json_that_lists_its_files(tiny_copy):
    """nnU-Net also takes explicit paths instead of imagesTr; the new dataset has the usual folders."""
    dataset = tiny_copy("multichannel")
    (dataset.raw / "imagesTr").rename(dataset.raw / "elsewhere")
    cases = dataset.cases("elsewhere")
    explicit = {
        f"named_{case}": {
            "images": [f"elsewhere/{case}_{channel:04d}.nii.gz" for channel in range(2)],
            "label": str(dataset.raw / "labelsTr" / f"{case}.nii.gz"),
        }
        for case in cases
    }
    (dataset.raw / "dataset.json").write_text(json.dumps({**dataset.dataset_json, "dataset": explicit}))
    name, split = split_dataset(dataset.id, 951, "2", "1")
    folder = dataset.folders.raw / name
    assert "dataset" not in json.loads((folder / "dataset.json").read_text())
    for case in split.labeled:
        for channel in range(2):
            source = dataset.raw / "elsewhere" / f"{case.removeprefix('named_')}_{channel:04d}.nii.gz"
            assert (folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz").read_bytes() == source.read_bytes()


@pytest.mark.timeout(180)
def test_a_hidden_label_is_never_opened_and_changes_nothing(tiny_copy, make_trainer):
    """Hidden labels become pipes, which nobody can open without waiting for ever: split, plan, prepare and train."""
    dataset = tiny_copy("3d")
    made, weights = [], []
    for target in (951, 952):
        name, split = split_dataset(dataset.id, target, "2", "1", name="Few")
        splits = (dataset.folders.raw / name / "splits_final.json").read_bytes()
        few = datasets.plan_and_preprocess(
            dataclasses.replace(dataset.recipe, dataset_id=target, name="Few"), dataset.folders
        )
        assert (few.preprocessed / "splits_final.json").read_bytes() == splits  # survives planning
        trainer = make_trainer("nnUNetTrainerCPS_1epochs", few)
        trainer.run_training()
        weights.append(trainer.network.state_dict())

        documents = {n: c.replace(name.encode(), b"") for n, c in files_below(few.preprocessed).items() if "json" in n}
        del documents[f"{few.plans_name}_{few.configuration}_unlabeled/manifest.json"]
        arrays = few.preprocessed / f"{few.plans_name}_{few.configuration}"
        made.append(documents | {case: arrays_of(arrays, case) for case in (*split.labeled, *split.validation)})
        for case in set(dataset.cases("imagesTr")) & set(split.unlabeled):
            label = dataset.raw / "labelsTr" / f"{case}.nii.gz"
            if not label.is_fifo():
                label.unlink()
                os.mkfifo(label)
    assert {"dataset_fingerprint.json", f"{dataset.plans_name}.json", "splits_final.json"} <= set(made[0])
    assert made[0] == made[1]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def arrays_of(folder: Path, case: str) -> tuple[bytes, bytes]:
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    data, seg, *_ = nnUNetDatasetBlosc2(str(folder), [case]).load_case(case)
    return data[:].tobytes(), seg[:].tobytes()


def test_a_failed_split_leaves_nothing(tiny_copy, monkeypatch):
    dataset = tiny_copy("3d")
    before = files_below(dataset.folders.raw.parent)
    split = choose(dataset.cases("imagesTr"), "2", "1", None, 0, dataset.name)
    label = dataset.raw / "labelsTr" / f"{split.validation[0]}.nii.gz"
    content = label.read_bytes()
    label.unlink()
    with pytest.raises(UserError, match=f"{label} does not exist"):
        split_dataset(dataset.id, 951, "2", "1")
    label.write_bytes(content)
    monkeypatch.setattr(os, "symlink", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    with pytest.raises(UserError, match=r"Operation not permitted.*--copy"):
        split_dataset(dataset.id, 951, "2", "1")
    assert files_below(dataset.folders.raw.parent) == before
    assert all(file.name.endswith("-lock") for file in dataset.folders.raw.glob(".*"))


def test_a_folder_that_cannot_be_written_is_said_first(tiny_copy, monkeypatch):
    """Not after every image has been read; and not as a crash, where only the lock shows it."""
    dataset = tiny_copy("3d")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    with pytest.raises(UserError, match=f"{dataset.folders.raw} is not writable"):
        split_dataset(dataset.id, 951, "2", "1")
    monkeypatch.setattr(os, "access", access)

    def read_only(*_):
        raise PermissionError(13, "Permission denied", "the lock")

    monkeypatch.setattr("nnunet_ssl.unlabeled.raw_dataset.holding", read_only)
    with pytest.raises(UserError, match=r"the lock cannot be written \(Permission denied\)"):
        split_dataset(dataset.id, 951, "2", "1")


@pytest.mark.parametrize("value", ["²", "٣", "1" * 401, "1" * 5000], ids=["superscript", "arabic", "401", "5000"])
def test_a_number_is_of_plain_digits(split, value):
    with pytest.raises(UserError, match=r"--labeled .* (does not exist|cannot be read)"):
        split("--labeled", value)


def explicit(tiny: TinyDataset, named: str, **changes: object) -> None:
    """``dataset.json`` lists its files, one of its cases under another name."""
    names = dict(zip(tiny.cases("imagesTr"), [*tiny.cases("imagesTr")[:-1], named], strict=True))
    entries = {
        name: {"images": [f"imagesTr/{case}_0000.nii.gz"], "label": f"labelsTr/{case}.nii.gz"}
        for case, name in names.items()
    }
    content = {**tiny.dataset_json, "file_ending": ".nii.gz", "dataset": entries, **changes}
    (tiny.raw / "dataset.json").write_text(json.dumps(content))


@pytest.mark.parametrize("copy", [False, True])
def test_a_foreign_dataset_json_writes_nothing_elsewhere(tiny_copy, tmp_path, copy):
    """An absolute name and no ending overwrote any file; so did ``..``."""
    dataset = tiny_copy("3d")
    home = tmp_path / "home"
    home.mkdir()
    (home / "mine_0000").write_text("mine")
    before = files_below(dataset.folders.raw.parent)
    for named in (str(home / "mine"), "../../../home/mine", "..", ".hidden", "", "a\\b", "a\x00b", "x" * 256):
        for ending in ("", ".nii.gz"):
            explicit(dataset, named, file_ending=ending)
            with pytest.raises(UserError, match=r"dataset\.json: (case|file_ending) "):
                split_dataset(dataset.id, 951, "4", "1", copy=copy)
    for ending in ("nii.gz", "/../../x", "./../x", ".", 3, None):
        explicit(dataset, "tr_04", file_ending=ending)
        with pytest.raises(UserError, match=r"dataset\.json: file_ending "):
            split_dataset(dataset.id, 951, "4", "1", copy=copy)
    explicit(dataset, "tr_04")
    del before[f"raw/{dataset.name}/dataset.json"]
    after = files_below(dataset.folders.raw.parent)
    del after[f"raw/{dataset.name}/dataset.json"]
    assert after == before
    assert files_below(home) == {"mine_0000": b"mine"}
    assert split_dataset(dataset.id, 951, "4", "1", copy=copy)[1].labeled


@pytest.mark.parametrize("place", ["raw", "preprocessed", "kept by nnUNetv2_ssl_warp --groups"])
def test_who_is_of_which_patient_goes_along(tiny_copy, place):
    dataset = tiny_copy("3d")
    kept = dataset.preprocessed / "nnUNetPlans_3d_fullres_warped_groups.json"
    file = {"raw": dataset.raw / "groups.json", "preprocessed": dataset.preprocessed / "groups.json"}.get(place, kept)
    file.write_text('{"tr_00": "p", "un_00": "p"}')
    name, _ = split_dataset(dataset.id, 951, "2", "1")
    assert groups_of_dataset(name) == {"tr_00": "p", "un_00": "p"}
    assert json.loads((dataset.folders.raw / name / "groups.json").read_text()) == {"tr_00": "p", "un_00": "p"}


@pytest.mark.parametrize("place", ["raw", "preprocessed"])
@pytest.mark.parametrize("part", ["test", "validation"])
def test_who_is_of_which_patient_is_obeyed(tiny_copy, tmp_path, capsys, place, part):
    """Further images of a patient who tests or validates are nobody's to train on, in the source's imagesUn neither."""
    dataset = tiny_copy("3d")
    first, second, *others = dataset.cases("imagesTr")
    groups = {first: "p", second: "p", dataset.cases("imagesUn")[0]: "p", **dict.fromkeys(others, "q")}
    (getattr(dataset, place) / "groups.json").write_text(json.dumps(groups))
    (tmp_path / "test.txt").write_text(first)
    name, split = split_dataset(dataset.id, 951, "1", **{part: str(tmp_path / "test.txt")})
    assert split.labeled == others  # one patient
    assert split.unlabeled == dataset.cases("imagesUn")[1:]
    assert sorted(dataset.folders.raw.joinpath(name, "imagesUn").iterdir()) == [
        dataset.folders.raw / name / "imagesUn" / f"{case}_0000.nii.gz" for case in split.unlabeled
    ]
    out = capsys.readouterr().out
    assert f"2 further images of validation and test patients are left out ({second}, " in out
    with pytest.raises(UserError, match=r"--labeled 2 \(2\) ask for 2 patients"):
        split_dataset(dataset.id, 952, "2", **{part: str(tmp_path / "test.txt")})


def test_hidden_files_are_no_cases(tiny_copy):
    dataset = tiny_copy("3d")
    for case in dataset.cases("imagesTr"):  # as macOS leaves them
        (dataset.raw / "imagesTr" / f"._{case}_0000.nii.gz").write_bytes(b"resource fork")
    _, split = split_dataset(dataset.id, 951, "2", "1")
    assert {*split.labeled, *split.validation, *split.unlabeled} == {
        *dataset.cases("imagesTr"), *dataset.cases("imagesUn")
    } - {name for name in dataset.cases("imagesTr") if name.startswith(".")}  # fmt: skip


def test_an_image_that_is_not_there_is_no_case_less(tiny_copy):
    dataset = tiny_copy("3d")
    images = {part: dataset.raw / part / f"{dataset.cases(part)[0]}_0000.nii.gz" for part in ("imagesTr", "imagesUn")}
    for image in images.values():
        moved = image.rename(image.with_name("moved"))
        image.symlink_to("nowhere.nii.gz")
        with pytest.raises(UserError, match=rf"{image} is a link that leads nowhere \(nowhere.nii.gz\). Bring"):
            split_dataset(dataset.id, 951, "2", "1")
        image.unlink()
        moved.rename(image)
    label = dataset.raw / "labelsTr" / images["imagesTr"].name.replace("_0000", "")
    label.unlink()
    label.symlink_to("nowhere.nii.gz")
    with pytest.raises(UserError, match=rf"{label} is a link that leads nowhere"):
        split_dataset(dataset.id, 951, "4", "1")
    explicit(dataset, "tr_04")
    images["imagesTr"].unlink()
    with pytest.raises(UserError, match=rf"{images['imagesTr']} does not exist. Bring"):
        split_dataset(dataset.id, 951, "2", "1")
    explicit(dataset, "tr_04", dataset={"tr_01": {"images": ["imagesTr/tr_01_0000.nii.gz"]}})
    with pytest.raises(UserError, match=r"dataset.json names no label of case tr_01"):
        split_dataset(dataset.id, 951, "1")


def test_a_split_that_could_not_be_finished_can_be_run_again(tiny_copy):
    dataset = tiny_copy("3d")
    raw, preprocessed = dataset.folders.raw, dataset.folders.preprocessed
    in_the_way = preprocessed / "Dataset951_Tiny_2labeled"
    in_the_way.write_text("")
    with pytest.raises(UserError, match=f"{in_the_way} cannot be written"):
        split_dataset(dataset.id, 951, "2", "1")
    assert [folder.name for folder in raw.iterdir() if not folder.name.endswith("-lock")] == [dataset.name]
    in_the_way.unlink()

    # killed before the raw half had its name; the image in it was not whole
    (raw / f".{in_the_way.name}.0123" / "imagesTr").mkdir(parents=True)
    in_the_way.mkdir()
    (in_the_way / "splits_final.json").write_text("[")
    name, split = split_dataset(dataset.id, 951, "2", "1")
    [fold] = json.loads((in_the_way / "splits_final.json").read_text())
    assert fold == {"train": split.labeled, "val": split.validation}
    assert sorted(folder.name for folder in raw.glob("[!.]*")) == [dataset.name, name]

    (raw / name).rename(raw / "elsewhere")
    (in_the_way / "nnUNetPlans.json").write_text("{}")  # somebody has worked with it
    with pytest.raises(UserError, match="exists already"):
        split_dataset(dataset.id, 951, "2", "1")


def test_a_link_that_lies_in_wait_is_not_followed(tiny_copy, tmp_path):
    """In a shared folder of raw datasets, where the new one is being built."""
    dataset = tiny_copy("3d")
    (tmp_path / "mine").mkdir()
    for name in (".Dataset951_Tiny_2labeled", ".Dataset951_Tiny_2labeled.x"):
        (dataset.folders.raw / name).symlink_to(tmp_path / "mine")
    split_dataset(dataset.id, 951, "2", "1")
    assert not list((tmp_path / "mine").iterdir())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "lists no case"),
        (b"[]", "lists no case"),
        (b'["case_01"', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"{}", "names {}, which is not a labeled case"),
        (b"[[1]]", r"names \[1\], which is not a labeled case"),
        (None, "cannot be read"),
    ],
)
def test_a_damaged_list_is_named(tmp_path, content, says):
    file = tmp_path / "list.txt"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file}.* {says}"):
        pick(str(file))


def test_a_list_may_begin_with_a_byte_order_mark(tmp_path):
    for text in ("case_01\r\ncase_02", '["case_01", "case_02"]'):
        (tmp_path / "list.txt").write_text(text, encoding="utf-8-sig")
        assert pick(str(tmp_path / "list.txt")).labeled == ["case_01", "case_02"]


def test_numbers_that_no_dataset_has(tmp_path):
    with pytest.raises(UserError, match="ask for 1000000 cases"):
        pick("1000000")
    for number in ("9" * 5000, "²"):
        with pytest.raises(UserError, match=r"does not exist\. Give a number"):
            pick(number)


def test_one_process_makes_a_dataset_at_a_time(tiny_copy):
    """The first of two must not find its folder removed as what a killed one has left."""
    dataset = tiny_copy("3d")
    raw, target = dataset.folders.raw, "Dataset951_Tiny_2labeled"
    with raw_dataset.new_dataset(str(raw), target, False) as building:
        Path(building, "file").touch()
        with pytest.raises(UserError, match=f"another process is making {target}: wait"):
            split_dataset(dataset.id, 951, "2", "1")
        assert Path(building, "file").is_file()
    assert (raw / target / "file").is_file()
    with pytest.raises(UserError, match=f"{target} exists already"), raw_dataset.new_dataset(str(raw), target, False):
        pass


@pytest.mark.parametrize("make", [os.symlink, shutil.copyfile], ids=["link", "copy"])
def test_a_labeled_image_is_not_unlabeled_under_another_name(tiny_copy, make):
    """Neither for a split, whose test case it may be, nor for a student, whose validation case it may be."""
    dataset = tiny_copy("3d")
    labeled = dataset.cases("imagesTr")[0]
    image = dataset.raw / "imagesUn" / "followup_0000.nii.gz"
    make(dataset.raw / "imagesTr" / f"{labeled}_0000.nii.gz", image)
    for read in (lambda: split_dataset(dataset.id, 951, "2", "1"), lambda: read_source(dataset.name, "0")):
        with pytest.raises(UserError, match=f"{image} is the image of {labeled}, a labeled or validation case"):
            read()


def test_a_missing_channel_is_not_filled_by_the_next(tiny_copy):
    """Channels are numbered anew."""
    dataset = tiny_copy("multichannel")
    for folder, case in (("imagesUn", dataset.cases("imagesUn")[0]), ("imagesTr", dataset.cases("imagesTr")[0])):
        second = dataset.raw / folder / f"{case}_0001.nii.gz"
        moved = second.rename(second.with_name(f"{case}_0002.nii.gz"))
        with pytest.raises(UserError, match=f"case {case} has the channel files {case}_0000.*{case}_0002"):
            split_dataset(dataset.id, 951, "1", "1", seed=1)
        moved.rename(second)


def test_the_spacing_of_a_tiff_goes_by_the_name_of_its_file(tmp_path):
    """As nnU-Net's reader does it; ``dataset.json`` may give the case another name."""
    for name in ("s2.json", "s2_0000.tif", "x_0001.tif", "x_0001.json", "x.json"):
        (tmp_path / name).touch()
    image, label = str(tmp_path / "s2_0000.tif"), str(tmp_path / "x_0001.tif")
    assert with_spacing("patient2", [image]) == [image, str(tmp_path / "s2.json")]
    assert with_spacing("x_0001", [label]) == [label, str(tmp_path / "x_0001.json")]
    (tmp_path / "s2.json").unlink()
    assert with_spacing("patient2", [image]) == [image]
