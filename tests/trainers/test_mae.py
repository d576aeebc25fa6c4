"""MAE: what is hidden, what the error counts, whose images are seen, and that any trainer starts from its weights."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform
from helpers.runs import assert_equal, assert_resumed_equals_uninterrupted, train
from helpers.steps import a_batch, gradients, parameters, with_stages
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN
from torch import nn

from nnunet_ssl import trainers
from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers.mae import hidden_voxels, number_hidden

NAME = "nnUNetTrainerMAE"
KINDS = ["3d", "2d", "png", "multichannel", "anisotropic", "ignore", "regions", "resenc"]


# ------------------------------------------------------------------ blocks


@pytest.mark.parametrize(
    ("patch", "block", "ratio", "hidden"),
    [((16, 16, 16), (4, 4, 4), 0.75, 48), ((8, 16, 16), (2, 4, 8), 0.6, 19), ((16, 24), (8, 8), 0.99, 5),
     ((4, 8), (4, 4), 0.01, 1)],
)  # fmt: skip
def test_as_many_blocks_are_hidden_as_asked_for_and_always_whole(patch, block, ratio, hidden):
    torch.manual_seed(0)
    mask = hidden_voxels(5, patch, block, ratio, torch.device("cpu"))
    assert mask.shape == (5, 1, *patch)
    assert mask.dtype == torch.bool
    size = int(np.prod(block))
    assert mask.flatten(1).sum(1).tolist() == [hidden * size] * 5
    blocks = mask[:, 0]
    for axis, length in enumerate(block, 1):  # the blocks of an axis, side by side behind it
        blocks = blocks.unfold(axis, length, length)
    counts = blocks.flatten(1 + len(patch)).sum(-1)
    assert set(counts.flatten().tolist()) <= {0, size}
    if ratio == 0.75:
        assert len({tuple(m.flatten().tolist()) for m in mask}) == 5  # each image has its own


def test_every_block_is_hidden_as_often_as_any_other():
    torch.manual_seed(0)
    share = hidden_voxels(4000, (4, 4), (2, 2), 0.5, torch.device("cpu")).float().mean(0)
    torch.testing.assert_close(share, torch.full_like(share, 0.5), rtol=0, atol=0.04)


def test_at_least_one_block_is_hidden_and_one_is_seen():
    assert [number_hidden(n, r) for n, r in ((2, 0.01), (2, 0.99), (64, 0.75), (3, 0.5))] == [1, 1, 48, 2]


@pytest.mark.parametrize(
    ("kind", "block"), [("3d", [4, 4, 4]), ("2d", [4, 4]), ("anisotropic", [2, 4, 4]), ("resenc", [4, 4, 4])]
)
def test_a_block_is_a_voxel_of_the_bottleneck(tiny, make_trainer, kind, block):
    trainer = make_trainer(NAME, tiny(kind))
    strides = np.prod(trainer.plans_network.encoder.strides, axis=0)
    assert trainer.block_size == strides.tolist()
    if kind != "anisotropic":
        assert trainer.block_size == block


def test_a_network_of_ones_own_is_the_one_that_is_pretrained(tiny, make_trainer, monkeypatch):
    mixed = type("nnUNetTrainerMAEBN", (nnUNetTrainerBN, trainers.nnUNetTrainerMAE), {})
    monkeypatch.setattr(trainers, mixed.__name__, mixed, raising=False)
    kinds = {type(module) for module in make_trainer(mixed.__name__, tiny()).plans_network.modules()}
    assert nn.BatchNorm3d in kinds
    assert nn.InstanceNorm3d not in kinds


@pytest.mark.parametrize("block", [[4, 4], [5, 4, 4], [16, 16, 16], [32, 4, 4]])
def test_blocks_that_do_not_divide_the_patch_are_refused(tiny, make_trainer, block):
    with pytest.raises(UserError, match=r"mae_block_size .* does not suit the patch \[16, 16, 16\]"):
        make_trainer(NAME, tiny(), settings={"mae_block_size": block})


def test_a_share_of_warps_is_refused(tiny, make_trainer):
    with pytest.raises(UserError, match="'warped_share_last', but nnUNetTrainerMAE sees only images"):
        make_trainer(NAME, tiny(), settings={"warped_share": 0.5})


# ------------------------------------------------------------------ the step


def spied(trainer):
    """What enters the network and the last decoder feature of each pass to come."""
    seen = {"images": [], "features": []}
    trainer.plans_network.register_forward_pre_hook(lambda _, inputs: seen["images"].append(inputs[0]))
    trainer.plans_network.decoder.seg_layers[-1].register_forward_pre_hook(
        lambda _, inputs: seen["features"].append(inputs[0].detach())
    )
    return seen


@pytest.mark.parametrize("kind", ["3d", "2d", "multichannel"])
def test_the_error_is_the_mean_square_on_hidden_voxels_alone(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind), settings={"mae_mask_ratio": 0.5})
    seen, images = spied(trainer), a_batch_of(trainer)["data"]
    error = trainer._error_on_hidden(images)
    masked, feature = seen["images"][0], seen["features"][0]
    hidden = (masked != images).any(1, keepdim=True)  # a random image is nowhere 0
    assert hidden.float().mean() == 0.5
    assert (masked == torch.where(hidden, 0, images)).all()  # what is visible is as it was, all channels are hidden
    with torch.no_grad():
        filled_in = trainer.training_modules["reconstruction"](feature)
    assert filled_in.shape == images.shape
    expected = [(filled_in[b, c][hidden[b, 0]] - images[b, c][hidden[b, 0]]) ** 2 for b in range(len(images))
                for c in range(images.shape[1])]  # fmt: skip
    assert error.item() == pytest.approx(torch.cat(expected).mean().item(), rel=1e-5)


def test_visible_voxels_have_no_gradient_in_the_error(tiny, make_trainer, monkeypatch):
    trainer, kept = make_trainer(NAME, tiny()), []
    head = trainer.training_modules["reconstruction"]
    head.register_forward_hook(lambda _, __, output: (output.retain_grad(), kept.append(output))[1])
    seen, images = spied(trainer), a_batch_of(trainer)["data"]
    trainer._error_on_hidden(images).backward()
    hidden = seen["images"][0] != images
    assert (kept[0].grad[hidden] != 0).all()
    assert (kept[0].grad[~hidden] == 0).all()


def a_batch_of(trainer):
    """As the loader gives it."""
    torch.manual_seed(0)
    shape = trainer.batch_size, trainer.num_input_channels, *trainer.configuration_manager.patch_size
    return {"data": torch.randn(shape), "target": torch.zeros(shape, dtype=torch.int16)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_trains_validates_and_is_logged(tiny, make_trainer, kind):
    trainer = make_trainer(NAME + "_1epochs", tiny(kind))
    trainer.run_training()
    row = (Path(trainer.output_folder) / "ssl_log.csv").read_text().splitlines()
    assert row[0] == "epoch,loss_masked,loss_masked_validation"
    assert all(0 < float(value) < 20 for value in row[1].split(",")[1:])
    logged = trainer.logger.local_logger.my_fantastic_logging
    assert logged["mean_fg_dice"] == [-logged["val_losses"][0]]


def test_all_learns_but_the_heads_that_segment(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny())
    before = {n: p.detach().clone() for n, p in parameters(trainer).items()}
    found = gradients(trainer, a_batch_of(trainer))
    assert {n for n, g in found.items() if g is None} == {n for n in found if ".seg_layers." in n}
    del trainer._update
    trainer.train_step(a_batch_of(trainer))
    still = {n for n, p in parameters(trainer).items() if torch.equal(p, before[n])}
    assert still == {n for n in before if ".seg_layers." in n}


def test_it_learns(tiny, make_trainer):
    """From images that are all alike, in some steps: the error falls below that of the mean."""
    trainer = make_trainer(NAME, tiny(), settings={"mae_block_size": [2, 2, 2]})
    grid = torch.linspace(0, 6.3, 16).sin()
    images = (grid[:, None, None] + grid[:, None] + grid).expand(2, 1, 16, 16, 16).contiguous()
    batch = {"data": images, "target": torch.zeros_like(images)}
    torch.manual_seed(0)
    errors = [trainer.train_step(batch)["loss"].item() for _ in range(60)]
    assert np.mean(errors[-5:]) < 0.5 * images.var().item()
    assert np.mean(errors[-5:]) < 0.5 * errors[0]


def test_a_network_of_two_stages_learns(tiny, make_trainer):
    trainer = make_trainer(NAME, with_stages(tiny(), 2))
    assert trainer.train_step(a_batch_of(trainer))["loss"].isfinite()


def test_lowest_error_is_best(tiny, make_trainer):
    trainer = make_trainer(NAME + "_3epochs", tiny())
    trainer.on_train_start()
    saved = []
    trainer.save_checkpoint = lambda file: saved.append(Path(file).name)
    for error in (2.0, 1.0, 3.0):
        trainer.on_epoch_start()
        trainer.logger.log("train_losses", error, trainer.current_epoch)
        trainer.logger.log("lrs", 0.01, trainer.current_epoch)
        trainer.on_validation_epoch_end([{"loss": torch.tensor(error)}] * 2)
        trainer.on_epoch_end()
    assert saved == ["checkpoint_best.pth"] * 2
    assert trainer._best_ema == pytest.approx(-1.9)


# ------------------------------------------------------------------ images


def test_images_of_training_cases_and_imagesun_are_seen_and_no_others(tiny, make_trainer):
    dataset = tiny()
    trainer = make_trainer(NAME, dataset)
    trainer.on_train_start()
    training, validation = trainer.do_split()
    assert validation
    loaders = trainer.dataloader_train.data_loader, trainer.dataloader_val.data_loader
    assert loaders[0].labeled._data.identifiers == sorted([*training, *dataset.cases("imagesUn")])
    assert loaders[1].labeled._data.identifiers == sorted(validation)
    seen = [case for _ in range(40) for case in next(trainer.dataloader_train)["keys"]]
    assert set(seen) == {*training, *dataset.cases("imagesUn")}
    assert {case for _ in range(10) for case in next(trainer.dataloader_val)["keys"]} == set(validation)


def test_intensities_stay(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny())
    trainer.on_train_start()
    kept = trainer.dataloader_train.data_loader.transforms.transforms
    assert [type(t).__name__ for t in kept] == ["SpatialTransform", "MirrorTransform", "RemoveLabelTransform"]
    assert not any(isinstance(t, ImageOnlyTransform) for t in kept)


@pytest.mark.parametrize("kind", ["3d", "ignore"])
def test_labels_change_nothing(tiny_copy, make_trainer, kind):
    """Neither what is learned nor which patches are drawn: labels and class locations are overwritten with others."""
    dataset, found = tiny_copy(kind), []
    for scramble in (False, True):
        if scramble:
            folder = next(dataset.preprocessed.glob("*_3d_fullres"))
            for file in folder.glob("*_seg.b2nd"):
                labels = blosc2.open(str(file))[:]
                others = np.where(labels < 0, labels, np.random.default_rng(0).integers(0, 3, labels.shape))
                file.unlink()
                blosc2.asarray(others.astype(labels.dtype), urlpath=str(file))
            for file in folder.glob("*.pkl"):
                properties = pickle.loads(file.read_bytes())
                del properties["class_locations"]
                file.write_bytes(pickle.dumps(properties))
        trainer = make_trainer(NAME, dataset)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        for _ in range(2):
            trainer.train_step(next(trainer.dataloader_train))
        with torch.no_grad():
            error = trainer.validation_step(next(trainer.dataloader_val))["loss"]
        found.append((error.item(), {n: p.detach().clone() for n, p in parameters(trainer).items()}))
        trainer._fold_lock.release()
    assert found[0][0] == found[1][0]
    assert_equal(found[0][1], found[1][1])


# ------------------------------------------------------------------ its checkpoint


def test_resumed_it_ends_with_the_weights_of_an_uninterrupted_run(tiny, make_trainer):
    assert_resumed_equals_uninterrupted(lambda: make_trainer(NAME + "_2epochs", tiny(), settings={"save_every": 1}))


@pytest.fixture
def pretrained(tiny, make_trainer):
    """The checkpoint of two epochs."""
    trainer = make_trainer(NAME + "_2epochs", tiny())
    train(trainer)
    return Path(trainer.output_folder) / "checkpoint_final.pth"


@pytest.mark.parametrize("name", ["nnUNetTrainer", "nnUNetTrainerCPS", "nnUNetTrainerSHTA_MagicNet", NAME])
def test_any_trainer_starts_from_its_weights(tiny, make_trainer, pretrained, name):
    weights = torch.load(pretrained, weights_only=False)["network_weights"]
    trainer = make_trainer(name, tiny())
    before = {n: t.clone() for n, t in trainer.network.state_dict().items()}
    assert not torch.equal(before["encoder.stages.0.0.convs.0.conv.weight"],
                           weights["encoder.stages.0.0.convs.0.conv.weight"])  # fmt: skip
    load_pretrained_weights(trainer.network, str(pretrained))
    for n, t in trainer.network.state_dict().items():
        assert torch.equal(t, before[n] if ".seg_layers." in n else weights[n]), n
    result = trainer.train_step(a_batch(trainer) if name != NAME else a_batch_of(trainer))
    assert math.isfinite(result["loss"])


def test_nobody_predicts_with_it_unawares(tiny, make_trainer, pretrained):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    assert torch.load(pretrained, weights_only=False)["trainer_name"] == NAME
    predictor = nnUNetPredictor(device=torch.device("cpu"))
    with pytest.raises(UserError, match="has not learned to segment"):
        predictor.initialize_from_trained_model_folder(str(pretrained.parent.parent), (0,), "checkpoint_final.pth")


def test_export_refuses_it(tiny, pretrained, tmp_path):
    from nnunet_ssl.export import export_model

    with pytest.raises(UserError, match="has not learned to segment"):
        export_model(tiny().id, tiny().configuration, [0], str(tmp_path / "out"), NAME + "_2epochs")
    assert not (tmp_path / "out").exists()


def test_the_end_says_what_comes_next(tiny, make_trainer, capsys):
    trainer = make_trainer(NAME, tiny())
    assert isinstance(trainer, nnUNetTrainer)
    trainer.perform_actual_validation()
    said = capsys.readouterr().out
    assert f"Next: nnUNetv2_train {tiny().name} 3d_fullres 0 -p nnUNetPlans -tr TRAINER -pretrained_weights " in said
    assert not (Path(trainer.output_folder) / "validation").exists()


@pytest.mark.slow
def test_with_real_commands(tiny_copy, run_nnunet):
    """Pretraining, then nnU-Net's own trainer and CPS from its weights; prediction with the first alone is refused."""
    dataset = tiny_copy()
    where = dataset.id, dataset.configuration, 0
    run_nnunet("nnUNetv2_train", *where, "-tr", NAME + "_1epochs", "-device", "cpu", settings={})
    results = dataset.folders.results / dataset.name
    checkpoint = results / f"{NAME}_1epochs__nnUNetPlans__3d_fullres" / "fold_0" / "checkpoint_final.pth"
    run_nnunet("nnUNetv2_train", *where, "-tr", NAME + "_1epochs", "-device", "cpu", "--val", settings={})
    refused = run_nnunet(
        "nnUNetv2_predict", "-d", dataset.id, "-c", dataset.configuration, "-f", 0, "-tr", NAME + "_1epochs",
        "-i", dataset.raw / "imagesTs", "-o", dataset.folders.results / "predicted", "-device", "cpu", check=False,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "has not learned to segment" in refused.stderr

    pretrained = torch.load(checkpoint, weights_only=False)["network_weights"]
    for name in ("nnUNetTrainer_1epoch", "nnUNetTrainerCPS_1epochs"):
        out = run_nnunet(
            "nnUNetv2_train", *where, "-tr", name, "-device", "cpu", "-pretrained_weights", checkpoint,
            settings={"num_iterations_per_epoch": 1},
        ).stdout  # fmt: skip
        assert "Loading pretrained weights from file" in out
        folder = results / f"{name}__nnUNetPlans__3d_fullres" / "fold_0"
        assert (folder / "validation" / "summary.json").exists()
    trained = torch.load(folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
    for n, t in pretrained.items():  # after one step
        if n.startswith("encoder.") and n.endswith("conv.weight"):
            assert (trained[n] - t).norm() < 0.1 * t.norm(), n
