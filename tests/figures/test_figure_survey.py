"""One pass over the cases: a fair draw of tokens, counts of every checkpoint, and each case prepared once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import datasets
from real_runs import Maker, counted, options_of, some_cases, train, train_and_keep

from nnunet_ssl.commands.figures import draw_figures
from nnunet_ssl.figures.runs import TrainedRun
from nnunet_ssl.figures.shta import survey as module
from nnunet_ssl.figures.shta.branch import Tokens, cut_patches
from nnunet_ssl.figures.shta.survey import ClassSample, earliest_kept, lowest_of_each_class, survey
from nnunet_ssl.figures.shta.tokens import draw_tokens

# ----------------------------------------------------------------------------------------------------------- sample


def some_tokens(case: str, num: int, seed: int = 0) -> dict[str, Tokens]:
    """As two runs see them. The feature tells one token from all others."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(1, 4, (num,), generator=generator)
    identity = torch.stack([torch.full((num,), float(seed)), torch.arange(num)], 1)
    embedding = torch.randn(num, 5, generator=generator)
    return {
        "host": Tokens(case, identity, classes),
        "shta": Tokens(case, -identity, classes, embedding),
    }


def test_lowest_of_each_class() -> None:
    rng = np.random.default_rng(0)
    classes, draws = rng.integers(1, 5, 60), rng.random(60)
    kept = lowest_of_each_class(classes, draws, 6)
    for label in range(1, 5):
        members = [i for i in range(60) if classes[i] == label]
        assert {i for i in kept if classes[i] == label} == set(sorted(members, key=lambda i: draws[i])[:6])
    assert list(kept) == sorted(kept)
    assert len(lowest_of_each_class(classes[:0], draws[:0], 6)) == 0


def test_the_draw_is_balanced_and_the_same_for_all_runs_and_repeatable() -> None:
    samples = []
    for seed in (0, 0, 1):
        sample = ClassSample(8, seed)
        for i, num in enumerate((30, 5, 50)):
            sample.add(some_tokens(f"case{i}", num, i))
        assert [int((sample.classes == label).sum()) for label in (1, 2, 3)] == [8, 8, 8]
        assert np.array_equal(sample.features["host"], -sample.features["shta"])
        assert np.allclose(np.linalg.norm(sample.embedding, axis=1), 1)
        samples.append(sample)
    assert sum(samples[0].total.values()) == 85
    assert np.array_equal(samples[0].features["host"], samples[1].features["host"])
    assert not np.array_equal(samples[0].features["host"], samples[2].features["host"])
    # what stands beside a token is its own
    for sample in samples:
        for (seed, i), label, z in zip(sample.features["host"], sample.classes, sample.embedding, strict=True):
            num = {0: 30, 1: 5, 2: 50}[int(seed)]
            tokens = some_tokens("", num, int(seed))["shta"]
            assert tokens.classes[int(i)] == label
            direction = torch.nn.functional.normalize(tokens.embedding[int(i)], dim=0)
            np.testing.assert_allclose(z, direction, rtol=1e-5, atol=1e-6)


def test_each_token_has_the_same_chance_in_whichever_case_it_is() -> None:
    """One pass over cases of very different size draws as one draw from all of them would: in proportion."""
    from_small = 0
    for seed in range(200):
        sample = ClassSample(5, seed)
        sample.add(some_tokens("small", 10, 1))
        sample.add(some_tokens("large", 90, 2))
        from_small += int((sample.features["host"][:, 0] == 1).sum())
    assert from_small / (200 * 15) == pytest.approx(0.1, abs=0.025)


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_the_earliest_kept_checkpoint_that_has_a_branch(tmp_path: Path) -> None:
    run = TrainedRun("A", "A", tmp_path, "0", "checkpoint_final.pth")
    run.fold_folder.mkdir()
    assert earliest_kept(run) == []
    for epoch in (20, 4, 100):
        (run.fold_folder / f"checkpoint_epoch{epoch}.pth").touch()
    assert earliest_kept(run) == []
    for epoch in (20, 100):
        (run.fold_folder / f"checkpoint_epoch{epoch}_ssl.pth").touch()
    kept = dataclasses.replace(run, name="A, epoch 20", checkpoint="checkpoint_epoch20.pth")
    assert earliest_kept(run) == [kept]
    (run.fold_folder / "debug.json").write_text(json.dumps({"num_epochs": "80"}))
    assert earliest_kept(run) == [dataclasses.replace(kept, name="A, epoch 20 of 80 (25%)")]
    assert earliest_kept(dataclasses.replace(run, checkpoint="checkpoint_epoch20.pth")) == []


# ------------------------------------------------------------------------------------------------------- real runs


def test_a_case_is_prepared_once_for_all_models_and_both_figures(
    tiny, make_trainer: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = tiny("3d")
    run, early = train_and_keep(make_trainer("nnUNetTrainerSHTA_LabeledOnly", dataset))
    host = train(make_trainer("nnUNetTrainerLabeledOnly", dataset))
    cases, options = some_cases(dataset), options_of(dataset, embedding=("pca",))
    prepared = []

    def noting(*args, **kwargs):
        prepared.append(args[2].name)
        return cut_patches(*args, **kwargs)

    monkeypatch.setattr(module, "cut_patches", noting)
    draw_figures(["tokens", "assignment"], [host, run], cases, tmp_path / "out", options)
    assert prepared == [case.name for case in cases]
    found = survey((host, run), tuple(cases), tuple(options.names), "cpu", 0)
    assert found.compared == (host, run)
    assert [each.checkpoint for each in found.counts] == [early.checkpoint, run.checkpoint]
    for each, count in found.counts.items():
        assert np.array_equal(count, counted(each, cases))

    # labels that were not chosen do not count, and one class is shown beside the background
    only_core = survey((host, run), tuple(cases), (2,), "cpu", 0)
    final = found.counts[run]
    assert np.array_equal(only_core.counts[run], np.stack([np.zeros_like(final[0]), np.zeros_like(final[0]), final[2]]))
    assert {0, 2} <= set(only_core.sample.classes)

    # a host whose plans prepare images in another way does not see the same tokens
    file = host.folder / "plans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 2.0, 2.0]
    file.write_text(json.dumps(plans))
    survey.cache_clear()
    prepared.clear()
    draw_tokens([host, run], cases, tmp_path / "out", options)
    assert prepared == [case.name for case in cases]
    caption = (tmp_path / "out/tokens.md").read_text(encoding="utf-8")
    assert f"Not shown: {host.name}, whose plans" in caption
    assert f"{host.name}: decoder" not in caption
    assert f"without {host.name}, whose plans" in capsys.readouterr().out


def test_a_dataset_with_one_class(
    fresh_folders: datasets.Folders, make_trainer: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All figures that networks are needed for, none of which was asked for, so that none may fail."""
    recipe = dataclasses.replace(datasets.RECIPES["3d"], dataset_id=909, name="TinyBinary", core=False)
    datasets.write_raw_dataset(recipe, fresh_folders.raw)
    dataset = datasets.plan_and_preprocess(recipe, fresh_folders)
    runs = [
        train(make_trainer(f"nnUNetTrainer{name}", dataset, settings={"seed": seed}))
        for seed, name in enumerate(("LabeledOnly", "SHTA_LabeledOnly"))
    ]
    out = tmp_path / "out"
    draw_figures(None, runs, some_cases(dataset), out, options_of(dataset, embedding=("pca",)))
    assert {"assignment.md", "entropy.md", "tokens.md"} <= {file.name for file in out.iterdir()}
    assert "Skipped" not in capsys.readouterr().out
    caption = (out / "tokens.md").read_text(encoding="utf-8")
    assert "| background | " in caption
    assert "Background: tokens without any foreground" in caption
