"""AUSS: when the autoencoder learns and when it judges, and what the teacher's weights are."""

from __future__ import annotations

import pytest
import torch
from helpers.runs import assert_plain_checkpoint, assert_resumed_equals_uninterrupted, commands_work
from helpers.steps import a_batch, at_step, gradients_by_passes, stepped

from nnunet_ssl.trainers import auss
from nnunet_ssl.trainers.base import full_resolution
from nnunet_ssl.views.mixing import labeled_patches

NAME = "nnUNetTrainerAUSS"


def judging(trainer):
    """A trainer whose autoencoder is frozen, and whose teacher has fallen behind its student."""
    return at_step(trainer, trainer.total_steps // 2)


@pytest.mark.parametrize("kind", ["3d", "2d", "multichannel", "anisotropic", "ignore", "regions", "resenc"])
def test_every_kind_of_data_trains_and_its_terms_are_logged(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind))
    stepped(trainer, 1)
    judging(trainer).train_step(next(trainer.dataloader_train))
    values = trainer._mean_values()
    assert set(values) == {
        "loss_sup", "loss_autoencoder", "loss_consistency", "weight_consistency", "teacher_believed"
    }  # fmt: skip
    assert 0 < values["loss_autoencoder"] < 1
    assert 0 < values["loss_consistency"] < 1
    assert 0.36 < values["teacher_believed"] < 1


def test_first_the_autoencoder_learns_then_it_judges(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings={"auss_share": 0.3})
    autoencoder, total = trainer.training_modules["autoencoder"], trainer.total_steps
    for step, learns in ((0, True), (int(0.3 * total) - 1, True), (int(0.3 * total) + 1, False)):
        trainer.training_modules.train()  # as the base does each epoch
        trainer.global_step = step
        before = {n: t.clone() for n, t in autoencoder.state_dict().items()}
        trainer.train_step(a_batch(trainer))
        assert autoencoder.training is learns
        changed = [n for n, t in autoencoder.state_dict().items() if not torch.equal(t, before[n])]
        assert bool(changed) is learns, changed
    for step, share in ((0.1, 0), (0.3, 0.00674), (0.65, 0.2865), (1.0, 1.0)):
        trainer.global_step = step * total
        expected = share * trainer.settings.teacher_weight
        assert trainer.term_weights()["consistency"] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("kind", ["3d", "2d", "regions"])
def test_the_consistency_is_the_equation_over_all_patches(tiny, make_trainer, kind):
    """In the authors' code it is half of this mean, since the 2 classes of UA-MT are written out."""
    trainer = judging(make_trainer(NAME, tiny(kind), settings={"teacher_noise": 0.0, "auss_gamma": 3.0}))
    batch, regions = a_batch(trainer), kind == "regions"
    teacher, autoencoder = trainer.training_modules["teacher"], trainer.training_modules["autoencoder"].eval()
    expected = 0.0
    with torch.no_grad():
        for images in (batch["data"], batch["unlabeled"]):
            s, t = (x.double() for x in (trainer.plans_network(images)[0], teacher(images)))
            s, t = (x.sigmoid() if regions else x.softmax(1) for x in (s, t))
            one_hot = t > 0.5 if regions else torch.stack([t.argmax(1) == c for c in range(t.shape[1])], 1)
            m = torch.exp(-3 * (autoencoder(one_hot.float()).double().sigmoid() - t) ** 2)
            expected += 0.5 * ((m * (s - t) ** 2).sum() / m.sum()).item()
    found = sum(terms["consistency"] for terms in trainer.losses(trainer._to_device(batch)))
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_without_gamma_it_is_mean_teachers_mean(tiny, make_trainer):
    trainer = judging(make_trainer(NAME, tiny(), settings={"teacher_noise": 0.0, "auss_gamma": 0.0}))
    batch = a_batch(trainer)
    with torch.no_grad():
        s, t = (f(batch["unlabeled"]) for f in (trainer.plans_network, trainer.training_modules["teacher"]))
        expected = (s[0].softmax(1) - t.softmax(1)).square().mean()
    terms = list(trainer.losses(trainer._to_device(batch)))[-1]
    assert terms["consistency"].item() == pytest.approx(0.5 * expected.item(), rel=1e-4)


def test_ignored_voxels_teach_the_autoencoder_nothing(tiny, make_trainer):
    """They are background to it, and its output there is free."""
    trainer = make_trainer(NAME, tiny("ignore"))
    target = a_batch(trainer)["target"][0]
    target[..., :5] = trainer.label_manager.ignore_label
    _, labels, valid = labeled_patches(target, target, ignore_label=trainer.label_manager.ignore_label)
    masks = trainer._masks(labels)
    assert masks[:, 0, ..., :5].all()
    seen = []

    def keep(_module, _inputs, logits):
        logits.retain_grad()
        seen.append(logits)

    trainer.training_modules["autoencoder"].register_forward_hook(keep)
    trainer._of_autoencoder(masks, valid).backward()
    assert not seen[0].grad[..., :5].any()
    assert seen[0].grad[..., 5:].any()


@pytest.mark.parametrize("judges", [False, True])
def test_who_learns_and_that_the_order_of_passes_is_no_matter(tiny, make_trainer, judges):
    def make(passes):
        trainer = make_trainer(NAME, tiny(), settings={"passes": passes, "seed": 0, "teacher_rampup": 0})
        return judging(trainer) if judges else trainer

    found = gradients_by_passes(make)
    for name, gradient in found["lean"].items():
        if name.startswith("training.teacher") or (judges and name.startswith("training.autoencoder")):
            assert gradient is None, name
        else:
            torch.testing.assert_close(gradient, found["joint"][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_resumed_it_ends_with_the_weights_of_an_uninterrupted_run_and_a_plain_checkpoint(tiny, make_trainer, share):
    """Stopped at the middle, while the autoencoder judges or learns."""
    settings = {"save_every": 1, "auss_share": share, "teacher_rampup": 0, "seed": 3}
    folder = assert_resumed_equals_uninterrupted(lambda: make_trainer(f"{NAME}_2epochs", tiny(), settings=settings))
    assert_plain_checkpoint(folder, make_trainer("nnUNetTrainer", tiny()))


def test_the_autoencoder_learns_the_masks_without_their_errors(tiny, make_trainer, monkeypatch):
    """By hand: half the sum of squares over all classes and of the Dice of the foreground over the batch."""
    trainer = make_trainer(NAME, tiny("2d"))
    monkeypatch.setattr(auss, "with_errors", lambda masks, *_: ~masks)
    masks = trainer._masks(full_resolution(trainer._to_device(a_batch(trainer)).labeled.target))
    logits = torch.randn(masks.shape)
    trainer.training_modules["autoencoder"].forward = lambda _: logits
    found = trainer._of_autoencoder(masks, torch.ones_like(masks[:, :1], dtype=torch.bool))
    p, t = logits.sigmoid(), masks.float()
    shared, sizes = (p * t).sum((0, 2, 3)), (p.square() + t.square()).sum((0, 2, 3))
    dice = (1 - 2 * shared / sizes)[1:].mean()
    assert found.item() == pytest.approx((0.5 * ((p - t).square().mean() + dice)).item(), rel=1e-3)


def test_the_teacher_sees_noise(tiny, make_trainer):
    trainer = judging(make_trainer(NAME, tiny("2d"), settings={"teacher_noise": 0.3}))
    stream = trainer._to_device(a_batch(trainer)).unlabeled
    seen, of_teacher = [], trainer.of_teacher
    trainer.of_teacher = lambda x: seen.append(x) or of_teacher(x)
    trainer._consistency(trainer.forward("first", stream), stream.images)
    assert (seen[0] - stream.images).std() > 0.1


@pytest.mark.slow
def test_nnunets_commands_train_continue_validate_and_predict(tiny_copy, run_nnunet, tmp_path):
    terms = {"loss_sup", "loss_consistency", "loss_autoencoder"}
    commands_work(tiny_copy("3d"), run_nnunet, tmp_path, f"{NAME}_2epochs", terms)
