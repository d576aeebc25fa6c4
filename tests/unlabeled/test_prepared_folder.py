"""The folder of prepared images in the hands of many: trainings that read it, copies, full disks, files of others."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.datasets import TinyDataset
from helpers.prepared import add_images, fingerprint, image, load, made, on_disk, prepare, prepared_in, recorded
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.errors import UserError
from nnunet_ssl.locks import share
from nnunet_ssl.unlabeled.prepare import prepare_unlabeled


@pytest.fixture
def mounted() -> Iterator[Callable[..., None]]:
    """``mounted(folder, *options)`` mounts something there for this test, where that is allowed."""
    folders = set()

    def mount(folder: Path, *options: str | Path) -> None:
        if subprocess.run(["mount", *options, folder], capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system")
        folders.add(folder)

    yield mount
    for folder in folders:
        subprocess.run(["umount", "--lazy", folder], check=True)


# ------------------------------------------------------------------ what a training reads


def read_in_another_process(dataset: TinyDataset) -> Any:
    """A process that reads what is prepared as a training does, until it is killed."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def training() -> None:
        prepare(dataset, reading=True)
        ready.set()
        time.sleep(600)

    process = context.Process(target=training, daemon=True)
    process.start()
    assert ready.wait(60)
    return process


def end(process: Any) -> None:
    process.kill()
    process.join()


def test_what_a_training_reads_stays_until_it_ends(tiny_copy, capsys):
    dataset = tiny_copy("3d")
    began_with = prepare(dataset)
    training = read_in_another_process(dataset)
    try:
        folder, (removed, changed, *_) = began_with.folder, began_with.cases
        files = fingerprint(folder)
        before = {case: load(place, case) for case, place in began_with.places.items()}
        image(dataset, removed).unlink()
        sitk.WriteImage(sitk.ReadImage(str(image(dataset, changed))) * 2, str(image(dataset, changed)))
        now = prepare(dataset)
        assert "2 prepared images in" in (told := capsys.readouterr().out)
        assert "stay until no training reads them" in told
        assert now.cases == began_with.cases[1:]
        assert now.places[changed] != began_with.places[changed]
        plans = dataset.plans
        plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 1.0]
        other = prepare(dataset, plans=plans)
        assert load(other.places[changed], changed)[0].shape[1] == 10
        for case, place in began_with.places.items():
            assert all(map(np.array_equal, load(place, case), before[case]))
            for file in Path(place).iterdir():
                assert files[file.name][1:] == (file.stat().st_ino, file.stat().st_mtime_ns, file.stat().st_size)
        # what nobody read has gone
        assert not Path(now.places[changed]).exists()
    finally:
        end(training)
    capsys.readouterr()
    prepare(dataset, plans=plans)
    assert "removed 4 prepared images" in capsys.readouterr().out
    assert on_disk(folder) == made(*other.cases)


def test_a_training_goes_on_with_the_images_that_it_began_with(tiny_copy, make_trainer, monkeypatch):
    """The same batches, whatever another start finds: the loader opens its files anew for each of them."""
    monkeypatch.setattr("nnunet_ssl.trainers.data.get_allowed_n_proc_DA", lambda: 0)

    def batches(number: int, disturb: Callable[[], object]) -> list:
        trainer = make_trainer("nnUNetTrainerCPS", dataset)
        trainer.unlabeled = trainer._prepared_unlabeled()
        loader, _ = trainer.get_dataloaders()
        first = next(loader)["unlabeled"]
        disturb()
        return [first, *(next(loader)["unlabeled"] for _ in range(number - 1))]

    def disturb() -> None:
        removed, changed, *_ = dataset.cases("imagesUn")
        image(dataset, removed).unlink()
        sitk.WriteImage(sitk.ReadImage(str(image(dataset, changed))) * 3, str(image(dataset, changed)))
        prepare(dataset)

    dataset = tiny_copy("3d")
    expected = batches(6, lambda: None)
    for was, now in zip(expected, batches(6, disturb), strict=True):
        assert np.array_equal(was, now)


def test_a_training_that_comes_between_sees_the_new_images(tiny_copy, monkeypatch):
    """Another start replaces an image after the training has read the manifest, and before it has said so."""
    dataset = tiny_copy("3d")
    old = prepare(dataset)
    case = old.cases[0]

    def share_late(file: str) -> None:
        monkeypatch.setattr("nnunet_ssl.unlabeled.store.share", share)
        sitk.WriteImage(sitk.ReadImage(str(image(dataset, case))) * 2, str(image(dataset, case)))
        prepare(dataset)
        share(file)

    monkeypatch.setattr("nnunet_ssl.unlabeled.store.share", share_late)
    new = prepare(dataset, reading=True)
    assert not Path(old.places[case]).exists()
    assert new.contents[case] != old.contents[case]
    assert Path(new.places[case]).is_dir()


def test_where_there_are_no_locks_nothing_is_removed_and_it_is_said(tiny_copy, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    dataset = tiny_copy("3d")
    old = prepare(dataset, reading=True)
    image(dataset, old.cases[0]).unlink()
    new = prepare(dataset)
    assert new.cases == old.cases[1:]
    assert "delete the folder while no training reads it" in capsys.readouterr().out
    assert on_disk(old.folder) == made(*old.cases)


# ------------------------------------------------------------------ copies


def copied(dataset: TinyDataset) -> None:
    """As after ``cp -r``: the same content, other times."""
    for file in [*dataset.raw.rglob("*"), *prepared_in(dataset).rglob("*")]:
        os.utime(file, ns=(10**18, 10**18))


def test_a_copied_dataset_is_not_prepared_again_and_read_once(tiny_copy, monkeypatch, capsys):
    dataset = tiny_copy("3d")
    prepared = prepare(dataset)
    copied(dataset)
    capsys.readouterr()
    assert prepare(dataset) == prepared
    assert capsys.readouterr() == ("", "")
    with monkeypatch.context() as patch:
        patch.setattr("nnunet_ssl.files.hashlib", None)  # reading any image fails from now on
        assert prepare(dataset) == prepared
        file = image(dataset, prepared.cases[0])
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        os.utime(file, ns=(10**18, 10**18))
        assert prepare(dataset) == prepared  # the price of not reading
    os.utime(file, ns=(10**18, 10**18 + 1))
    with pytest.raises(UserError, match=f"{prepared.cases[0]}_0000.nii.gz cannot be read"):
        prepare(dataset)


def test_a_copy_that_is_read_only_trains(tiny_copy, make_trainer, mounted, capsys):
    dataset = tiny_copy("3d")
    prepared = prepare(dataset)
    copied(dataset)
    train, *val = dataset.cases("imagesTr")  # nnU-Net would write them
    (dataset.preprocessed / "splits_final.json").write_text(json.dumps([{"train": [train], "val": val}]))
    before = sorted(prepared_in(dataset).rglob("*"))
    mounted(dataset.preprocessed, "--bind", dataset.preprocessed)
    mounted(dataset.preprocessed, "-o", "remount,ro,bind")
    with pytest.raises(OSError, match="Read-only"):
        (prepared_in(dataset) / "x").touch()
    assert prepare(dataset, reading=True) == prepared
    trainer = make_trainer("nnUNetTrainerCPS", dataset)
    trainer.unlabeled = trainer._prepared_unlabeled()
    assert next(trainer.get_dataloaders()[0])["unlabeled"].shape[0] == 2
    assert sorted(prepared_in(dataset).rglob("*")) == before
    image(dataset, prepared.cases[0]).unlink()
    with pytest.raises(UserError, match=r"_unlabeled cannot be written \(Read-only file system\)"):
        prepare(dataset)


def test_a_copy_of_a_labeled_image_is_refused(tiny_copy):
    dataset = tiny_copy("3d")
    (one, two), labeled = dataset.cases("imagesUn")[:2], dataset.cases("imagesTr")
    shutil.copy(image(dataset, labeled[0], "imagesTr"), image(dataset, "a_copy"))
    with pytest.raises(UserError, match=rf"a_copy_0000.nii.gz is the image of {labeled[0]}, a labeled or validation"):
        prepare(dataset)
    assert set(recorded(prepared_in(dataset))) == {*dataset.cases("imagesUn")} - {"a_copy"}
    image(dataset, "a_copy").unlink()
    prepare(dataset)
    shutil.copy(image(dataset, one), image(dataset, "labeled_later", "imagesTr"))
    with pytest.raises(UserError, match=f"{one}_0000.nii.gz is the image of labeled_later"):
        prepare(dataset)
    image(dataset, one).unlink()
    assert two in prepare(dataset).cases


def test_an_image_that_changes_while_it_is_prepared_is_not_kept(tiny_copy, monkeypatch):
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    run_case_save = DefaultPreprocessor.run_case_save

    def late(self: object, truncated: str, files: list[str], *plans: object) -> None:
        run_case_save(self, truncated, files, *plans)
        if os.path.basename(truncated) == case:
            os.utime(files[0], ns=(1, 1))

    monkeypatch.setattr(DefaultPreprocessor, "run_case_save", late)
    dataset = tiny_copy("3d")
    case = dataset.cases("imagesUn")[0]
    with pytest.raises(UserError, match=f"{case}_0000.nii.gz changed while it was being prepared"):
        prepare(dataset)
    assert case not in recorded(prepared_in(dataset))


def test_a_full_disk_keeps_what_is_finished(tiny_copy, mounted):
    """The manifest needs room too, and blosc2 leaves the file open that it could not write."""
    dataset = tiny_copy("3d")
    add_images(dataset, 1, shape=(130, 130, 130), prefix="zlarge")
    disk = prepared_in(dataset)
    disk.mkdir()
    mounted(disk, "-t", "tmpfs", "-o", "size=1m", "tmpfs")
    with pytest.raises(UserError, match=rf"{disk} cannot be written \(No space left on device\)"):
        prepare(dataset)
    assert sorted(recorded(disk)) == [case for case in dataset.cases("imagesUn") if case != "zlarge000"]
    image(dataset, "zlarge000").unlink()
    assert prepare(dataset).cases == dataset.cases("imagesUn")


# ------------------------------------------------------------------ what others have put there


def test_files_and_links_of_others_stay_as_they_are(tiny_copy, tmp_path):
    dataset = tiny_copy("3d")
    victim = tmp_path / "victim"
    (victim / "case").mkdir(parents=True)
    for file in ("precious", ".readers", "case/precious"):
        (victim / file).write_text("precious")
    folder = prepared_in(dataset)
    folder.mkdir()
    for link, target in ((".work", victim), ("part_00000000", victim), ("manifest.json.tmp", victim / "precious")):
        (folder / link).symlink_to(target)
    (folder / "notes.txt").write_text("mine")
    (folder / "part_of_mine").mkdir()
    (folder / "part_of_mine" / "notes.txt").write_text("mine")
    prepared = prepare(dataset)
    image(dataset, prepared.cases[0]).unlink()
    prepare(dataset)
    assert (folder / "notes.txt").read_text() == (folder / "part_of_mine" / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in victim.rglob("*")) == [".readers", "case", "precious", "precious"]
    assert {p.read_text() for p in victim.rglob("*") if p.is_file()} == {"precious"}


def test_a_manifest_or_lock_that_is_a_link_does_no_harm(tiny_copy, tmp_path):
    dataset = tiny_copy("3d")
    folder = prepared_in(dataset)
    folder.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (folder / "manifest.json").symlink_to(victim)
    prepare(dataset)
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(victim)
    image(dataset, dataset.cases("imagesUn")[0]).unlink()
    with pytest.raises(UserError, match="cannot be written"):
        prepare(dataset)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: "",
        lambda m: json.dumps(m)[:100],
        lambda m: "[]",
        lambda m: json.dumps({**m, "cases": []}),
        lambda m: json.dumps({**m, "cases": dict.fromkeys(m["cases"])}),
        lambda m: json.dumps({**m, "cases": {case: {**e, "raw": [[1]]} for case, e in m["cases"].items()}}),
        lambda m: json.dumps({**m, "cases": {case: {**e, "part": "../x"} for case, e in m["cases"].items()}}),
        lambda m: json.dumps({**m, "cases": {case: {**e, "files": ["x"]} for case, e in m["cases"].items()}}),
        lambda m: json.dumps({**m, "labeled": {"x": [["y"]]}}),
    ],
    ids=["empty", "cut", "list", "cases: list", "cases: null", "odd stamps", "leads out", "files: list", "odd labeled"],
)
def test_a_damaged_manifest_counts_as_none(tiny_copy, damage):
    dataset = tiny_copy("3d")
    for case in dataset.cases("imagesUn")[1:]:
        image(dataset, case).unlink()
    prepared = prepare(dataset)
    manifest = Path(prepared.folder) / "manifest.json"
    manifest.write_text(damage(json.loads(manifest.read_text())))
    again = prepare(dataset)
    assert again.cases == prepared.cases
    assert again.places != prepared.places
    assert on_disk(prepared.folder) == made(*prepared.cases)


def test_names_in_the_plans_do_not_lead_elsewhere(tiny_copy):
    dataset = tiny_copy("3d")
    before = sorted(dataset.folders.preprocessed.parent.rglob("*"))
    plans = dataset.plans
    plans["configurations"]["3d_fullres"]["data_identifier"] = "../../../x"
    with pytest.raises(UserError, match=r"data_identifier '\.\./\.\./\.\./x' begins with a dot"):
        prepare(dataset, plans=plans)
    with pytest.raises(UserError, match=r"dataset_name '\.\./x'"):
        prepare_unlabeled("../x", PlansManager(dataset.plans), "3d_fullres", dataset.dataset_json, [], 1)
    with pytest.raises(UserError, match="file_ending '' is no file ending"):
        prepare_unlabeled(
            dataset.name, PlansManager(dataset.plans), "3d_fullres", {**dataset.dataset_json, "file_ending": ""}, [], 1
        )
    assert sorted(dataset.folders.preprocessed.parent.rglob("*")) == before


def test_cases_of_any_name_are_kept_apart_from_our_own_files(tiny_copy):
    dataset = tiny_copy("3d")
    names = ["lock", "manifest.json", "part_00000000", "probe"]
    for case, name in zip(dataset.cases("imagesUn"), names, strict=True):
        image(dataset, case).rename(image(dataset, name))
    image(dataset, ".").write_text("of macOS")
    prepared = prepare(dataset)
    assert prepared.cases == sorted(names)
    assert prepare(dataset) == prepared
    assert {case: load(place, case)[0].shape for case, place in prepared.places.items()}
