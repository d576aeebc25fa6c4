"""MagicNet: what each term sees and moves, blended labels of the right image, the teacher, resuming, real commands."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import assert_equal, assert_resumed_equals_uninterrupted, commands_work, weights
from helpers.steps import a_batch, gradients, on_two_ranks, parameters, spied

from nnunet_ssl.errors import UserError
from nnunet_ssl.losses.cubes import blended_pseudo_labels, class_weights, partition, recover
from nnunet_ssl.losses.pseudo_labels import hard_pseudo_labels
from nnunet_ssl.trainers.base import full_resolution
from nnunet_ssl.trainers.magicnet import nnUNetTrainerMagicNet

NAME = "nnUNetTrainerMagicNet"
TERMS = ["sup", "within", "location", "cross", "consistency"]
NOW = {"magicnet_rampup": 0.0, "magicnet_blend_start": 0}


@pytest.fixture
def magicnet(tiny, make_trainer):
    """A trainer on a tiny dataset, at full weights and with blending from the first step."""

    def make(kind="3d", name=NAME, **settings):
        torch.manual_seed(0)  # of the noise and the exchange in a step
        return make_trainer(name, tiny(kind), settings={**NOW, **settings})

    return make


@pytest.mark.parametrize("kind", ["3d", "2d", "anisotropic", "ignore", "multichannel", "png", "resenc"])
def test_two_steps_on_every_kind_of_data(magicnet, kind):
    trainer = magicnet(kind)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    rows = []
    before = {n: p.detach().clone() for n, p in parameters(trainer).items()}
    for _ in range(2):  # nnU-Net's residual blocks begin as identities: most of their weights move at the second
        assert trainer.train_step(next(trainer.dataloader_train))["loss"].isfinite()
        rows.append(trainer._mean_values())
    still = [n for n, p in parameters(trainer).items() if torch.equal(p, before[n])]
    assert all("seg_layers.0." in n for n in still), still  # no weight at the lowest resolution
    assert all(math.isfinite(value) for row in rows for value in row.values())
    for term in TERMS:
        assert rows[0][f"loss_{term}"] != rows[1][f"loss_{term}"]
        assert f"weight_{term}" in rows[0]
    assert 0 <= rows[0]["location_accuracy"] <= 1
    assert 0 <= rows[1]["blend_changed"] <= 1


def test_region_labels_are_refused(tiny, make_trainer):
    with pytest.raises(UserError, match="region-based labels"):
        make_trainer(NAME, tiny("regions"))


def gradients_of_terms(trainer, batch):
    """For each term the names of the parameters that it moves."""
    moved = {}
    for terms in trainer.losses(trainer._to_device(batch)):
        for term, value in terms.items():
            everything = parameters(trainer)
            learned = {n: p for n, p in everything.items() if p.requires_grad}
            grads = torch.autograd.grad(value, learned.values(), retain_graph=True, allow_unused=True)
            names = {n for n, g in zip(learned, grads, strict=True) if g is not None and g.abs().max() > 0}
            moved.setdefault(term, []).append(names)
    return moved


def test_which_term_moves_what(magicnet):
    trainer = magicnet()
    moved = gradients_of_terms(trainer, a_batch(trainer))
    assert list(moved) == TERMS
    names = set(dict(trainer.plans_network.named_parameters()))
    head = "decoder.seg_layers.1.weight"
    assert head in names
    encoder = {n for n in names if n.startswith("encoder.") and n.endswith("conv.weight")}
    decoder = {n for n in names if n.startswith("decoder.stages.") and n.endswith("conv.weight")}
    location = {f"training.location.{n}" for n, _ in trainer.training_modules["location"].named_parameters()}
    assert encoder
    assert decoder
    for term in ("sup", "within", "cross", "consistency"):
        (of_term,) = moved[term]
        assert encoder | decoder | {head} <= of_term, term
        assert of_term <= names, term
    for of_term in moved["location"]:  # of labeled and of unlabeled images
        assert encoder | location <= of_term
        assert not any(n.startswith("decoder.stages") or "seg_layers" in n for n in of_term)


def test_the_teacher_moves_by_its_average_alone(magicnet):
    trainer = magicnet(magicnet_ema_decay=0.4)
    teacher, student = trainer.training_modules["teacher"].network, trainer.plans_network
    expected = None
    for step in range(3):
        trainer.train_step(a_batch(trainer, step))
        decay = min(1 - 1 / (step + 1), 0.4)
        now = {n: p.detach().clone() for n, p in student.named_parameters()}
        expected = now if expected is None else {n: decay * expected[n] + (1 - decay) * now[n] for n in now}
        for n, p in teacher.named_parameters():
            torch.testing.assert_close(p, expected[n], rtol=1e-5, atol=1e-6)
            assert p.grad is None
            assert not p.requires_grad
    assert trainer.training_modules["location"].head[0].weight.grad is not None


def test_the_teacher_begins_with_pretrained_weights(magicnet):
    trainer = magicnet()
    with torch.no_grad():
        for p in trainer.plans_network.parameters():  # as -pretrained_weights, after initialize
            p.normal_()
    pretrained = {n: p.detach().clone() for n, p in trainer.plans_network.named_parameters()}
    steps = trainer.losses(trainer._to_device(a_batch(trainer)))
    next(steps)
    for n, p in trainer.training_modules["teacher"].network.named_parameters():
        assert torch.equal(p, pretrained[n])


def hand_recovered(network, images, counts):
    """The network on each cube of each image, one at a time, set back by slices."""
    whole = []
    for image in images:
        size = [n // c for n, c in zip(image.shape[1:], counts, strict=True)]
        out = None
        for index in torch.cartesian_prod(*map(torch.arange, counts)).reshape(-1, len(counts)).tolist():
            where = (slice(None), *(slice(i * s, (i + 1) * s) for i, s in zip(index, size, strict=True)))
            logits = network(image[where][None])[0][0]
            out = torch.zeros(len(logits), *image.shape[1:]) if out is None else out
            out[where] = logits
        whole.append(out)
    return torch.stack(whole)


@pytest.mark.parametrize("kind", ["3d", "2d", "anisotropic"])
def test_cube_by_cube_is_each_cube_of_each_image_in_its_place(magicnet, kind):
    trainer = magicnet(kind)
    images = a_batch(trainer)["data"]
    assert max(trainer.within_counts) > 1
    with torch.no_grad():
        logits, _ = trainer._cube_by_cube(images)
        expected = hand_recovered(trainer.plans_network, images, trainer.within_counts)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["3d", "2d"])
def test_recovered_logits_are_the_head_on_recovered_embeddings(magicnet, kind):
    """The paper recovers embeddings and classifies them; the last layer acts on single voxels."""
    trainer = magicnet(kind)
    network, counts = trainer.plans_network, trainer.within_counts
    images = a_batch(trainer)["unlabeled"]
    kept = []
    hook = network.decoder.seg_layers[-1].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        logits, _ = trainer._cube_by_cube(images)
        hook.remove()
        embeddings = recover(kept[0].unflatten(0, (len(images), -1)), counts)
        torch.testing.assert_close(logits, network.decoder.seg_layers[-1](embeddings), rtol=1e-4, atol=1e-5)


def test_exchanged_patches_are_seen_and_every_voxel_returns_to_its_image(magicnet, monkeypatch):
    trainer = magicnet()
    batch = a_batch(trainer)
    images = torch.cat([batch["data"], batch["unlabeled"]])
    seen = []
    # instead of the network one that says who a voxel is: its value, in every class
    monkeypatch.setattr(trainer, "forward", lambda name, stream: seen.append(stream.images) or [3 * stream.images])
    of_labeled, of_unlabeled = trainer._exchanged(batch["data"], batch["unlabeled"])
    assert torch.equal(of_labeled, 3 * batch["data"])
    assert torch.equal(of_unlabeled, 3 * batch["unlabeled"])
    mixed = torch.cat(seen)
    assert not torch.equal(mixed, images)
    per_position, originals = partition(mixed, trainer.cross_counts), partition(images, trainer.cross_counts)
    for n in range(per_position.shape[1]):  # the same cubes at each position, in another order
        assert {tuple(c.flatten().tolist()) for c in per_position[:, n]} == {
            tuple(c.flatten().tolist()) for c in originals[:, n]
        }


def test_pseudo_labels_blend_the_cubes_of_the_same_unlabeled_images(magicnet):
    """A released fork blended the cubes of labeled images in."""
    trainer = magicnet(magicnet_noise=0.0)
    batch = a_batch(trainer)
    counts = torch.tensor([70.0, 40.0, 10.0])
    teacher = trainer.training_modules["teacher"]
    teacher.class_counts.copy_(counts)
    with torch.no_grad():
        for p in teacher.network.parameters():  # a teacher that differs from the student
            p.mul_(1.1)
        _, labels = labels_of_step(trainer, batch)
        for b in range(len(batch["unlabeled"])):
            image = batch["unlabeled"][b : b + 1]
            cubes = hand_recovered(trainer.plans_network, image, trainer.within_counts)
            t = teacher(image)
            omega = (counts / counts.max())[t.argmax(1)][:, None]
            expected = ((1 - omega) * t + omega * cubes).argmax(1, keepdim=True)
            assert (labels[b : b + 1] == expected).float().mean() > 0.999  # ties in float32
            assert (labels[b : b + 1] != t.argmax(1, keepdim=True)).float().mean() > 0.01
        foreign = hand_recovered(trainer.plans_network, batch["data"], trainer.within_counts)
        t = teacher(batch["unlabeled"])
        wrong = blended_pseudo_labels(t, hard_pseudo_labels(t), foreign, class_weights(counts, 1.0))
        assert (labels != wrong).float().mean() > 0.01


def labels_of_step(trainer, batch):
    """The terms of a step's last pass, and the pseudo-labels that it learned from."""
    trainer.global_step = 1  # or the teacher would begin anew
    labels, real = [], trainer._pseudo_labels
    trainer._pseudo_labels = lambda *args: labels.append(real(*args)) or labels[-1]
    terms = list(trainer.losses(trainer._to_device(batch)))
    return terms[-1], labels[0]


def test_before_the_start_of_blending_labels_are_the_teachers(magicnet):
    for start, blended in ((2, False), (1, True)):
        trainer = magicnet(magicnet_blend_start=start, magicnet_noise=0.0)
        teacher, batch = trainer.training_modules["teacher"], a_batch(trainer)
        teacher.class_counts.copy_(torch.tensor([70.0, 40.0, 10.0]))  # without counts, blending changes nothing
        _, labels = labels_of_step(trainer, batch)  # of step 1
        expected = teacher(batch["unlabeled"]).argmax(1, keepdim=True)
        assert torch.equal(labels.long(), expected) != blended
        assert ("blend_changed" in trainer._mean_values()) == blended


def test_class_counts_are_a_running_mean_of_the_pseudo_labels(magicnet):
    trainer = magicnet(magicnet_histogram_decay=0.75)
    expected = torch.zeros(3)
    for seed in range(3):
        _, labels = labels_of_step(trainer, a_batch(trainer, seed))
        expected = 0.75 * expected + 0.25 * torch.bincount(labels.flatten().long(), minlength=3)
        del trainer._pseudo_labels
    torch.testing.assert_close(trainer.training_modules["teacher"].class_counts, expected)
    assert "teacher.class_counts" in trainer.training_modules.state_dict()


def test_the_teacher_sees_noise_that_is_cut_at_twice_its_deviation(magicnet):
    trainer = magicnet(magicnet_noise=0.5)
    seen = []
    trainer.training_modules["teacher"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = a_batch(trainer)["unlabeled"]
    trainer._pseudo_labels(images, None)
    noise = seen[0] - images
    assert noise.abs().max().item() == pytest.approx(1.0, rel=1e-5)
    assert noise.std().item() == pytest.approx(0.48, abs=0.02)


def test_the_head_learns_positions_in_the_order_of_partition(magicnet):
    """Cubes that carry their position as a pattern: after some steps of the location term alone they are told apart."""
    trainer = magicnet("2d", magicnet_location_weight=1.0)
    counts = trainer.within_counts
    head = trainer.training_modules["location"]
    shape = (2, trainer.num_input_channels, *trainer.configuration_manager.patch_size)
    axes = torch.meshgrid(*(torch.arange(float(n)) for n in shape[2:]), indexing="ij")
    images = sum(((a >= len(a) // 2).float() + 1) * torch.cos(a * (i + 1)) for i, a in enumerate(axes)).expand(shape)
    optimizer = torch.optim.Adam([*trainer.plans_network.encoder.parameters(), *head.parameters()], 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        _, loss = trainer._cube_by_cube(images)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * math.log(math.prod(counts))
    with torch.no_grad():
        skips = trainer.plans_network.encoder(partition(images, counts)[0])
        assert head(skips[-1]).argmax(1).tolist() == list(range(math.prod(counts)))


def test_ignored_voxels_give_no_gradient_in_cross_and_within(magicnet):
    trainer = magicnet("ignore")
    ignore = trainer.label_manager.ignore_label
    target = torch.zeros(1, 1, 4, 4, 4, dtype=torch.int16)
    target[..., 2:] = 1
    target[..., :2, :] = ignore
    for dice in ("nnunet", "squared"):
        object.__setattr__(trainer.settings, "magicnet_dice", dice)
        logits = torch.randn(1, 3, 4, 4, 4, requires_grad=True)
        trainer._dice(logits, target).backward()
        assert not logits.grad[..., :2, :].any()
        assert logits.grad[..., 2:, :].any()


@pytest.mark.parametrize("preset", ["nnunet", "paper"])
def test_lean_and_joint_passes_give_the_same_gradients(magicnet, preset):
    found = []
    for passes in ("lean", "joint"):
        trainer = magicnet(passes=passes, preset=preset)
        torch.manual_seed(1)
        found.append(gradients(trainer, a_batch(trainer)))
    lean, joint = found
    assert lean.keys() == joint.keys()
    for name in lean:
        torch.testing.assert_close(lean[name], joint[name], rtol=1e-4, atol=1e-6, msg=name)
    assert all(g is None for n, g in lean.items() if "teacher" in n)


def test_the_weights_of_the_paper(magicnet):
    trainer = magicnet(preset="paper", magicnet_rampup=1.0)
    assert trainer.term_weights()["consistency"] == pytest.approx(0.1 * math.exp(-5))
    trainer.global_step = trainer.total_steps
    assert trainer.term_weights() == {
        "sup": 0.25, "cross": 0.25, "within": 0.25, "location": 0.1, "consistency": 0.1
    }  # fmt: skip
    ours = magicnet().term_weights()
    assert all(ours[n] == pytest.approx(4 * w) for n, w in trainer.term_weights().items())


def test_without_mirroring_neither_training_nor_prediction_mirrors(magicnet):
    for setting, axes in ((True, (0, 1, 2)), (False, None)):
        trainer = magicnet(magicnet_mirroring=setting)
        assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] == axes
        assert trainer.inference_allowed_mirroring_axes == axes


def log_of(trainer):
    return Path(trainer.log_file).read_text()


def test_cubes_are_chosen_and_said(magicnet):
    trainer = magicnet()
    assert trainer.cross_counts == trainer.within_counts == [2, 2, 2]
    assert "across images 2 x 2 x 2 cubes of 8 x 8 x 8 voxels; within an image 2 x 2 x 2 cubes" in log_of(trainer)
    assert "reflected" not in log_of(trainer)


def with_patch(tiny_dataset, patch):
    """The dataset with another patch size in its plans."""
    plans = tiny_dataset.plans
    plans["configurations"][tiny_dataset.configuration]["patch_size"] = patch

    class Changed:
        def __getattr__(self, name):
            return plans if name == "plans" else getattr(tiny_dataset, name)

    return Changed()


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        ([20, 28, 20], "cubes of 10 x 14 x 10 voxels, reflected to 12 x 16 x 12"),
        ([16, 28, 20], "cubes of 8 x 14 x 10 voxels, reflected to 8 x 16 x 12"),  # along the first axis cubes fit
    ],
)
def test_where_no_cube_fits_the_stride_cubes_are_reflected(tiny, make_trainer, patch, said):
    trainer = make_trainer(NAME, with_patch(tiny(), patch), settings=NOW)
    assert trainer.total_stride == [4, 4, 4]
    assert trainer.within_counts == [2, 2, 2]
    assert said in log_of(trainer)
    images = a_batch(trainer)["data"]

    def on_reflected(cube):
        """Voxels more at both ends of an axis, as 10 -> 12 and 14 -> 16 ask; its logits are cut off again."""
        more = [-n % 4 // 2 for n in cube.shape[2:]]
        padded = torch.from_numpy(np.pad(cube.numpy(), [(0, 0)] * 2 + [(m, m) for m in more], mode="reflect"))
        inner = tuple(slice(m, m + n) for m, n in zip(more, cube.shape[2:], strict=True))
        return [trainer.plans_network(padded)[0][(slice(None), slice(None), *inner)]]

    with torch.no_grad():
        logits, _ = trainer._cube_by_cube(images)
        expected = hand_recovered(on_reflected, images, trainer.within_counts)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert trainer.train_step(a_batch(trainer))["loss"].isfinite()


def test_without_cubes_it_is_a_mean_teacher_on_exchanged_images(magicnet):
    trainer = magicnet(magicnet_cubes=[1, 1, 1])
    assert list(trainer.training_modules) == ["teacher"]
    assert trainer.train_step(a_batch(trainer))["loss"].isfinite()
    assert "loss_location" not in trainer._mean_values()
    assert "none, so no location" in log_of(trainer)


@pytest.mark.parametrize("cubes", [[2, 2], [3, 2, 2], [4, 4, 4], [8, 1, 1]])
def test_cubes_that_cannot_be_are_refused(magicnet, cubes):
    with pytest.raises(UserError, match=r"magicnet_cubes \[.*does not suit the patch \[16, 16, 16\].*4 x 4 x 4"):
        magicnet(magicnet_cubes=cubes)


@pytest.mark.parametrize(
    "setting",
    [
        {"magicnet_ema_decay": 1.0},
        {"magicnet_cubes": [0, 1, 1]},
        {"magicnet_blend_temperature": 0},
        {"magicnet_noise": -1},
        {"magicnet_location_dim": 0},
    ],
)
def test_settings_that_cannot_work_are_refused(magicnet, setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        magicnet(**setting)


def test_compiled_it_gives_the_same_gradients(magicnet, monkeypatch):
    found = []
    for compile_it in (False, True):
        if compile_it:
            monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
            monkeypatch.setattr(nnUNetTrainerMagicNet, "_do_i_compile", lambda self: True)
        trainer = magicnet("2d")
        torch.manual_seed(1)
        found.append(gradients(trainer, a_batch(trainer)))
    plain, compiled = found
    assert plain.keys() == compiled.keys()
    for name, gradient in plain.items():
        if gradient is None:
            assert compiled[name] is None or not compiled[name].any()
        else:
            torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def _step_of_rank(rank, trainer, batch):
    trainer.is_ddp = True
    half = slice(rank, rank + 1)
    share = {k: [t[half] for t in v] if isinstance(v, list) else v[half] for k, v in batch.items()}
    torch.manual_seed(rank)  # exchanges and noise of its own
    labels, real = [], trainer._pseudo_labels
    trainer._pseudo_labels = lambda *args: labels.append(real(*args)) or labels[-1]
    trainer.train_step(share)
    return {**trainer.plans_network.state_dict(), **trainer.training_modules.state_dict()}, labels[0]


def test_two_ranks_keep_the_same_weights_teacher_and_class_counts(magicnet, tmp_path):
    trainer = magicnet()
    before = {n: p.detach().clone() for n, p in trainer.plans_network.named_parameters()}
    (state, labels), (other, other_labels) = on_two_ranks(tmp_path, _step_of_rank, trainer, a_batch(trainer))
    assert_equal(state, other)
    assert any(not torch.equal(state[n], p) for n, p in before.items())
    both = torch.bincount(torch.cat([labels, other_labels]).flatten().long(), minlength=3)
    torch.testing.assert_close(state["teacher.class_counts"], 0.05 * both.float())


def test_shta_hangs_on_the_direct_forward_of_labeled_images(tiny, make_trainer):
    with_shta = "nnUNetTrainerSHTA_MagicNet"
    host = make_trainer(NAME, tiny(), settings=NOW)
    off = make_trainer(with_shta, tiny(), settings={**NOW, "shta_weight": 0.0})
    on = make_trainer(with_shta, tiny(), settings=NOW)
    seen = []
    on.training_modules["shta_first"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    for trainer in (host, off, on):
        torch.manual_seed(3)
        for seed in range(2):
            trainer.train_step(a_batch(trainer, seed))
    assert len(seen) == 2  # once a step, on labeled images
    assert torch.equal(seen[0], a_batch(on)["target"][0])
    assert parameters(off).keys() == parameters(host).keys()
    assert all(torch.equal(p, parameters(off)[n]) for n, p in parameters(host).items())
    assert not all(torch.equal(p, parameters(on)[n]) for n, p in parameters(host).items())


def test_resumed_it_ends_with_the_weights_of_an_uninterrupted_run(tiny, make_trainer):
    settings = {"save_every": 1, "magicnet_blend_start": 1}
    folder = assert_resumed_equals_uninterrupted(lambda: make_trainer(f"{NAME}_2epochs", tiny(), settings=settings))
    assert weights(folder)["training.teacher.class_counts"].sum() > 0
    log = (folder / "ssl_log.csv").read_text()
    assert all(f"loss_{term}" in log for term in TERMS)
    assert not any(n.startswith("training.teacher") for n in torch.load(
        folder / "checkpoint_final.pth", weights_only=False)["network_weights"])  # fmt: skip


def test_each_term_is_of_its_own_prediction_and_target(magicnet, monkeypatch):
    trainer = magicnet()
    batch = trainer._to_device(a_batch(trainer))
    seen = {name: spied(monkeypatch, trainer, name) for name in ("_exchanged", "_cube_by_cube", "_pseudo_labels")}
    found = {}
    for terms in trainer.losses(batch):
        for term, value in terms.items():
            found[term] = found.get(term, 0.0) + value.detach()
    target = full_resolution(batch.labeled.target)
    (of_labeled, of_unlabeled), (labels,) = seen["_exchanged"][0], seen["_pseudo_labels"]
    (within, of_first), (_, of_second) = seen["_cube_by_cube"]
    for term, expected in {
        "cross": trainer._dice(of_labeled, target),
        "consistency": trainer._dice(of_unlabeled, labels),
        "within": trainer._dice(within, target),
        "location": (of_first + of_second) / 2,
    }.items():
        torch.testing.assert_close(found[term], expected.detach(), rtol=1e-5, atol=1e-6, msg=term)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # four commands that each start Python anew
@pytest.mark.parametrize("kind", ["3d", "2d"])
def test_the_real_commands(tiny_copy, run_nnunet, tmp_path, kind):
    patient = functools.partial(run_nnunet, timeout=900)
    commands_work(tiny_copy(kind), patient, tmp_path, f"{NAME}_2epochs", {f"loss_{term}" for term in TERMS})
