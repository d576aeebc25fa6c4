"""The EMA teacher: the analytic sequence, buffers, and that nothing else moves it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nnunet_ssl.networks.ema import EMATeacher


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))


@pytest.mark.parametrize("decay", [0.99, 0.5, 0.0])
def test_the_sequence_is_the_analytic_one(decay):
    student = network().double()
    teacher = EMATeacher(student, decay)
    students = []
    for step in range(6):
        for p in student.parameters():
            p.data += torch.randn_like(p)
        students.append([p.detach().clone() for p in student.parameters()])
        teacher.update(student, step)
        # sum over all students, each weighed by what the later steps left of it
        kept = [min(1 - 1 / (s + 1), decay) for s in range(step + 1)]
        weights = [(1 - kept[s]) * torch.tensor(kept[s + 1 :]).prod().item() for s in range(step + 1)]
        assert sum(weights) == pytest.approx(1)
        for i, p in enumerate(teacher.network.parameters()):
            expected = sum(w * parameters[i] for w, parameters in zip(weights, students, strict=True))
            torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-7)


def test_within_the_warm_up_it_is_the_mean_of_all_students():
    student = network()
    teacher = EMATeacher(student, 0.99)
    weights = []
    for step in range(5):
        nn.init.normal_(student[0].weight)
        weights.append(student[0].weight.detach().clone())
        teacher.update(student, step)
    torch.testing.assert_close(teacher.network[0].weight, torch.stack(weights).mean(0))


def test_it_starts_as_the_student_is_at_the_first_step_bit_for_bit():
    student = network()
    teacher = EMATeacher(student)
    for p in student.parameters():  # pretrained weights come after it was built
        p.data.normal_()
    teacher.start(student)
    for own, its in zip(teacher.network.parameters(), student.parameters(), strict=True):
        assert torch.equal(own, its)
        assert own.data_ptr() != its.data_ptr()


def test_buffers_are_copied_not_averaged():
    student = network()
    teacher = EMATeacher(student)
    for step in range(3):
        student(torch.randn(2, 1, 8, 8) + 5)
        teacher.update(student, step + 50)
        assert torch.equal(teacher.network[1].running_mean, student[1].running_mean)
        assert teacher.network[1].num_batches_tracked == step + 1


def test_it_never_has_or_gives_a_gradient():
    student = network()
    teacher = EMATeacher(student)
    x = torch.randn(1, 1, 8, 8, requires_grad=True)
    out = teacher(x)
    assert not out.requires_grad
    (student(x) - out).square().mean().backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None and p.requires_grad for p in student.parameters())


def test_the_students_update_leaves_it_and_its_own_leaves_the_student():
    student = network()
    teacher = EMATeacher(student)
    before = copy.deepcopy(teacher.state_dict())
    for p in student.parameters():
        p.data += 1
    assert all(torch.equal(t, before[n]) for n, t in teacher.state_dict().items())
    of_student = copy.deepcopy(student.state_dict())
    teacher.update(student, 7)
    assert all(torch.equal(t, of_student[n]) for n, t in student.state_dict().items())


def test_without_deep_supervision_and_the_student_keeps_its_own(tiny, make_trainer):
    trainer = make_trainer("nnUNetTrainerLabeledOnly", tiny())
    teacher = EMATeacher(trainer.plans_network)
    x = torch.randn(1, 1, 16, 16, 16)
    outputs = trainer.plans_network(x)
    assert isinstance(outputs, list)
    assert torch.equal(teacher(x), outputs[0])
    assert teacher.state_dict().keys() == {f"network.{n}" for n in trainer.plans_network.state_dict()}


def test_a_state_dict_brings_it_back():
    student = network()
    teacher, other = EMATeacher(student), EMATeacher(student)
    for p in student.parameters():
        p.data += 1
    teacher.update(student, 3)
    other.load_state_dict(teacher.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), other.parameters(), strict=True))
