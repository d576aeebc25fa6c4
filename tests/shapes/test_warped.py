"""The folder of warps: each made once, again only where it has to be, whatever is killed, changed or read meanwhile."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from helpers.datasets import TinyDataset, make_case, write_images
from helpers.wishes import files, manifest, warped_in, warps, wish
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import stamp
from nnunet_ssl.locks import holding
from nnunet_ssl.shapes import warped
from nnunet_ssl.shapes.case import load, prepared_volume, structures_of
from nnunet_ssl.shapes.registration import ITERATIONS, Registration, array, register, warp, warp_labels
from nnunet_ssl.shapes.warped import LESS_ALIKE, prepare_warps, refuse_where_few_register, wait_until_warped
from nnunet_ssl.shapes.wish import WarpedFolder, WarpManifest, Wish, labeled_images
from nnunet_ssl.unlabeled import store
from nnunet_ssl.unlabeled.case import Preparation

pytestmark = pytest.mark.usefixtures("quick_registration")

ROOT = Path(__file__).resolve().parents[2]
PAIR = [("tr_00", 1), ("tr_01", 1)]


def count_of(made: WarpedFolder) -> list[tuple[str, int]]:
    """Warps of each labeled case."""
    return sorted(Counter(made.moving.values()).items())


def image(dataset: TinyDataset, case: str, folder: str = "imagesUn") -> Path:
    return dataset.raw / folder / f"{case}_0000{dataset.recipe.file_ending}"


def brighter(dataset: TinyDataset, case: str) -> None:
    """Another content of an unlabeled image."""
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(image(dataset, case))))
    sitk.WriteImage(sitk.GetImageFromArray(array * np.float32(1.1) + 3), str(image(dataset, case)))


def change_label(dataset: TinyDataset, case: str) -> None:
    """As after ``nnUNetv2_preprocess`` of a corrected label."""
    folder = str(warped_in(dataset)).removesuffix("_warped")
    cls = infer_dataset_class(folder)
    data, seg, _, properties = cls(folder, [case]).load_case(case)
    data, seg = data[:], seg[:]
    lower = seg[:, :, :11]
    lower[lower == 2] = 1
    for file in Path(folder).glob(f"{case}*"):
        file.unlink()
    cls.save_case(data, seg, properties, os.path.join(folder, case))


# ------------------------------------------------------------------ what a warp is


@pytest.mark.parametrize(
    "kind",
    [
        "3d",
        "2d",
        "png",
        "ignore",
        pytest.param("multichannel", marks=pytest.mark.slow),
        pytest.param("anisotropic", marks=pytest.mark.slow),
        pytest.param("regions", marks=pytest.mark.slow),
    ],
)
def test_a_warp_is_a_case_as_nnunet_prepares_it(tiny_copy, kind):
    dataset = tiny_copy(kind)
    made = warps(dataset, ("tr_00",), each=4)
    (case, place), *_ = made.places.items()
    assert set(made.moving.values()) == {"tr_00"}
    fixed = manifest(dataset)["cases"][case]["fixed"]
    folder = str(warped_in(dataset)).removesuffix("_warped")
    assert sorted(f.suffix for f in Path(place).iterdir()) == sorted(f.suffix for f in Path(folder).glob("tr_00*"))
    data, seg, properties = load(place, case)
    old_data, old_seg, old = load(folder, "tr_00")
    target, *_ = load(wish(dataset).onto.places[fixed], fixed)
    assert data.shape == target.shape
    assert seg.shape == (1, *target.shape[1:])
    assert (data.dtype, seg.dtype) == (old_data.dtype, old_seg.dtype)
    outside = PlansManager(dataset.plans).get_label_manager(dataset.dataset_json).ignore_label or -1
    assert set(np.unique(seg)) <= {*np.unique(old_seg), outside}
    assert np.isfinite(data).all()
    assert old_data.min() <= data.min() < data.max() <= old_data.max()
    assert properties["class_locations"].keys() == old["class_locations"].keys()
    for classes, where in properties["class_locations"].items():
        wanted = np.isin(seg, classes)
        assert len(where) == min(wanted.sum(), max(10000, len(where)))
        assert all(wanted[tuple(voxel)] for voxel in where), classes
    # image and label are warped by the same transform, which registration gives again
    there = prepared_volume(wish(dataset), wish(dataset).onto.places[fixed], fixed, False)
    here = prepared_volume(wish(dataset), folder, "tr_00", True)
    transform, grid = register(there, here).transform, there.channels[0]
    assert np.array_equal(seg[0], array(warp_labels(here.labels, grid, transform, outside)))
    assert np.array_equal(data, np.stack([array(warp(channel, grid, transform)) for channel in here.channels]))


def test_nobody_has_annotated_what_lies_outside(tiny_copy, monkeypatch):
    """With an ignore label nnU-Net draws patches from all that is annotated: padding must not be the most of that."""
    dataset = tiny_copy("ignore")
    away = sitk.TranslationTransform(3, (6.0, 0.0, 0.0))  # a quarter of the width
    monkeypatch.setattr("nnunet_ssl.shapes.case.register", lambda *_: Registration(away, 0.1, 0.9, 0.0, 0.75))
    ((case, place),) = warps(dataset, ("tr_00",), each=1).places.items()
    _, seg, properties = load(place, case)
    assert (seg[..., -6:] == 3).all()
    (annotated,) = [where for key, where in properties["class_locations"].items() if isinstance(key, tuple)]
    assert len(annotated) > 100
    assert max(voxel[-1] for voxel in annotated) < seg.shape[-1] - 6


def test_a_warp_that_is_lost_is_replaced_by_one_that_was_less_alike(tiny_copy):
    dataset = tiny_copy("3d")
    made = warps(dataset, ("tr_00",), each=3)
    assert [entry["why"] for entry in manifest(dataset)["dropped"].values()] == [LESS_ALIKE]
    image(dataset, manifest(dataset)["cases"][min(made.places)]["fixed"]).unlink()
    assert count_of(warps(dataset, ("tr_00",))) == [("tr_00", 3)]
    assert not manifest(dataset)["dropped"]


@pytest.mark.parametrize("error", [MemoryError("12 GiB"), RuntimeError("Failed to allocate memory for image.")])
def test_too_little_memory_is_not_a_pair_that_does_not_register(tiny_copy, monkeypatch, error):
    dataset = tiny_copy("3d")

    def too_large(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("nnunet_ssl.shapes.case.register", too_large)
        with pytest.raises(UserError, match=r"do not fit into memory\. Warp with fewer"):
            warps(dataset, ("tr_00",), each=1)
    assert count_of(warps(dataset, ("tr_00",), each=1)) == [("tr_00", 1)]


def test_a_2d_configuration_has_its_spacing_between_slices(tiny_copy):
    dataset = tiny_copy("2d")
    folder = str(warped_in(dataset)).removesuffix("_warped")
    task = Preparation(dataset.name, dataset.plans, "2d", dataset.dataset_json)
    moving = prepared_volume(task, folder, "tr_00", True)
    *_, properties = load(folder, "tr_00")
    between = properties["spacing"][dataset.plans["transpose_forward"][0]]
    assert moving.channels[0].GetSpacing()[::-1] == pytest.approx(
        (between, *dataset.plans["configurations"]["2d"]["spacing"])
    )


def test_the_number_of_processes_changes_nothing(tiny_copy, monkeypatch):
    monkeypatch.setattr("nnunet_ssl.shapes.registration.ITERATIONS", ITERATIONS)  # as in the other processes
    dataset = tiny_copy("3d")
    alone = {case: load(place, case) for case, place in warps(dataset, each=1).places.items()}
    shutil.rmtree(warped_in(dataset))
    monkeypatch.setattr("nnunet_ssl.pools.PAYS_AFTER", -1.0)
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    together = warps(dataset, each=1, processes=2)
    assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == threads
    assert alone.keys() == together.places.keys()
    for case, (data, seg, _) in alone.items():
        again = load(together.places[case], case)
        assert np.array_equal(data, again[0])
        assert np.array_equal(seg, again[1])


def test_no_label_and_no_property_of_the_unlabeled_image_is_used(tiny_copy):
    """Whatever stands in its segmentation, the warp is the same."""
    dataset = tiny_copy("3d")
    made = warps(dataset, ("tr_00",), each=1)
    (case,) = made.cases
    before = load(made.places[case], case)
    this = wish(dataset, ("tr_00",), each=1)
    for fixed, place in this.onto.places.items():
        cls = infer_dataset_class(place)
        data, seg, _, properties = cls(place, [fixed]).load_case(fixed)
        data, other = data[:], np.random.default_rng(0).integers(0, 3, seg.shape).astype(np.int16)
        shutil.rmtree(place)
        os.mkdir(place)
        cls.save_case(data, other, {**properties, "class_locations": "nothing"}, os.path.join(place, fixed))
    shutil.rmtree(warped_in(dataset))
    prepare_warps(this, 1)
    again = load(manifest_place(dataset, case), case)
    assert np.array_equal(before[0], again[0])
    assert np.array_equal(before[1], again[1])


def manifest_place(dataset: TinyDataset, case: str) -> str:
    return str(warped_in(dataset) / manifest(dataset)["cases"][case]["part"] / case)


@pytest.mark.parametrize(
    ("one", "other"),
    [(("a__b", "c"), ("a", "b__c")), (("a_", "b"), ("a", "_b")), (("x" * 200, "y"), ("x" * 200, "z"))],
)
def test_no_two_pairs_have_files_of_one_name(one, other):
    assert warped._name(*one) != warped._name(*other)
    assert warped._name("tr", "un") == "tr__un"
    assert len(os.fsencode(f"{warped._name('ä' * 60, 'ö' * 30)}_seg.b2nd")) < 255


# ------------------------------------------------------------------ made once, and again where it has to be


def test_what_is_there_is_taken_as_it_is_with_one_more_or_fewer(tiny_copy, capsys):
    dataset = tiny_copy("3d")
    first = warps(dataset, each=2)
    assert count_of(first) == [("tr_00", 2), ("tr_01", 2)]
    assert Counter(e["why"] for e in manifest(dataset)["dropped"].values()) == {LESS_ALIKE: 2}
    before = files(dataset)
    capsys.readouterr()
    assert warps(dataset, each=2) == warps(dataset) == warps(dataset, each=1) == first
    assert capsys.readouterr() == ("", "")
    assert files(dataset) == before
    more = warps(dataset, each=4)  # all there are: those that were left out come back
    assert count_of(more) == [("tr_00", 4), ("tr_01", 4)]
    assert files(dataset).items() >= before.items()
    assert warps(dataset, each=9) == more
    assert warps(dataset, ("tr_00",)).cases == [case for case in more.cases if case.startswith("tr_00")]


def test_the_most_alike_are_kept(tiny_copy):
    dataset = tiny_copy("3d")
    warps(dataset, ("tr_00",), each=3)
    kept, dropped = (manifest(dataset)[which].values() for which in ("cases", "dropped"))
    assert len(kept) == 3
    assert max(entry["after"] for entry in dropped) <= min(entry["after"] for entry in kept)


def test_a_label_that_has_changed_redoes_its_warps_alone(tiny_copy):
    dataset = tiny_copy("3d")
    first = warps(dataset, each=1)
    before = files(dataset)
    core = (load(first.places[first.cases[0]], first.cases[0])[1] == 2).sum()
    change_label(dataset, "tr_00")
    second = warps(dataset)
    assert count_of(first) == count_of(second) == PAIR
    changed = {name for name, stamp in files(dataset).items() if before.get(name) != stamp}
    assert changed == {name for name in files(dataset) if name.startswith("tr_00")}
    (case,) = (case for case, moving in second.moving.items() if moving == "tr_00")
    assert 0 < (load(second.places[case], case)[1] == 2).sum() < 0.8 * core
    assert first.contents[case] != second.contents[case]


def test_a_labeled_case_in_other_bytes_of_the_same_content_redoes_nothing(tiny_copy):
    """nnU-Net compresses by several threads: when it prepares again, the same values are other bytes."""
    dataset = tiny_copy("3d")
    first, before = warps(dataset, each=1), files(dataset)
    folder = Path(str(warped_in(dataset)).removesuffix("_warped"))
    for file in [*folder.glob("tr_00*.b2nd")]:
        values, old = blosc2.open(str(file), mode="r")[:], file.read_bytes()
        file.unlink()
        blosc2.asarray(values, urlpath=str(file), mode="w", cparams={"clevel": 1})
        assert file.read_bytes() != old
    assert warps(dataset) == first
    assert files(dataset) == before


def test_an_image_that_has_changed_or_gone_redoes_what_was_warped_onto_it(tiny_copy):
    dataset = tiny_copy("3d")
    warps(dataset, each=1)
    before, cases = files(dataset), manifest(dataset)["cases"]
    (_, onto), (other, kept) = ((name, entry["fixed"]) for name, entry in sorted(cases.items()))
    assert onto != kept
    brighter(dataset, onto)
    warps(dataset)
    changed = {name for name, stamp in files(dataset).items() if before.get(name) != stamp}
    assert not any(name.startswith(other) for name in changed)
    assert changed
    image(dataset, kept).unlink()
    made = warps(dataset)
    assert count_of(made) == PAIR
    assert kept not in {manifest(dataset)["cases"][name]["fixed"] for name in made.cases}


def test_what_a_fold_loses_is_completed_by_the_fold_that_has_it(tiny_copy):
    """An image changes, fold 0 starts, strikes off the warps of fold 1 too, and makes its own alone."""
    dataset = tiny_copy("3d")
    made = warps(dataset, each=4)
    brighter(dataset, "un_00")
    assert count_of(warps(dataset, ("tr_00",))) == [("tr_00", 4)]
    again = warps(dataset, ("tr_01",))
    assert count_of(again) == [("tr_01", 4)]
    assert warps(dataset).cases == made.cases


def more_images(dataset: TinyDataset, names: list[str]) -> None:
    rng = np.random.default_rng(9)
    for case in names:
        write_images(dataset.recipe, dataset.raw / "imagesUn", case, make_case(dataset.recipe, rng)[0])


@pytest.mark.parametrize("each", [30, None])
def test_images_that_come_later_are_warped_onto(tiny_copy, monkeypatch, each):
    """With a number that there were too few for, and without one; another fold's cases are that fold's to complete."""
    monkeypatch.setattr(warped, "BUDGET", 1e6)
    dataset = tiny_copy("3d")
    assert count_of(warps(dataset, each=each)) == [("tr_00", 4), ("tr_01", 4)]
    before = files(dataset)
    more_images(dataset, ["new_0", "new_1"])
    assert count_of(warps(dataset, ("tr_00",))) == [("tr_00", 6)]
    assert count_of(warps(dataset, ("tr_01",))) == [("tr_01", 6)]
    assert files(dataset).items() > before.items()
    done = files(dataset)
    assert count_of(warps(dataset)) == [("tr_00", 6), ("tr_01", 6)]
    assert files(dataset) == done


def test_where_there_was_no_image_all_that_come_are_warped_onto(tiny_copy, monkeypatch):
    monkeypatch.setattr(warped, "BUDGET", 1e6)
    dataset = tiny_copy("3d")
    tests = dataset.raw / "imagesTs"
    shutil.rmtree(tests)
    shutil.copytree(dataset.raw / "imagesUn", tests)
    with pytest.raises(UserError, match="no unlabeled image may be warped onto"):
        warps(dataset, ("tr_00",))
    more_images(dataset, ["new_0", "new_1"])
    assert count_of(warps(dataset, ("tr_00",))) == [("tr_00", 2)]


def test_spare_pairs_of_another_fold_stay_when_one_asks_for_more(tiny_copy):
    """Or it would get another pair when an image comes, though it had had enough, and its training could not go on."""
    dataset = tiny_copy("3d")
    first = warps(dataset, ("tr_00",), each=2)
    warps(dataset, ("tr_01",), each=6)
    more_images(dataset, ["new_0"])
    assert warps(dataset, ("tr_00",)) == first


def test_where_there_were_enough_images_more_change_nothing(tiny_copy, capsys):
    dataset = tiny_copy("3d")
    first = warps(dataset, each=2)
    more_images(dataset, ["new_0"])
    wish(dataset)  # prepares it
    capsys.readouterr()
    assert warps(dataset) == first
    assert capsys.readouterr().out == ""


def test_pairs_that_were_dropped_are_tried_again_when_their_images_have_changed(tiny_copy, monkeypatch):
    dataset = tiny_copy("3d")
    with monkeypatch.context() as patch:
        patch.setattr("nnunet_ssl.shapes.case.why_not", lambda *_: "fold")
        with pytest.raises(UserError, match="of 4 pairs of images only 0"):
            warps(dataset, ("tr_00",), each=3)
    with pytest.raises(UserError, match="of 4 pairs of images only 0"):  # the same images: not again
        warps(dataset, ("tr_00",), each=3)
    shutil.rmtree(dataset.raw / "imagesUn")
    more_images(dataset, [f"good_{i}" for i in range(4)])
    assert count_of(warps(dataset, ("tr_00",))) == [("tr_00", 3)]
    assert not any(entry["why"] == "fold" for entry in manifest(dataset)["dropped"].values())


def test_dropped_pairs_of_another_fold_are_kept(tiny_copy, monkeypatch):
    dataset = tiny_copy("3d")
    with monkeypatch.context() as patch:
        patch.setattr("nnunet_ssl.shapes.case.why_not", lambda *_: "fold")
        with pytest.raises(UserError):
            warps(dataset, ("tr_00",), each=3)
    warps(dataset, ("tr_01",), each=3)
    dropped = [entry["moving"] for entry in manifest(dataset)["dropped"].values() if entry["why"] == "fold"]
    assert dropped == ["tr_00"] * 4


def test_other_plans_redo_all(tiny_copy):
    dataset = tiny_copy("3d")
    before = warps(dataset, ("tr_00",), each=1)
    plans = dataset.plans
    plans["foreground_intensity_properties_per_channel"]["0"]["mean"] += 1
    after = warps(dataset, ("tr_00",), plans=plans)
    assert set(after.places.values()).isdisjoint(before.places.values())


@pytest.mark.parametrize("more", [{"channels": (0,)}, {"groups": {"un_00": "p"}}], ids=["channel", "groups"])
def test_another_channel_or_other_groups_redo_all_and_hold_from_then_on(tiny_copy, monkeypatch, more):
    monkeypatch.setattr(warped, "BUDGET", 1e6)  # one pair alone may not register
    dataset = tiny_copy("multichannel")
    before = warps(dataset, ("tr_00",), each=4)
    after = warps(dataset, ("tr_00",), **more)
    assert set(after.places.values()).isdisjoint(before.places.values())
    assert warps(dataset, ("tr_00",)) == after
    assert manifest(dataset)["channels"] == ([0] if "channels" in more else [])
    if "channels" in more:  # and back to all of them
        again = warps(dataset, ("tr_00",), channels=())
        assert set(again.places.values()).isdisjoint(after.places.values())
        assert manifest(dataset)["channels"] == []


def test_without_a_number_there_are_as_many_as_time_allows(tiny_copy, monkeypatch, capsys):
    dataset = tiny_copy("3d")
    assert count_of(warps(dataset)) == PAIR
    assert "a pair takes about" in (told := capsys.readouterr().out)
    assert "1 warps of each of 2 labeled cases take about" in told
    assert re.search(r" min, [12] at a time, and 0\.0 GB \(nnUNetv2_ssl_warp --pairs N", told)
    shutil.rmtree(warped_in(dataset))
    monkeypatch.setattr(warped, "LEAST_EACH", 3)  # though time allows none
    assert count_of(warps(dataset)) == [("tr_00", 3), ("tr_01", 3)]
    shutil.rmtree(warped_in(dataset))
    monkeypatch.setattr(warped, "LEAST_EACH", 1)
    assert count_of(warps(dataset)) == PAIR
    monkeypatch.setattr(warped, "BUDGET", 1e6)
    assert count_of(warps(dataset, ("tr_02",))) == [("tr_02", 1)]  # as many as of the others
    shutil.rmtree(warped_in(dataset))
    assert count_of(warps(dataset, ("tr_00",))) == [("tr_00", 4)]


@pytest.mark.parametrize(
    ("keys", "structures"),
    [
        ([1, 2], (1, 2)),
        ([1, 2, (-1, 0, 1, 2)], (1, 2)),  # with an ignore label: all that is annotated, for nnU-Net's sampling
        ([(1, 2, 3), (2, 3), 3, (-1, 0, 1, 2, 3)], (1, 2, 3)),  # regions
        ([], ()),
    ],
)
def test_structures_are_classes_and_not_what_is_ignored(keys, structures):
    assert structures_of({"class_locations": {key: [] for key in keys}}) == structures


def test_where_some_is_ignored_only_classes_are_structures(tiny):
    dataset = tiny("ignore")
    folder = str(dataset.preprocessed / f"{dataset.plans_name}_3d_fullres")
    task = Preparation(dataset.name, dataset.plans, "3d_fullres", dataset.dataset_json)
    moving = prepared_volume(task, folder, "tr_00", True)
    labels = PlansManager(dataset.plans).get_label_manager(dataset.dataset_json)
    assert moving.structures == tuple(labels.foreground_labels)
    assert labels.ignore_label not in moving.structures


def test_what_another_registration_made_is_made_anew(tiny_copy, monkeypatch):
    dataset = tiny_copy("3d")
    before = warps(dataset, ("tr_00",), each=1)
    monkeypatch.setattr(warped, "VERSION", warped.VERSION + 1)
    after = warps(dataset, ("tr_00",))
    assert after.cases == before.cases
    assert after.places != before.places


def test_files_that_are_missing_or_cut_off_are_made_again(tiny_copy):
    dataset = tiny_copy("3d")
    first = warps(dataset, each=1)
    case = first.cases[0]
    file = Path(first.places[case], f"{case}.b2nd")
    os.truncate(file, 100)
    second = warps(dataset)
    assert second.contents == first.contents
    assert second.places[case] != first.places[case]


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: "",
        lambda m: json.dumps(m)[:100],
        lambda m: json.dumps({**m, "cases": {case: {**e, "after": None} for case, e in m["cases"].items()}}),
        lambda m: json.dumps({**m, "cases": {case: {**e, "part": "../x"} for case, e in m["cases"].items()}}),
        lambda m: json.dumps({**m, "dropped": {"x": {"moving": "a", "fixed": "b", "made_from": "c"}}}),
        lambda m: json.dumps({**m, "asked": {"tr_00": "many"}}),
        lambda m: json.dumps({**m, "labeled": {"tr_00": [["y"]]}}),
    ],
    ids=["empty", "cut", "no similarity", "leads out", "dropped: why", "asked", "stamps"],
)
def test_a_damaged_manifest_counts_as_none(tiny_copy, damage):
    dataset = tiny_copy("3d")
    first = warps(dataset, ("tr_00",), each=1)
    file = warped_in(dataset) / "manifest.json"
    file.write_text(damage(json.loads(file.read_text())))
    second = warps(dataset, ("tr_00",), each=1)
    assert second.cases == first.cases
    assert second.places != first.places
    assert len(list(warped_in(dataset).glob("part_*"))) == 1  # what nobody lists has gone


# ------------------------------------------------------------------ many processes


WARP_SLOWLY = """
import sys, time
from nnunet_ssl.shapes import case, registration, warped
real = case.warp_case
def slow(*job):
    outcome = real(*job)
    time.sleep(0.5)
    return outcome
warped.warp_case = slow
warped.store.SAVE_EVERY = 0
registration.ITERATIONS = 4
from nnunet_ssl.commands.warp import main
main()
"""


def child(dataset: TinyDataset, *more: object) -> subprocess.Popen:
    arguments = ["-d", dataset.id, "-c", dataset.configuration, "-p", dataset.plans_name, "-np", 1, *more]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, "-c", WARP_SLOWLY, *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip


def test_killed_midway_it_goes_on_with_what_is_finished(tiny_copy, quick_registration):
    dataset = tiny_copy("3d")
    process = child(dataset, "--pairs", 2)
    end = time.time() + 120
    while not ((warped_in(dataset) / "manifest.json").exists() and len(manifest(dataset)["cases"]) >= 2):
        assert process.poll() is None, process.communicate()
        assert time.time() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = files(dataset)
    made = warps(dataset, tuple(dataset.cases("imagesTr")), each=2)
    assert count_of(made) == [(case, 2) for case in dataset.cases("imagesTr")]
    now = files(dataset)
    assert all(now[name] == stamp for name, stamp in finished.items() if name in now)
    assert len(finished.keys() & now.keys()) >= 3
    listed = {name for entry in manifest(dataset)["cases"].values() for name in entry["files"]}
    assert {file.name for file in warped_in(dataset).glob("part_*/*/*")} == listed


def test_a_second_process_waits_for_the_first_and_takes_what_it_has_made(tiny_copy, capsys, monkeypatch):
    dataset = tiny_copy("3d")
    this = wish(dataset, each=1)
    os.mkdir(this.folder)
    found = []
    with holding(os.path.join(this.folder, ".lock"), "busy"):
        second = threading.Thread(target=lambda: found.append(prepare_warps(this, 1)))
        second.start()
        end = time.time() + 60
        while "another process is preparing" not in capsys.readouterr().out:
            assert time.time() < end
            time.sleep(0.01)
        assert not found
        # the first, which holds the lock, makes them in another folder and puts them there
        with monkeypatch.context() as patch:
            patch.setattr(Wish, "folder", property(lambda wish: f"{wish.labeled_folder}_first"))
            first = prepare_warps(this, 1)
        for entry in Path(first.folder).iterdir():
            if entry.name != ".lock":
                shutil.move(entry, this.folder)
        before = files(dataset)
    second.join(60)
    assert found[0].contents == first.contents
    assert files(dataset) == before


def test_a_training_keeps_its_warps_while_others_are_made_anew(tiny_copy, capsys):
    dataset = tiny_copy("3d")
    began_with = warps(dataset, ("tr_00",), each=1)
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def training() -> None:
        warps(dataset, ("tr_00",), reading=True)
        ready.set()
        time.sleep(600)

    process = context.Process(target=training, daemon=True)
    process.start()
    try:
        assert ready.wait(120)
        (case, place), *_ = began_with.places.items()
        before = load(place, case)
        change_label(dataset, "tr_00")
        now = warps(dataset, ("tr_00",))
        assert "stay until no training reads them" in capsys.readouterr().out
        assert set(now.places.values()).isdisjoint(began_with.places.values())
        after = load(place, case)
        assert np.array_equal(before[0], after[0])
        assert np.array_equal(before[1], after[1])
    finally:
        process.kill()
        process.join()
    warps(dataset, ("tr_00",), each=2)  # the next that has something to do tidies up
    assert not Path(place).exists()


def test_a_rank_waits_without_reading_the_labeled_cases_at_each_look(tiny_copy, monkeypatch):
    dataset = tiny_copy("3d")
    this = wish(dataset, ("tr_00",), each=1)
    monkeypatch.setattr(store, "POLL_EVERY", 0.01)
    digests = []
    monkeypatch.setattr(
        "nnunet_ssl.shapes.case.stamp", lambda file, kept, how: digests.append(kept is None) or stamp(file, kept, how)
    )
    with pytest.raises(UserError, match=r"was not ready after 0 s\. Make the warps first with nnUNetv2_ssl_warp"):
        wait_until_warped(this, timeout=0.3)
    assert digests.count(True) == 3  # .b2nd, _seg.b2nd and .pkl, once
    assert len(digests) > 6
    made = prepare_warps(this, 1)
    assert wait_until_warped(this) == made


def test_labeled_images_to_warp_onto_are_read_once(tiny_copy, monkeypatch):
    dataset = tiny_copy()
    cases = tuple(dataset.cases("imagesTr"))
    first = labeled_images(wish(dataset), cases)
    prepare_warps(dataclasses.replace(wish(dataset, cases, each=1), onto=first), 1)

    def without_reading(path: str, kept: list, how: Callable) -> list:
        assert stamp(path, kept, how) is kept
        return kept

    monkeypatch.setattr("nnunet_ssl.shapes.case.stamp", without_reading)
    assert labeled_images(wish(dataset), cases) == first


def test_a_full_disk_keeps_what_is_finished(tiny_copy):
    dataset = tiny_copy("3d")
    this = wish(dataset, each=1)
    os.mkdir(this.folder)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", this.folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        with pytest.raises(UserError, match=r"_warped cannot be written \(No space left on device\). Make room"):
            prepare_warps(this, 1)
        subprocess.run(["mount", "-o", "remount,size=8m", this.folder], check=True)
        assert count_of(prepare_warps(this, 1)) == PAIR
    finally:
        subprocess.run(["umount", "--lazy", this.folder], check=True)


# ------------------------------------------------------------------ where it is no use


def test_where_few_register_it_says_so_in_one_sentence_and_tries_once(tiny_copy, monkeypatch, capsys):
    dataset = tiny_copy("3d")
    results = iter(["fold"] * 3 + [None] * 10)
    monkeypatch.setattr("nnunet_ssl.shapes.case.why_not", lambda *_: next(results))
    told = (
        r"_warped: of 4 pairs of images only 1 register well \(3 fold\), so warping cannot "
        r"help here\. Train without it: nnUNetTrainerLabeledOnly, or any trainer with 'warped_share' at 0"
    )
    monkeypatch.setattr("nnunet_ssl.shapes.quality.TOO_FEW", 0.26)
    for _ in range(2):
        with pytest.raises(UserError, match=told):
            warps(dataset, ("tr_00",), each=3)
    with pytest.raises(UserError, match=told):
        wait_until_warped(wish(dataset, ("tr_00",)), timeout=5)
    monkeypatch.setattr("nnunet_ssl.shapes.quality.TOO_FEW", 0.25)
    assert count_of(warps(dataset, ("tr_00",))) == [("tr_00", 1)]
    assert capsys.readouterr().out.count("registering 4 pairs") == 1


def test_those_left_out_for_others_do_not_count_as_bad(tiny_copy):
    dataset = tiny_copy("3d")
    this = wish(dataset, ("tr_00",), each=1)
    prepare_warps(this, 1)
    found = WarpManifest.read(this.folder)
    (case,) = found.cases
    bad = {**found.cases[case], "why": "fold"}
    found.about["dropped"] = {f"x{i}": {**bad, "why": LESS_ALIKE if i < 1 else "fold"} for i in range(7)}
    refuse_where_few_register(this, found)
    found.about["dropped"]["y"] = bad
    with pytest.raises(UserError, match="of 9 pairs of images only 2"):
        refuse_where_few_register(this, found)


def test_a_pair_that_cannot_be_registered_is_left_out(tiny_copy, monkeypatch):
    dataset = tiny_copy("3d")
    real, calls = register, []

    def odd(*arguments: object) -> Registration:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("ITK is not pleased")
        return real(*arguments)

    monkeypatch.setattr("nnunet_ssl.shapes.case.register", odd)
    assert count_of(warps(dataset, ("tr_00",), each=2)) == [("tr_00", 2)]
    (entry,) = manifest(dataset)["dropped"].values()
    assert entry["why"] == "cannot be registered (RuntimeError: ITK is not pleased)"


def test_a_labeled_case_that_is_not_prepared_is_named(tiny_copy):
    dataset = tiny_copy("3d")
    with pytest.raises(UserError, match=r"nnUNetPlans_3d_fullres has no case nobody\. Run nnUNetv2_preprocess -d"):
        warps(dataset, ("nobody",), each=1)


def test_plans_are_those_of_the_dataset(tiny_copy):
    """The folder lies beside that of the labeled cases."""
    dataset = tiny_copy("3d")
    this = wish(dataset)
    assert Path(this.folder) == warped_in(dataset)
    assert PlansManager(this.plans).get_configuration("3d_fullres").data_identifier == Path(this.labeled_folder).name
