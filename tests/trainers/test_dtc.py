"""DTC: which maps the head learns, that both tasks approach each other, and what is left out where nothing is known."""

from __future__ import annotations

import pytest
import torch
from helpers.runs import assert_resumed_equals_uninterrupted, commands_work
from helpers.steps import a_batch, gradients_by_passes, parameters
from scipy.ndimage import binary_erosion, distance_transform_edt, generate_binary_structure

NAME = "nnUNetTrainerDTC"
HEAD = "training.regression."


def boxes(trainer):
    """A batch whose labels are boxes of each class, or region, inside the patch."""
    batch = a_batch(trainer)
    target = batch["target"][0]
    target.zero_()
    for k in range(trainer.num_maps):
        channel, label = (k, 1) if trainer.label_manager.has_regions else (0, k + 1)
        target[:, channel, 1 + 5 * k : 7 + 5 * k, 2:9, ...] = label
    return batch


def by_scipy(mask, spacing):
    """The map of one mask, negative inside, 0 on its inner boundary."""
    outside, inside = (distance_transform_edt(side, sampling=spacing) for side in (~mask, mask))
    sdm = outside / outside.max() - inside / inside.max()
    sdm[mask & ~binary_erosion(mask, generate_binary_structure(mask.ndim, 1), border_value=1)] = 0
    return torch.from_numpy(sdm).float()


@pytest.mark.parametrize("kind", ["3d", "2d", "multichannel", "anisotropic", "ignore", "regions", "resenc"])
def test_every_kind_of_data_trains_and_its_terms_are_logged(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind))
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    assert all(trainer.train_step(next(trainer.dataloader_train))["loss"].isfinite() for _ in range(2))
    values = trainer._mean_values()
    assert set(values) == {f"{w}_{n}" for w in ("loss", "weight") for n in ("distance", "dtc")} | {"loss_sup"}
    assert 0 < values["loss_dtc"] < 1


@pytest.mark.parametrize("kind", ["3d", "2d", "anisotropic", "regions"])
def test_the_terms_are_the_equations(tiny, make_trainer, kind):
    """With a head that has learned something, by scipy and from the network's outputs."""
    trainer = make_trainer(NAME, tiny(kind), settings={"dtc_steepness": 20.0})
    batch, regions = boxes(trainer), kind == "regions"
    head = trainer.training_modules["regression"]
    torch.nn.init.normal_(head[0].weight, std=0.3)
    consistency = []
    with torch.no_grad():
        for stream in ("data", "unlabeled"):
            outputs, feature = trainer._runnable["first"](batch[stream])
            p = outputs[0].sigmoid() if regions else outputs[0].softmax(1)[:, 1:]
            z = torch.nn.functional.conv3d if feature.ndim == 5 else torch.nn.functional.conv2d
            z = z(feature, head[0].weight).tanh()
            consistency.append((1 / (1 + torch.exp(20 * z)) - p).square().mean().item())
            if stream == "data":
                labels = batch["target"][0]
                masks = labels.bool() if regions else torch.cat([labels == k + 1 for k in range(z.shape[1])], 1)
                maps = [[by_scipy(m.numpy(), trainer.configuration_manager.spacing) for m in ms] for ms in masks]
                error = (z - torch.stack([torch.stack(row) for row in maps])).square().mean().item()
    labeled, unlabeled = trainer.losses(trainer._to_device(batch))
    assert labeled["distance"].item() == pytest.approx(error, rel=1e-4)
    assert labeled["dtc"].item() + unlabeled["dtc"].item() == pytest.approx(sum(consistency) / 2, rel=1e-4)


@pytest.mark.parametrize("kind", ["ignore", "regions"])
def test_a_map_is_left_out_where_a_boundary_is_not_known(tiny, make_trainer, kind):
    """Ignored voxels anywhere in a patch, or a class that is not in it; else one is learned, whatever the others do."""
    trainer = make_trainer(NAME, tiny(kind))
    labels = boxes(trainer)["target"][0]
    before, present = trainer._maps(labels)
    assert present.all()
    if kind == "ignore":
        labels[1, 0, -1, -1, -1] = trainer.label_manager.ignore_label
        expected = torch.tensor([[True, True], [False, False]])
    else:
        labels[1, 0] = 0
        expected = torch.tensor([[True, True], [False, True]])
    after, present = trainer._maps(labels)
    assert torch.equal(present, expected)
    assert torch.equal(after[expected], before[expected])
    regression = torch.zeros_like(after, requires_grad=True)
    trainer.distance_loss(regression, labels).backward()
    assert torch.equal(regression.grad.flatten(2).any(2), expected)


def test_an_ignored_channel_of_regions_counts_too(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny("regions"))
    labels = boxes(trainer)["target"][0]
    ignored = torch.zeros_like(labels[:, :1])
    ignored[0, ..., -1] = 1
    _, present = trainer._maps(torch.cat([labels, ignored], 1))
    assert present.tolist() == [[False, False], [True, True]]


def test_each_task_learns_from_the_other_and_the_maps_reach_the_network(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny())
    torch.nn.init.normal_(trainer.training_modules["regression"][0].weight, std=1e-3)
    passes = list(trainer.losses(trainer._to_device(boxes(trainer))))

    names = [f"{HEAD}0.weight", "decoder.seg_layers.1.weight", "encoder.stages.0.0.convs.0.conv.weight"]
    asked = [parameters(trainer)[name] for name in names]

    def learns(term):
        found = torch.autograd.grad(term, asked, allow_unused=True, retain_graph=True)
        return tuple(g is not None and bool(g.any()) for g in found)

    assert learns(passes[0]["sup"]) == (False, True, True)
    assert learns(passes[0]["distance"]) == (True, False, True)
    assert learns(passes[0]["dtc"]) == learns(passes[1]["dtc"]) == (True, True, True)


@pytest.mark.parametrize("kind", ["3d", "regions"])
def test_lean_and_joint_passes_give_the_same_gradients(tiny, make_trainer, kind):
    found = gradients_by_passes(
        lambda passes: make_trainer(NAME, tiny(kind), settings={"passes": passes, "dtc_rampup": 0})
    )
    lean, joint = found["lean"], found["joint"]
    assert lean[f"{HEAD}0.weight"].any()
    for parameter, gradient in lean.items():
        torch.testing.assert_close(gradient, joint[parameter], rtol=1e-4, atol=1e-6, msg=parameter)


def test_resumed_it_ends_with_the_weights_of_an_uninterrupted_run(tiny, make_trainer):
    settings = {"save_every": 1, "dtc_rampup": 0, "seed": 3}
    assert_resumed_equals_uninterrupted(lambda: make_trainer(f"{NAME}_2epochs", tiny(), settings=settings))


@pytest.mark.slow
def test_nnunets_commands_train_continue_validate_and_predict(tiny_copy, run_nnunet, tmp_path):
    terms = {"loss_sup", "loss_distance", "loss_dtc"}
    commands_work(tiny_copy("3d"), run_nnunet, tmp_path, f"{NAME}_2epochs", terms)
