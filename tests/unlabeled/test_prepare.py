"""Preparing unlabeled images, with nnU-Net's real preprocessing on tiny datasets."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.datasets import TinyDataset, write_images
from helpers.prepared import add_images, fingerprint, image, load, made, on_disk, prepare, prepared_in, recorded
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetNumpy
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.errors import UserError
from nnunet_ssl.locks import holding
from nnunet_ssl.unlabeled.loader import UnlabeledDataset
from nnunet_ssl.unlabeled.prepare import prepare_unlabeled, wait_until_prepared
from nnunet_ssl.unlabeled.store import PreparedFolder

COMMAND = "from nnunet_ssl.commands.preprocess import main; main()"


def child(dataset: TinyDataset, np: int = 1, before: str = "", **popen: object) -> subprocess.Popen:
    """``nnUNetv2_ssl_preprocess`` in a separate process."""
    arguments = ["-d", str(dataset.id), "-c", dataset.configuration, "-p", dataset.plans_name, "-np", str(np)]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, "-c", before + COMMAND, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        **popen,
    )


@pytest.mark.parametrize("kind", ["3d", "multichannel", "anisotropic", "png"])
def test_equals_the_same_image_prepared_as_labeled(tiny_copy, kind):
    dataset = tiny_copy(kind)
    twins = {f"twin_of_{case}": case for case in dataset.cases("imagesTr")[:2]}
    for twin, case in twins.items():
        for channel in range(dataset.recipe.channels):
            name = f"_{channel:04d}{dataset.recipe.file_ending}"
            shutil.move(dataset.raw / "imagesTr" / (case + name), dataset.raw / "imagesUn" / (twin + name))
    prepared = prepare(dataset)

    assert set(twins) < set(prepared.cases)
    assert prepared.cases == dataset.cases("imagesUn")
    labeled = dataset.preprocessed / f"{dataset.plans_name}_{dataset.configuration}"
    assert prepared.folder == f"{labeled}_unlabeled"
    for twin, case in twins.items():
        data, seg, properties = load(prepared.places[twin], twin)
        labeled_data, labeled_seg, labeled_properties = load(labeled, case)
        assert data.dtype == labeled_data.dtype
        np.testing.assert_array_equal(data, labeled_data)
        assert seg.dtype == labeled_seg.dtype
        assert set(np.unique(seg)) <= {0, -1}
        del labeled_properties["class_locations"]
        assert repr(properties) == repr(labeled_properties)


def test_keeps_the_nonzero_mask(tiny_copy):
    """Brain-extracted images are 0 around the brain; plans that normalize within the mask need it afterwards."""
    dataset = tiny_copy("3d")
    plans = dataset.plans
    plans["configurations"]["3d_fullres"].update(
        use_mask_for_norm=[True], normalization_schemes=["ZScoreNormalization"]
    )
    image = np.zeros((20, 22, 24), np.float32)
    label = np.zeros_like(image)
    z, y, x = np.ogrid[:20, :22, :24]
    inside = ((z - 10) / 8) ** 2 + ((y - 11) / 9) ** 2 + ((x - 12) / 10) ** 2 < 1
    image[inside] = np.random.default_rng(0).normal(100, 10, inside.sum())
    label[8:12, 8:12, 8:12] = 1
    (file,) = write_images(dataset.recipe, dataset.raw / "imagesUn", "brain", image[None])
    (label_file,) = write_images(dataset.recipe, dataset.folders.raw, "label", label[None])
    prepared = prepare(dataset, plans=plans)

    plans_manager = PlansManager(plans)
    configuration = plans_manager.get_configuration("3d_fullres")
    labeled = dataset.folders.raw / "labeled"
    labeled.mkdir()
    configuration.preprocessor_class(verbose=False).run_case_save(
        str(labeled / "brain"), [str(file)], str(label_file), plans_manager, configuration, dataset.dataset_json
    )
    data, seg, _ = load(prepared.places["brain"], "brain")
    labeled_data, labeled_seg, _ = load(labeled, "brain")
    np.testing.assert_array_equal(data, labeled_data)
    np.testing.assert_array_equal(seg == -1, labeled_seg == -1)
    assert (seg == -1).any()
    assert (labeled_seg == 1).any()


def test_redoes_what_is_stale_and_nothing_else(tiny_copy, capsys):
    dataset = tiny_copy("3d")
    prepared = prepare(dataset)
    folder, cases = prepared.folder, prepared.cases
    first = fingerprint(folder)
    assert len(cases) == 4
    assert "4 not yet prepared" in capsys.readouterr().out

    assert prepare(dataset) == prepared
    assert fingerprint(folder) == first
    assert capsys.readouterr() == ("", "")  # quiet when there is nothing to do

    changed, removed = cases[1], cases[2]
    sitk.WriteImage(sitk.ReadImage(str(image(dataset, changed))) * 2, str(image(dataset, changed)))
    image(dataset, removed).unlink()
    add_images(dataset, 1)
    now = prepare(dataset)
    out = capsys.readouterr().out
    assert "preparing 2 of 4" in out
    assert f"1 image changed ({changed})" in out
    assert "1 not yet prepared (extra000)" in out
    assert f"1 no longer in imagesUn ({removed})" in out
    assert "removed 2 prepared images" in out
    second = fingerprint(folder)
    assert now.cases == sorted({*cases, "extra000"} - {removed})
    assert {name for name in second if second[name] != first.get(name)} == made(changed, "extra000")
    assert on_disk(folder) == made(*now.cases)
    assert {case for case in cases if now.contents.get(case) != prepared.contents[case]} == {changed, removed}

    (Path(now.places[changed]) / f"{changed}.b2nd").unlink()
    prepare(dataset)
    assert f"1 prepared files missing or damaged ({changed})" in capsys.readouterr().out

    plans = dataset.plans
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 1.0]
    plans["configurations"]["3d_fullres"]["batch_size"] = 7  # changes no image
    now = prepare(dataset, plans=plans)
    assert "4 plans changed: spacing (" in capsys.readouterr().out
    assert load(now.places[changed], changed)[0].shape[1] == 10
    prepare(dataset, plans={**plans, "configurations": {"3d_fullres": {**plans["configurations"]["3d_fullres"],
                                                                       "batch_size": 2}}})  # fmt: skip
    assert capsys.readouterr().out == ""
    assert on_disk(folder) == made(*now.cases)
    assert len(list(Path(folder).glob("part_*"))) == 1  # empty ones go


def test_put_back_after_a_failed_run_is_redone(tiny_copy):
    """A raw file that is back as it was must not revive a manifest entry whose files were made from another one."""
    dataset = tiny_copy("3d")
    prepared = prepare(dataset)
    folder, case = prepared.folder, prepared.cases[0]
    file = image(dataset, case)
    good, status = file.read_bytes(), file.stat()
    file.write_bytes(good[: len(good) // 2])
    before = fingerprint(folder)
    with pytest.raises(UserError, match="cannot be read"):
        prepare(dataset)
    assert case not in recorded(folder)
    file.write_bytes(good)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    prepare(dataset)
    after = fingerprint(folder)
    assert {name for name in after if after[name] != before[name]} == made(case)
    assert on_disk(folder) == made(*prepared.cases)


def test_one_bad_image_costs_only_itself(tiny_copy):
    dataset = tiny_copy("3d")
    bad = dataset.cases("imagesUn")[1]
    image(dataset, bad).write_bytes(b"no image")
    with pytest.raises(UserError, match=f"{bad}_0000.nii.gz cannot be read"):
        prepare(dataset)
    folder = prepared_in(dataset)
    assert bad not in recorded(folder)
    before = fingerprint(folder)
    assert on_disk(folder) == set(before)
    assert len(before) == 3 * 3
    image(dataset, bad).unlink()
    assert len(prepare(dataset).cases) == 3
    assert fingerprint(folder) == before


def test_without_the_raw_images_the_prepared_ones_are_enough(tiny_copy, capsys):
    dataset = tiny_copy("3d")
    plans, dataset_json, labeled = dataset.plans, dataset.dataset_json, dataset.cases("imagesTr")
    arguments = (dataset.name, PlansManager(plans), "3d_fullres", dataset_json, labeled)
    there = prepare(dataset)
    shutil.rmtree(dataset.raw / "imagesUn")
    capsys.readouterr()
    assert prepare_unlabeled(*arguments, 1) == there
    (said,) = capsys.readouterr().out.splitlines()
    assert f"{dataset.raw}/imagesUn" in said
    assert f"{there.folder} is complete" in said
    assert wait_until_prepared(*arguments) == there
    shutil.rmtree(dataset.raw)
    assert prepare_unlabeled(*arguments, 1) == there
    assert wait_until_prepared(*arguments) == there
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 1.0]
    with pytest.raises(UserError, match="Provide one of them"):
        prepare_unlabeled(dataset.name, PlansManager(plans), "3d_fullres", dataset_json, labeled, 1)


def test_what_was_never_finished_is_not_complete(tiny_copy):
    """On a machine without the raw images, too, and although all that is listed is whole."""
    dataset = tiny_copy("3d")
    raw, elsewhere = dataset.raw, dataset.raw.with_name("elsewhere")
    arguments = (dataset.name, PlansManager(dataset.plans), "3d_fullres", dataset.dataset_json, ["tr_00"], 1)
    bad = raw / "imagesUn" / "un_01_0000.nii.gz"
    bad.write_bytes(b"no image")
    with pytest.raises(UserError, match="un_01"):
        prepare(dataset)
    raw.rename(elsewhere)
    with pytest.raises(UserError, match=r"_unlabeled lacks 1 of the unlabeled images \(un_01\)"):
        prepare_unlabeled(*arguments)
    elsewhere.rename(raw)
    bad.unlink()
    there = prepare(dataset)
    raw.rename(elsewhere)
    assert prepare_unlabeled(*arguments) == there
    manifest = prepared_in(dataset) / "manifest.json"  # as an earlier version wrote it, which says nothing of that
    content = json.loads(manifest.read_text())
    del content["wanted"]
    manifest.write_text(json.dumps(content))
    assert prepare_unlabeled(*arguments) == there


def test_a_preprocessor_of_another_kind(tiny_copy, monkeypatch):
    """Plans may name another class, which may write other files."""
    from nnunetv2.preprocessing.preprocessors import default_preprocessor

    class Halving(default_preprocessor.DefaultPreprocessor):
        def run_case_save(self, output_filename_truncated, image_files, seg_file, *plans):
            data, seg, properties = self.run_case(image_files, seg_file, *plans)
            nnUNetDatasetNumpy.save_case(data / 2, seg, properties, output_filename_truncated)

    monkeypatch.setattr(default_preprocessor, "Halving", Halving, raising=False)
    dataset = tiny_copy("3d")
    prepared = prepare(dataset)
    case = prepared.cases[0]
    expected = load(prepared.places[case], case)[0] / 2
    plans = dataset.plans
    plans["configurations"]["3d_fullres"]["preprocessor_name"] = "Halving"
    halved = prepare(dataset, plans=plans)
    assert sorted(fingerprint(halved.folder)) == sorted(f"{c}{end}" for c in halved.cases for end in (".npz", ".pkl"))
    np.testing.assert_array_equal(UnlabeledDataset(halved.places).load_case(case)[0], expected)


def test_a_preprocessor_whose_files_nobody_reads_is_refused(tiny_copy, monkeypatch):
    from nnunetv2.preprocessing.preprocessors import default_preprocessor

    class Foreign(default_preprocessor.DefaultPreprocessor):
        def run_case_save(self, output_filename_truncated, *_):
            Path(f"{output_filename_truncated}.zarr").touch()

    monkeypatch.setattr(default_preprocessor, "Foreign", Foreign, raising=False)
    dataset = tiny_copy("3d")
    plans = dataset.plans
    plans["configurations"]["3d_fullres"]["preprocessor_name"] = "Foreign"
    with pytest.raises(UserError, match=r"Foreign, the preprocessor of the plans, writes what no dataset .*\.zarr"):
        prepare(dataset, plans=plans)
    assert on_disk(prepared_in(dataset)) == set()


@pytest.mark.parametrize("num_processes", [1, 2])
def test_kill_midway_and_run_again(tiny_copy, num_processes):
    dataset = tiny_copy("3d")
    add_images(dataset, 40)
    folder = prepared_in(dataset)
    hasty = "from nnunet_ssl import pools; from nnunet_ssl.unlabeled import store; "
    hasty += "store.SAVE_EVERY = pools.PAYS_AFTER = 0; "
    process = child(dataset, num_processes, hasty, start_new_session=True)
    end = time.monotonic() + 120
    while len(recorded(folder)) < 8 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    finished = recorded(folder)
    assert 8 <= len(finished) < 44

    while time.monotonic() < end:  # its workers go too
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a worker outlived the killed command")

    before = fingerprint(folder)
    prepared = prepare(dataset)
    assert prepared.cases == dataset.cases("imagesUn")
    after = fingerprint(folder)
    for case, entry in finished.items():
        assert all(before[name] == after[name] for name in entry["files"]), case
    assert on_disk(folder) == made(*prepared.cases)  # nothing that was half made is left
    reference = dataset.folders.preprocessed / "reference"
    shutil.move(folder, reference)
    again = prepare(dataset)
    for case in prepared.cases:
        place = reference / Path(prepared.places[case]).relative_to(folder)
        for was, now in zip(load(place, case), load(again.places[case], case), strict=True):
            assert np.array_equal(was, now)


def test_disk_full_then_room_again(tiny_copy):
    """No file of the child may exceed 100 kB: the small images fit, the large one does not."""
    dataset = tiny_copy("3d")
    add_images(dataset, 1, shape=(60, 60, 60), prefix="zlarge")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    process = child(dataset, before=limit)
    out, err = process.communicate(timeout=120)
    folder = prepared_in(dataset)
    assert process.returncode == 1, out + err
    assert f"{folder} cannot be written (File too large)" in err
    assert "Traceback" not in err
    before = fingerprint(folder)
    assert len(before) == 4 * 3
    assert on_disk(folder) == set(before)
    assert len(prepare(dataset).cases) == 5
    after = fingerprint(folder)
    assert {name: after[name] for name in before} == before


def test_one_process_at_a_time(tiny_copy, capsys):
    dataset = tiny_copy("3d")
    folder = prepared_in(dataset)
    thread = threading.Thread(target=prepare, args=(dataset,))
    with holding(folder / ".lock", "busy"):
        thread.start()
        time.sleep(0.5)
        assert "another process is preparing" in capsys.readouterr().out
        assert thread.is_alive()
    thread.join(60)
    assert prepare(dataset).cases == dataset.cases("imagesUn")
    assert capsys.readouterr().out.count("preparing") == 1  # the second found it done


def test_other_ranks_wait(tiny_copy, monkeypatch):
    monkeypatch.setattr("nnunet_ssl.unlabeled.store.POLL_EVERY", 0.05)
    dataset = tiny_copy("3d")
    plans = PlansManager(dataset.plans)
    arguments = (dataset.name, plans, "3d_fullres", dataset.dataset_json, dataset.cases("imagesTr"))
    with pytest.raises(UserError, match=r"was not ready after 0 s.*nnUNetv2_ssl_preprocess"):
        wait_until_prepared(*arguments, timeout=0.1)
    found: list[PreparedFolder] = []
    waiting = threading.Thread(target=lambda: found.append(wait_until_prepared(*arguments)), daemon=True)
    waiting.start()
    time.sleep(0.2)
    assert not found
    prepared = prepare(dataset)
    waiting.join(20)
    assert found == [prepared]
    for file in (dataset.raw / "imagesUn").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="holds no image"):  # by itself: this rank may be the first to end
        wait_until_prepared(*arguments)
