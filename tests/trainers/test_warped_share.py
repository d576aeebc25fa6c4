"""``warped_share`` with every trainer, and ``nnUNetTrainerWarps``: what is drawn, saved, resumed and refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import assert_equal, assert_resumed_equals_uninterrupted, resumed, train, weights
from helpers.steps import ONE_WITH_SHTA, stepped

from nnunet_ssl.errors import UserError
from nnunet_ssl.shapes.loader import JoinedDataset
from nnunet_ssl.shapes.wish import WarpManifest

NAME = "nnUNetTrainerWarps_3epochs"


@pytest.fixture(autouse=True)
def quick_pairs(monkeypatch, quick_registration):
    """Whatever becomes of them."""
    monkeypatch.setattr("nnunet_ssl.shapes.quality.TOO_FEW", 0.0)


def loader_of(trainer):
    trainer.unlabeled = trainer._prepared_unlabeled()
    trainer.warps = trainer._prepared_warps() if trainer.uses_warps else None
    return trainer.get_dataloaders()[0].data_loader


@pytest.mark.parametrize("name", [name for name in ONE_WITH_SHTA if name != "nnUNetTrainerMAE"])  # it sees no label
def test_every_trainer_takes_warps(tiny, make_trainer, name):
    """SASNet with its memory of confidence and its coordinates included."""
    trainer = make_trainer(name, tiny(), settings={"warped_share": 0.5})
    found = stepped(trainer)
    assert all(p.isfinite().all() for p in found.values())
    joined = trainer.dataloader_train.data_loader.labeled._data
    assert isinstance(joined, JoinedDataset)
    assert set(trainer.warps.cases) < set(joined.identifiers)


def test_warps_onto_labeled_images_need_no_unlabeled_ones(tiny_copy, make_trainer):
    dataset = tiny_copy("3d")
    shutil.rmtree(dataset.raw / "imagesUn")
    trainer = make_trainer("nnUNetTrainerWarps", dataset, settings={"warp_onto": "labeled"})
    stepped(trainer)
    assert trainer.unlabeled is None
    entries = WarpManifest.read(trainer.warps.folder).cases
    train = set(map(str, trainer.do_split()[0]))
    assert {entries[case]["fixed"] for case in trainer.warps.cases} <= train
    with pytest.raises(UserError, match="imagesUn"):
        stepped(make_trainer("nnUNetTrainerWarps", dataset, fold=1))


def test_sasnet_remembers_its_confidence_of_warps_too(tiny, make_trainer):
    trainer = make_trainer("nnUNetTrainerSASNet", tiny(), settings={"warped_share": 1.0})
    stepped(trainer)
    shapes = trainer.memory._shapes
    for case in trainer.warps.cases:
        assert shapes[case] == trainer.labeled_dataset().load_case(case)[0].shape[1:]
    assert set(shapes) == {*trainer.warps.cases, *map(str, trainer.do_split()[0])}


@pytest.mark.parametrize("name", ["nnUNetTrainerLabeledOnly", "nnUNetTrainerCPS", "nnUNetTrainerSHTA_LabeledOnly"])
def test_with_a_share_of_0_nothing_is_other_than_without_the_setting(tiny, make_trainer, monkeypatch, name):
    """No warp is made or looked for, and batches are those of nnU-Net's own loader of the training cases."""
    monkeypatch.setattr("nnunet_ssl.trainers.data.prepare_warps", lambda *_, **__: pytest.fail("warps are made"))
    plain = stepped(make_trainer(name, tiny()))
    off = make_trainer(name, tiny(), settings={"warped_share": 0.0, "warped_share_last": 0.0})
    assert all(torch.equal(p, plain[n]) for n, p in stepped(off).items())
    loader = off.dataloader_train.data_loader
    assert loader.probabilities is None
    assert loader.labeled.sampling_probabilities is None
    assert type(loader.labeled._data) is off.dataset_class
    assert loader.labeled._data.identifiers == off.do_split()[0]


def test_half_of_the_patches_are_of_warps_and_they_are_those_of_its_cases(tiny, make_trainer):
    loader = loader_of(make_trainer("nnUNetTrainerWarps", tiny()))
    joined = loader.labeled._data
    warps, real = set(joined._warps.identifiers), set(joined._labeled.identifiers)
    probabilities = loader.probabilities(0)
    drawn = Counter(np.random.default_rng(0).choice(loader.labeled.indices, 4000, p=probabilities))
    assert sum(drawn[case] for case in warps) / 4000 == pytest.approx(0.5, abs=0.03)
    assert set(drawn) == warps | real


def test_the_share_of_the_batch_is_that_of_its_step(tiny, make_trainer):
    """From warps alone to none, whatever worker or resumed run makes the batch."""
    settings = {"warped_share": 1.0, "warped_share_last": 0.0, "num_iterations_per_epoch": 2}
    trainer = make_trainer(NAME, tiny(), settings=settings)
    loader = loader_of(trainer)
    batches = [next(loader) for _ in range(6)]
    warps = set(trainer.warps.cases)
    assert set(map(str, batches[0]["keys"])) <= warps
    assert not set(map(str, batches[5]["keys"])) & warps
    trainer.current_epoch = 2
    later = trainer.get_dataloaders()[0].data_loader
    for batch in batches[4:]:
        again = next(later)
        assert list(again["keys"]) == list(batch["keys"])
        assert torch.equal(again["data"], batch["data"])


@pytest.mark.parametrize("kind", ["3d", "2d", "ignore", "regions", pytest.param("anisotropic", marks=pytest.mark.slow)])
def test_foreground_is_found_in_warps(tiny, make_trainer, monkeypatch, kind):
    """Patches that are to hold a class hold one, and no label but nnU-Net's reaches the network."""
    monkeypatch.setattr("nnunet_ssl.shapes.warped.BUDGET", 1e6)
    trainer = make_trainer("nnUNetTrainerWarps", tiny(kind), settings={"warped_share": 1.0})
    loader = loader_of(trainer)
    loader.labeled.get_do_oversample = lambda _: True
    loader.labeled.transforms = None
    warps, ignore = set(trainer.warps.cases), trainer.label_manager.ignore_label
    for _ in range(4):
        batch = next(loader)
        assert set(map(str, batch["keys"])) <= warps
        for labels in batch["target"]:
            present = {int(value) for value in labels.unique()} - {-1, 0, ignore}
            assert present, kind
    for case in trainer.warps.cases:
        _, seg, _, properties = loader.labeled._data.load_case(case)
        seg = seg[:]
        for classes, where in properties["class_locations"].items():
            assert all(np.isin(seg[tuple(voxel)], classes) for voxel in where[:50]), (case, classes)


@pytest.mark.parametrize(
    "kind",
    [
        "2d",
        "regions",
        pytest.param("png", marks=pytest.mark.slow),
        pytest.param("multichannel", marks=pytest.mark.slow),
        pytest.param("anisotropic", marks=pytest.mark.slow),
        pytest.param("ignore", marks=pytest.mark.slow),
        pytest.param("resenc", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_data_trains_with_warps(tiny, make_trainer, monkeypatch, kind):
    monkeypatch.setattr("nnunet_ssl.shapes.warped.BUDGET", 1e6)
    trainer = make_trainer("nnUNetTrainerWarps", tiny(kind), settings={"warped_share": 1.0})
    assert all(p.isfinite().all() for p in stepped(trainer).values())
    if kind == "ignore":
        assert trainer.label_manager.ignore_label in {
            int(v) for case in trainer.warps.cases for v in np.unique(trainer.labeled_dataset().load_case(case)[1][:])
        }


def test_resumed_it_ends_with_the_weights_of_an_uninterrupted_run(tiny, make_trainer):
    settings = {"save_every": 1, "warped_share_last": 0.1}
    folder = assert_resumed_equals_uninterrupted(lambda: make_trainer(NAME, tiny(), settings=settings))
    record = json.loads((folder / "ssl_settings.json").read_text())
    assert record["settings"]["warped_share"] == 0.5
    assert record["warped_cases"]
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"


def stopped_run(dataset, make_trainer):
    trainer = make_trainer(NAME, dataset, settings={"save_every": 1})
    train(trainer, until=1)
    return Path(trainer.output_folder), trainer.warps


def test_it_goes_on_only_with_the_warps_that_it_began_with(tiny_copy, make_trainer):
    dataset = tiny_copy()
    folder, warps = stopped_run(dataset, make_trainer)
    manifest = WarpManifest.read(warps.folder)
    kept = json.dumps(manifest.cases)
    removed, changed, *_ = warps.cases
    del manifest.cases[removed]
    manifest.cases[changed]["made_from"] = "0" * 64
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunet_ssl.shapes.warped._State.made_from", lambda self, one, other: next(
            entry["made_from"] for entry in manifest.cases.values() if (entry["moving"], entry["fixed"]) == (one, other)
        ))  # fmt: skip
        manifest.about["dropped"] = {}
        manifest.about["considered"] = dict.fromkeys(manifest.about["asked"], dataset.cases("imagesUn"))
        manifest.write()
        told = rf"other warps than are there now: 1 removed \({removed}\), 1 changed \({changed}\)\. Put them back"
        with pytest.raises(UserError, match=told):
            resumed(make_trainer, lambda: dataset, folder, NAME).on_train_start()
    manifest.cases = json.loads(kept)
    manifest.write()
    trainer = resumed(make_trainer, lambda: dataset, folder, NAME)
    trainer.on_train_start()
    assert trainer.current_epoch == 1


def test_it_goes_on_though_an_image_has_come_that_it_does_not_use(tiny_copy, make_trainer):
    """It has learned from its warps alone; a method that takes unlabeled images themselves is refused."""
    dataset = tiny_copy()
    folder, warps = stopped_run(dataset, make_trainer)
    from helpers.datasets import make_case, write_images

    image = make_case(dataset.recipe, np.random.default_rng(9))[0]
    write_images(dataset.recipe, dataset.raw / "imagesUn", "zz_new", image)
    trainer = resumed(make_trainer, lambda: dataset, folder, NAME)
    trainer.on_train_start()
    assert trainer.warps == warps


def test_the_share_is_what_makes_it_other_than_labels_alone(tiny, make_trainer, tmp_path):
    """One seed: the same first weights, and with the share at 0 the same as nnUNetTrainerLabeledOnly at the end."""
    ends = []
    for name, settings in (("Warps", {"warped_share": 0.0}), ("LabeledOnly", {}), ("Warps", {})):
        trainer = make_trainer(f"nnUNetTrainer{name}_1epochs", tiny(), settings=settings)
        train(trainer)
        ends.append(weights(Path(trainer.output_folder)))
        if name == "Warps":
            Path(trainer.output_folder).rename(tmp_path / f"done{len(ends)}")
    assert_equal(ends[0], ends[1])
    assert not all(torch.equal(p, ends[2][n]) for n, p in ends[1].items())
