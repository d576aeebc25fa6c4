"""Mean Teacher, UA-MT and ICT: what the student is compared with, and what of it has a gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.runs import assert_resumed_equals_uninterrupted, commands_work
from helpers.steps import a_batch, at_step, gradients_by_passes, stepped

from nnunet_ssl.errors import UserError
from nnunet_ssl.losses.entropy import entropy

NAMES = ("nnUNetTrainerMeanTeacher", "nnUNetTrainerUAMT", "nnUNetTrainerICT")


def consistency_of(trainer, batch):
    """The term of unlabeled images, with the generator at a known place."""
    torch.manual_seed(0)
    return list(trainer.losses(trainer._to_device(batch)))[1]["consistency"]


def apart(trainer):
    """A trainer whose teacher has fallen behind its student."""
    return at_step(trainer, 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["3d", "2d", "multichannel", "anisotropic", "ignore", "regions", "resenc"])
def test_every_kind_of_data_trains_and_its_terms_are_logged(tiny, make_trainer, name, kind):
    trainer = make_trainer(name, tiny(kind))
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    assert all(trainer.train_step(next(trainer.dataloader_train))["loss"].isfinite() for _ in range(2))
    values = trainer._mean_values()
    extra = {"teacher_sure"} if name == "nnUNetTrainerUAMT" else set()
    assert set(values) == {"loss_sup", "loss_consistency", "weight_consistency"} | extra
    assert 0 <= values["loss_consistency"] < 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["3d", "regions"])
def test_only_the_student_learns_and_the_order_of_passes_is_no_matter(tiny, make_trainer, name, kind):
    found = gradients_by_passes(
        lambda passes: apart(make_trainer(name, tiny(kind), settings={"passes": passes, "teacher_rampup": 0}))
    )
    for parameter, gradient in found["lean"].items():
        if parameter.startswith("training.teacher"):
            assert gradient is None
        elif "seg_layers.0" not in parameter:  # to which nnU-Net gives no weight
            assert gradient.abs().sum() > 0, parameter
            torch.testing.assert_close(gradient, found["joint"][parameter])


def test_mean_teacher_compares_with_the_teacher_on_noisy_images(tiny, make_trainer):
    trainer = apart(make_trainer(NAMES[0], tiny(), settings={"teacher_noise": 0.3}))
    batch = a_batch(trainer)
    teacher, images = trainer.training_modules["teacher"], batch["unlabeled"]
    torch.manual_seed(0)
    noise = (0.3 * torch.randn_like(images)).clamp(-0.6, 0.6)
    with torch.no_grad():
        student, target = trainer.plans_network(images)[0].softmax(1), teacher(images + noise).softmax(1)
    assert consistency_of(trainer, batch).item() == pytest.approx((student - target).square().mean().item(), rel=1e-5)
    assert consistency_of(trainer, {**batch, "unlabeled": images + 1}) != consistency_of(trainer, batch)


def test_the_teacher_starts_as_the_student_and_follows_it(tiny, make_trainer):
    trainer = make_trainer(NAMES[0], tiny(), settings={"teacher_decay": 0.9})
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    student, teacher = (next(n.parameters()) for n in (trainer.plans_network, trainer.training_modules["teacher"]))
    trainer.train_step(next(trainer.dataloader_train))
    torch.testing.assert_close(teacher, student)
    before = teacher.clone()
    trainer.train_step(next(trainer.dataloader_train))
    torch.testing.assert_close(teacher, 0.5 * before + 0.5 * student)  # of two steps each weighs a half
    assert not torch.equal(teacher, student)


@pytest.mark.parametrize("kind", ["3d", "regions"])
def test_ua_mt_believes_the_teacher_where_its_passes_are_sure(tiny, make_trainer, kind):
    """Without noise and dropout all passes are one."""
    settings = {"teacher_noise": 0, "uamt_dropout": 0, "uamt_passes": 2, "uamt_threshold": 0.9}
    trainer = apart(make_trainer(NAMES[1], tiny(kind), settings=settings))
    batch = a_batch(trainer)
    with torch.no_grad():
        student = trainer.probabilities(trainer.plans_network(batch["unlabeled"]))
        teacher = trainer.probabilities(trainer.training_modules["teacher"](batch["unlabeled"]))
    unsure = entropy(teacher, kind == "regions")
    sure = unsure < 0.9 + 0.1 * trainer.rampup(1.0)
    assert 0 < sure.sum() < sure.numel()
    expected = (student - teacher).square().mean(1)[sure].mean()
    assert consistency_of(trainer, batch).item() == pytest.approx(expected.item(), rel=1e-4)
    assert trainer._mean_values()["teacher_sure"] == pytest.approx(sure.float().mean().item())


def test_ua_mt_learns_nothing_where_the_teacher_is_sure_of_nothing(tiny, make_trainer):
    trainer = apart(make_trainer(NAMES[1], tiny(), settings={"uamt_threshold": 1e-6}))
    trainer.rampup = lambda share: 0.0
    loss = consistency_of(trainer, a_batch(trainer))
    assert loss.item() == 0
    loss.backward()
    assert not any(p.grad.any() for p in trainer.plans_network.parameters() if p.grad is not None)


def test_ua_mts_dropout_is_the_teachers_alone_and_not_in_the_target(tiny, make_trainer):
    """A target with dropout that its student never had changes the class of every third pixel."""
    trainer = make_trainer(NAMES[1], tiny(), settings={"teacher_noise": 0, "uamt_passes": 2})
    images, teacher, passes = a_batch(trainer)["unlabeled"], trainer.training_modules["teacher"], []
    with torch.no_grad():
        assert torch.equal(trainer.plans_network(images)[0], trainer.plans_network(images)[0])
        teacher.eval()
        plain = trainer.probabilities(teacher(images))
        teacher.train()
    real = trainer.of_teacher
    trainer.of_teacher = lambda x: passes.append(real(x)) or passes[-1]
    trainer.consistency(images)
    assert [torch.equal(one, plain) for one in passes] == [False, False, True]
    assert not torch.equal(passes[0], passes[1])
    assert all(module.training for module in teacher.modules())


def test_ict_compares_a_mix_with_the_mix_of_predictions(tiny, make_trainer, monkeypatch):
    share = 0.25
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: torch.full_like(self.concentration1, share))
    trainer = apart(make_trainer(NAMES[2], tiny()))
    batch = a_batch(trainer)
    one, other = batch["unlabeled"].split(1)
    teacher = trainer.training_modules["teacher"]
    with torch.no_grad():
        student = trainer.plans_network((1 - share) * one + share * other)[0].softmax(1)
        target = (1 - share) * teacher(one).softmax(1) + share * teacher(other).softmax(1)
    assert consistency_of(trainer, batch).item() == pytest.approx((student - target).square().mean().item(), rel=1e-4)
    odd = {**batch, "unlabeled": torch.cat([one, other, one])}  # the last is left out
    assert consistency_of(trainer, odd).item() == pytest.approx(consistency_of(trainer, batch).item(), rel=1e-4)


def test_each_pair_has_a_share_of_its_own(tiny, make_trainer):
    trainer = make_trainer(NAMES[2], tiny())
    seen = []
    trainer.of_student = lambda images: seen.append(images) or trainer.of_teacher(images)
    zeros, ones = torch.zeros(4, 1, 16, 16, 16), torch.ones(4, 1, 16, 16, 16)
    trainer.consistency(torch.cat([zeros, ones]))
    shares = seen[0].flatten(1)
    assert (shares == shares[:, :1]).all()
    assert len(set(shares[:, 0].tolist())) == 4


def test_ict_needs_two_images(tiny, make_trainer):
    dataset = tiny()

    class OneByOne(type(dataset)):
        @property
        def plans(self):
            plans = super().plans
            plans["configurations"][self.configuration]["batch_size"] = 1
            return plans

    alone = OneByOne(*(getattr(dataset, field.name) for field in dataclasses.fields(dataset)))
    with pytest.raises(UserError, match="mixes pairs of images"):
        make_trainer(NAMES[2], alone)


@pytest.mark.parametrize("name", NAMES)
def test_resumed_it_ends_with_the_weights_of_an_uninterrupted_run(tiny, make_trainer, name):
    settings = {"save_every": 1, "teacher_rampup": 0, "seed": 3}
    assert_resumed_equals_uninterrupted(lambda: make_trainer(f"{name}_2epochs", tiny(), settings=settings))


@pytest.mark.parametrize("name", NAMES)
def test_the_ramp_and_the_weight(tiny, make_trainer, name):
    trainer = make_trainer(name, tiny(), settings={"teacher_weight": 0.5, "teacher_rampup": 0.5})
    trainer.global_step = trainer.total_steps
    assert trainer.term_weights()["consistency"] == 0.5
    trainer.global_step = 0
    assert trainer.term_weights()["consistency"] < 0.01


def test_ua_mt_steps(tiny, make_trainer):
    assert stepped(make_trainer("nnUNetTrainerUAMT", tiny()))


def test_each_pass_of_ua_mt_sees_noise_of_its_own_and_so_does_the_target(tiny, make_trainer):
    trainer = make_trainer("nnUNetTrainerUAMT", tiny("2d"), settings={"teacher_noise": 0.3})
    images = trainer._to_device(a_batch(trainer)).unlabeled.images
    seen, of_teacher = [], trainer.of_teacher
    trainer.of_teacher = lambda x: seen.append(x) or of_teacher(x)
    apart(trainer).consistency(images)
    assert len(seen) == trainer.settings.uamt_passes + 1
    for i, one in enumerate(seen):
        assert (one - images).std() > 0.1
        assert not any(torch.equal(one, other) for other in seen[:i])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_nnunets_commands_train_continue_validate_and_predict(tiny_copy, run_nnunet, tmp_path, name):
    terms = {"loss_sup", "loss_consistency"}
    commands_work(tiny_copy("3d"), run_nnunet, tmp_path, f"{name}_2epochs", terms)
