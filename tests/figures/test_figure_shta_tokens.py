"""Tokens read from a trained run against the trainer's own modules, patch by patch and token by token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from real_runs import Maker, some_cases, train

from nnunet_ssl.errors import UserError
from nnunet_ssl.figures.runs import TrainedRun
from nnunet_ssl.figures.shta.branch import (
    NOT_SHOWN,
    baseline_and_shta,
    cut_patches,
    has_branch,
    load_branch,
    load_model,
    read_tokens,
    side_by_side,
)
from nnunet_ssl.trainers.resuming import training_state_file

# ------------------------------------------------------------------------------------------------------ side_by_side


@pytest.mark.parametrize(
    ("shape", "patch"), [((5, 7), (4, 4)), ((8, 4), (4, 4)), ((3, 5, 7), (4, 4)), ((5, 9, 6), (2, 4, 8))]
)
def test_patches_lie_side_by_side_in_order(shape: tuple, patch: tuple) -> None:
    volume = torch.arange(2 * np.prod(shape)).reshape(2, *shape).float()
    thick = (1,) * (len(shape) - len(patch)) + patch
    padded = padded_to_patches(volume, thick, -9)
    cells = list(np.ndindex(*(n // t for n, t in zip(padded.shape[1:], thick, strict=True))))
    patches = side_by_side(volume, patch, -9)
    assert patches.shape == (len(cells), 2, *patch)
    for content, cell in zip(patches, cells, strict=True):
        box = (slice(None), *(slice(c * t, (c + 1) * t) for c, t in zip(cell, thick, strict=True)))
        assert torch.equal(content.reshape(2, *thick), padded[box])


# -------------------------------------------------------------------------------------------------------------- runs


def made_up_run(folder: Path, trainer: str, settings: dict | None) -> TrainedRun:
    run = TrainedRun(trainer, trainer, folder / trainer, "0", "checkpoint_final.pth")
    run.fold_folder.mkdir(parents=True)
    if settings is not None:
        (run.fold_folder / "ssl_settings.json").write_text(json.dumps({"settings": settings}))
    return run


def test_the_pair_is_shta_with_its_own_host(tmp_path: Path) -> None:
    plain = made_up_run(tmp_path, "nnUNetTrainer", None)
    cps = made_up_run(tmp_path, "nnUNetTrainerCPS_3epochs", {"seed": 0})
    gacps = made_up_run(tmp_path, "nnUNetTrainerSHTA_GACPS_3epochs", {"shta_weight": 0.1})
    shta = made_up_run(tmp_path, "nnUNetTrainerSHTA_CPS_3epochs", {"shta_weight": 0.1})
    off = made_up_run(tmp_path, "nnUNetTrainerSHTA_URPC", {"shta_weight": 0})
    assert [has_branch(run) for run in (plain, cps, gacps, shta, off)] == [False, False, True, True, False]
    assert baseline_and_shta([plain, gacps, shta, cps]) == (cps, shta)
    assert baseline_and_shta([plain, gacps, shta]) == (plain, gacps)
    assert baseline_and_shta([off, gacps]) == (off, gacps)
    assert baseline_and_shta([plain, cps]) == (plain, None)
    assert baseline_and_shta([shta]) == (None, shta)


def test_a_host_of_other_epochs_is_still_the_host(tmp_path: Path) -> None:
    labeled = made_up_run(tmp_path, "nnUNetTrainerLabeledOnly_40epochs", {})
    longer = made_up_run(tmp_path, "nnUNetTrainerCPS_45epochs", {})
    equal = made_up_run(tmp_path, "nnUNetTrainerCPS_40epochs", {})
    shta = made_up_run(tmp_path, "nnUNetTrainerSHTA_CPS_40epochs", {"shta_weight": 0.1})
    default = made_up_run(tmp_path, "nnUNetTrainerSHTA_CPS", {"shta_weight": 0.1})
    assert baseline_and_shta([labeled, longer, shta]) == (longer, shta)
    assert baseline_and_shta([labeled, longer, equal, shta]) == (equal, shta)
    assert baseline_and_shta([labeled, longer, default]) == (longer, default)


def test_settings_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    run = made_up_run(tmp_path, "nnUNetTrainerSHTA_CPS", {})
    (run.fold_folder / "ssl_settings.json").write_text("{")
    with pytest.raises(UserError, match=r"ssl_settings.json is not JSON"):
        has_branch(run)


# ------------------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("kind", ["3d", "2d", "png", "ignore"])
def test_tokens_are_those_of_the_trainers_own_modules(tiny, make_trainer: Maker, kind: str) -> None:
    """Token by token, in order: cut the patch by hand, run network and branch, count the labels."""
    dataset = tiny(kind)
    trainer = make_trainer("nnUNetTrainerSHTA_LabeledOnly", dataset, settings={"shta_temperature": 0.2})
    run = train(trainer)
    model = load_model(run, "cpu")
    branch = load_branch(run, model)
    own = trainer.training_modules["shta_first"].eval()
    assert branch.stride == own.stride
    assert branch.loss.temperature == 0.2
    case = some_cases(dataset, "Tr")[0]
    patches = cut_patches(model, branch, case)
    tokens = read_tokens(model, branch, patches, embed=True)

    image, labels = preprocessed(trainer, case)
    network, patch = trainer.plans_network.eval(), trainer.configuration_manager.patch_size
    trainer.set_deep_supervision_enabled(False)
    kept = {}
    network.decoder.seg_layers[-1].register_forward_pre_hook(lambda _, inputs: kept.update(feature=inputs[0]))
    flat = len(patch) < image.ndim - 1
    thick = (1,) * flat + tuple(patch)
    stride = (1,) * flat + own.stride
    padded = padded_to_patches(image, thick, 0.0)
    outside = 3  # a value that no label has: the ignore label, or one more than the last
    padded_labels = padded_to_patches(labels, thick, outside)

    i = 0
    for cell in np.ndindex(*(n // t for n, t in zip(padded.shape[1:], thick, strict=True))):
        start = [c * t for c, t in zip(cell, thick, strict=True)]
        box = (slice(None), *(slice(s, s + t) for s, t in zip(start, thick, strict=True)))
        with torch.no_grad():
            network(padded[box].reshape(1, -1, *patch))
        feature = kept["feature"][0].reshape(-1, *thick)
        for token in np.ndindex(*(t // s for t, s in zip(thick, stride, strict=True))):
            first = [i * s for i, s in zip(token, stride, strict=True)]
            inner = tuple(slice(f, f + s) for f, s in zip(first, stride, strict=True))
            values = padded_labels[box][0][inner].flatten()
            valid = values[values != outside].clamp(min=0)
            shares = F.one_hot(valid.long(), 3).float().mean(0) if len(valid) * 2 >= len(values) else torch.zeros(3)
            if not (shares[1:].sum() >= 0.5 and shares[1:].max() >= 0.5):
                continue
            mean = feature[(slice(None), *inner)].flatten(1).mean(1)
            torch.testing.assert_close(tokens.feature[i], mean)
            assert tokens.classes[i] == 1 + shares[1:].argmax()
            with torch.no_grad():
                torch.testing.assert_close(tokens.embedding[i], own.embed(mean))
                cosines = F.cosine_similarity(own.embed(mean)[None], own.loss.proxies, dim=1)
            torch.testing.assert_close(tokens.assignment[i], torch.softmax(cosines / 0.2, 0))
            i += 1
    assert i == len(tokens.classes) > 0


def preprocessed(trainer, case) -> tuple[torch.Tensor, torch.Tensor]:
    configuration = trainer.configuration_manager
    files = [str(file) for file in case.images]
    image, labels, _ = configuration.preprocessor_class(verbose=False).run_case(
        files, str(case.label), trainer.plans_manager, configuration, trainer.dataset_json
    )
    return torch.as_tensor(image), torch.as_tensor(labels).float()


def padded_to_patches(volume: torch.Tensor, patch: tuple, fill: float) -> torch.Tensor:
    """Half of what is missing to whole patches goes below, the rest above."""
    missing = [-n % p for n, p in zip(volume.shape[1:], patch, strict=True)]
    widths = [(0, 0), *((m // 2, m - m // 2) for m in missing)]
    return torch.as_tensor(np.pad(volume.numpy(), widths, constant_values=fill))


def test_a_host_sees_the_same_tokens_without_embedding(tiny, make_trainer: Maker) -> None:
    dataset = tiny("3d")
    shta = train(make_trainer("nnUNetTrainerSHTA_LabeledOnly", dataset))
    host = train(make_trainer("nnUNetTrainerLabeledOnly", dataset))
    model, other = load_model(shta, "cpu"), load_model(host, "cpu")
    branch = load_branch(shta, model)
    patches = cut_patches(model, branch, some_cases(dataset)[0])
    tokens, seen = read_tokens(model, branch, patches, embed=True), read_tokens(other, branch, patches, embed=False)
    assert torch.equal(tokens.classes, seen.classes)
    assert not torch.allclose(tokens.feature, seen.feature)
    assert seen.embedding is None
    with pytest.raises(UserError, match=r"checkpoint_final_ssl.pth does not hold the SHTA branch"):
        load_branch(host, other)

    # with the background: the same tokens, and those without a voxel of foreground
    more = cut_patches(model, branch, some_cases(dataset)[0], background=True)
    assert torch.equal(more.classes.where(more.classes != 0, NOT_SHOWN), patches.classes)
    with_background = read_tokens(model, branch, more, embed=True)
    assert (with_background.classes == 0).sum() > 0
    foreground = with_background.classes > 0
    for name in ("classes", "feature", "embedding", "assignment"):
        torch.testing.assert_close(getattr(with_background, name)[foreground], getattr(tokens, name))


def test_a_branch_of_another_checkpoint_is_refused_and_one_without_settings_reads_the_file(
    tiny, make_trainer: Maker
) -> None:
    trainer = make_trainer("nnUNetTrainerSHTA_LabeledOnly", tiny("3d"), settings={"shta_temperature": 0.3})
    run = train(trainer)
    file = training_state_file(str(run.checkpoint_file))
    state = torch.load(file, weights_only=True)
    del state["settings"]
    torch.save(state, file)
    assert load_branch(run, load_model(run, "cpu")).loss.temperature == 0.3
    state["network"] = "of another one"
    torch.save(state, file)
    with pytest.raises(UserError, match=r"missing, damaged or of another checkpoint"):
        load_branch(run, load_model(run, "cpu"))
