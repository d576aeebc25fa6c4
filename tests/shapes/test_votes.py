"""The votes on unlabeled images as they are kept: by whom, on which grid, when they are made again."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from helpers.datasets import TinyDataset, make_case
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.errors import UserError
from nnunet_ssl.shapes import case as case_module
from nnunet_ssl.shapes import votes as module
from nnunet_ssl.shapes.case import load
from nnunet_ssl.shapes.votes import Electorate, VoteManifest, as_predicted, prepare_votes
from nnunet_ssl.unlabeled.prepare import prepare_unlabeled


@pytest.mark.parametrize("spacing", [(0.8, 5.0, 1.0), (0.6, 4.0, 1.1)], ids=["same grid", "resampled"])
@pytest.mark.parametrize("kind", ["labels", "regions"])
def test_votes_come_back_to_the_raw_image(tiny, spacing, kind):
    """Anisotropic, transposed, and cut out of a border of zeros."""
    plans = tiny("anisotropic").plans
    plans["transpose_forward"], plans["transpose_backward"] = [1, 0, 2], [1, 0, 2]
    plans["configurations"]["3d_fullres"]["spacing"] = [5.0, 0.8, 1.0]
    dataset_json = {"channel_names": {"0": "x"}, "labels": {"background": 0, "shell": 1, "core": 2}}
    if kind == "regions":
        dataset_json |= {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    rng = np.random.default_rng(0)
    image, labels = np.zeros((1, 30, 9, 26), np.float32), np.zeros((1, 30, 9, 26), np.int16)
    inside = (slice(None), slice(4, 27), slice(1, 8), slice(5, 20))
    image[inside] = rng.uniform(1, 2, image[inside].shape)
    labels[inside][:, 3:15, 1:5, 2:11], labels[inside][:, 6:10, 2:4, 4:9] = 1, 2

    properties = {"spacing": list(spacing)}
    preprocess = DefaultPreprocessor(verbose=False).run_case_npy
    _, prepared, properties = preprocess(image, labels, properties, manager, configuration, dataset_json)
    votes = np.stack([np.isin(prepared[0], which) for which in ([-1, 0], [1], [2])]).astype(np.float32)
    found = as_predicted(votes, properties, manager, "3d_fullres", dataset_json)

    expected = np.stack([labels[0] == which for which in (0, 1, 2)])  # of labels, also where there are regions
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    if spacing == (0.8, 5.0, 1.0):
        np.testing.assert_array_equal(found, expected)
    else:
        assert ((found > 0.5) == expected).mean() > 0.99
        np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)


@pytest.fixture
def electorate(tiny_copy: Callable[..., TinyDataset]) -> Electorate:
    """Two labeled cases of the tiny dataset, and no label of an unlabeled one that could be opened."""
    dataset = tiny_copy("3d")
    for case in dataset.cases("imagesUn"):
        os.mkfifo(dataset.raw / "labelsTr" / f"{case}.nii.gz")
    return Electorate(dataset.name, dataset.plans, "3d_fullres", dataset.dataset_json, "0", ("tr_00", "tr_01"))


def ready(electorate: Electorate) -> VoteManifest:
    plans = PlansManager(electorate.plans)
    of_dataset = (electorate.dataset_name, plans, electorate.configuration, electorate.dataset_json)
    return prepare_votes(electorate, prepare_unlabeled(*of_dataset, ["tr_00", "tr_01", "tr_02"], 1), 1)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * (one & other).sum() / (one.sum() + other.sum())


@pytest.mark.timeout(300)
def test_votes_are_good_and_made_once(electorate, tiny, monkeypatch, capsys):
    votes = ready(electorate)
    assert sorted(votes.cases) == ["un_00", "un_01", "un_02", "un_03"]
    recipe = tiny("3d").recipe
    rng = np.random.default_rng(recipe.seed)
    truth = [make_case(recipe, rng)[1] for _ in range(recipe.labeled + recipe.unlabeled)][recipe.labeled :]
    for labels, (case, entry) in zip(truth, sorted(votes.cases.items()), strict=True):
        assert set(entry["atlases"]) == {"tr_00", "tr_01"}  # and no other case
        place = votes.place(case)
        assert sorted(os.listdir(place)) == [f"{case}.npz", f"{case}.pkl"]
        with np.load(os.path.join(place, f"{case}.npz")) as archive:
            probabilities = archive["probabilities"].astype(np.float32)
        silent = probabilities.sum(0) == 0  # an edge that no labeled image reaches
        assert silent.mean() < 0.05
        np.testing.assert_allclose(probabilities.sum(0)[~silent], 1, atol=2e-3)
        assert dice(probabilities.argmax(0) > 0, labels > 0) > 0.9

    def never(*_: object) -> None:
        raise AssertionError("registered again")

    register = case_module.register
    monkeypatch.setattr(case_module, "register", never)
    capsys.readouterr()
    assert ready(electorate).cases == votes.cases
    assert "registrations" not in capsys.readouterr().out

    lost = os.path.join(votes.place("un_02"), "un_02.npz")
    os.truncate(lost, 10)
    monkeypatch.setattr(case_module, "register", register)
    ready(electorate)
    assert "2 registrations of 2 labeled images onto 1 unlabeled ones" in capsys.readouterr().out

    identity = electorate.identity
    file = os.path.join(electorate.labeled_folder, "tr_00_seg.b2nd")
    other = os.path.join(electorate.labeled_folder, "tr_02_seg.b2nd")
    with open(other, "rb") as source:
        content = source.read()
    with open(file, "wb") as target:  # as if the label had been mended
        target.write(content)
    assert electorate.identity != identity
    monkeypatch.setattr(case_module, "register", never)
    with pytest.raises(UserError, match=r"un_00 cannot be voted on \(AssertionError: registered again\).*4 image"):
        ready(electorate)
    assert not VoteManifest.read(electorate.folder).cases  # a vote that is out of date is nobody's


@pytest.mark.timeout(300)
def test_where_most_do_not_register_nobody_votes(electorate, monkeypatch):
    monkeypatch.setattr(case_module, "why_not", lambda *_: "fold")
    voted, real = [], module.vote

    def counted(image, good, classes):
        voted.append(len(good := list(good)))
        return real(image, iter(good), classes)

    monkeypatch.setattr(module, "vote", counted)
    with pytest.raises(UserError, match=r"of 8 pairs .* only 0 register well \(8 fold\).*--teachers network"):
        ready(electorate)
    entry = VoteManifest.read(electorate.folder).cases["un_00"]
    assert [one["why"] for one in entry["atlases"].values()] == ["fold", "fold"]
    assert voted == [0] * 4


@pytest.mark.parametrize("error", [MemoryError("12 GiB"), RuntimeError("Failed to allocate memory for image.")])
def test_too_little_memory_is_told_at_once(electorate, monkeypatch, error):
    tried = []

    def too_large(*_):
        tried.append(1)
        raise error

    monkeypatch.setattr(case_module, "register", too_large)
    with pytest.raises(UserError, match=r"do not fit into memory\. Vote on fewer at a time \(-np 1\)"):
        ready(electorate)
    assert len(tried) == 1


def test_the_most_alike_vote(electorate, monkeypatch):
    monkeypatch.setattr(module, "ATLASES", 2)
    folder = electorate.labeled_folder
    everybody = tuple(f"tr_{i:02d}" for i in range(5))
    electorate = replace(electorate, labeled=everybody)
    chosen = module._most_alike(electorate, {"tr_03": folder})["tr_03"]
    looks = {case: module.description(load(folder, case)[0]) for case in everybody}
    assert chosen == sorted(everybody, key=lambda case: np.linalg.norm(looks[case] - looks["tr_03"]))[:2]
    assert chosen[0] == "tr_03"


def test_a_labeled_case_that_is_not_prepared_is_refused(electorate):
    with pytest.raises(UserError, match=r"has no case nobody\. Run nnUNetv2_preprocess -d Dataset901_Tiny"):
        _ = replace(electorate, labeled=("nobody",)).identity
