"""MagicNet's cubes against index-by-index oracles: order, ownership, location, blending."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from nnunet_ssl.losses.cubes import (
    blended_pseudo_labels,
    center_crop,
    class_weights,
    fits,
    legal_counts,
    location_loss,
    mix,
    partition,
    random_order,
    recover,
    reflect_pad,
    unmix,
)
from nnunet_ssl.losses.pseudo_labels import hard_pseudo_labels

SPATIAL = {2: (12, 18), 3: (6, 12, 18)}
ALL_COUNTS = [
    counts for dim in (2, 3) for counts in itertools.product(*[[n for n in (1, 2, 3) if s % n == 0]
                                                               for s in SPATIAL[dim]])
]  # fmt: skip


def cube_at(x, counts, position):
    """The cube at a position, cut out by hand: ``[B, C, *cube]``."""
    for axis, (n, p) in enumerate(zip(counts, position, strict=True), start=2):
        size = x.shape[axis] // n
        x = x.narrow(axis, p * size, size)
    return x


@pytest.mark.parametrize("counts", ALL_COUNTS, ids=str)
def test_partition_is_row_major_and_recover_inverts_it(counts):
    x = torch.randn(2, 3, *SPATIAL[len(counts)])
    cubes = partition(x, counts)
    assert cubes.shape[1] == math.prod(counts)
    for n in range(math.prod(counts)):
        assert torch.equal(cubes[:, n], cube_at(x, counts, np.unravel_index(n, counts)))
    assert torch.equal(recover(cubes, counts), x)


@pytest.mark.parametrize("counts", [(2, 3), (3, 2, 1), (3, 3, 3)], ids=str)
def test_each_cube_returns_to_its_own_place_not_to_the_mirrored_one(counts):
    """The released code put the cube of (z, y, x) at (x, y, z)."""
    size = [2 * n for n in counts]
    numbers = torch.arange(math.prod(counts)).reshape(counts)
    x = numbers
    for axis in range(len(counts)):
        x = x.repeat_interleave(2, axis)
    cubes = partition(x[None, None], counts)
    assert cubes.flatten(2).unique(dim=2).flatten().tolist() == list(range(math.prod(counts)))
    assert torch.equal(recover(cubes, counts)[0, 0], x)
    assert list(x.shape) == size


def test_gradients_return_to_their_voxels():
    x = torch.randn(1, 2, 6, 6, 6, requires_grad=True)
    weight = torch.randn(1, 2, 6, 6, 6)
    (recover(partition(x, (2, 3, 1)), (2, 3, 1)) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


@pytest.mark.parametrize("counts", [(2, 2), (2, 2, 4), (2, 2, 5)])
def test_what_cannot_be_cut_is_refused(counts):
    with pytest.raises(ValueError, match="cannot be cut"):
        partition(torch.zeros(1, 1, 6, 6, 6), counts)


def test_a_wrong_number_of_cubes_is_refused():
    with pytest.raises(ValueError, match="are not"):
        recover(torch.zeros(1, 7, 1, 2, 2, 2), (2, 2, 2))


def test_mixing_keeps_positions_and_unmixing_restores_each_images_own_cubes():
    torch.manual_seed(0)
    counts = (3, 2, 3)
    x = torch.randn(4, 2, *SPATIAL[3])
    cubes = partition(x, counts)
    order = random_order(4, math.prod(counts))
    assert torch.equal(order.sort(0).values, torch.arange(4)[:, None].expand_as(order))
    mixed = recover(mix(cubes, order), counts)
    for j, n in itertools.product(range(4), range(math.prod(counts))):
        position = np.unravel_index(n, counts)
        owner = order[j, n].item()
        assert torch.equal(cube_at(mixed, counts, position)[j], cube_at(x, counts, position)[owner])
    assert not torch.equal(mixed, x)
    assert torch.equal(recover(unmix(partition(mixed, counts), order), counts), x)


def test_orders_of_positions_are_independent_and_all_images_take_part():
    torch.manual_seed(0)
    order = random_order(4, 4000)
    stay = (order == torch.arange(4)[:, None]).float().mean(1)
    assert stay.tolist() == pytest.approx([0.25] * 4, abs=0.03)
    both = (order[:, :2000] == order[:, 2000:]).float().mean()
    assert both.item() == pytest.approx(0.25, abs=0.03)


def test_gradients_of_exchanged_cubes_reach_their_owner():
    torch.manual_seed(1)
    x = torch.randn(3, 1, 4, 4, requires_grad=True)
    order = random_order(3, 4)
    own = recover(unmix(mix(partition(x, (2, 2)), order), order), (2, 2))
    own[1].sum().backward()
    assert torch.equal(x.grad.flatten(1).sum(1), torch.tensor([0.0, 16.0, 0.0]))


@pytest.mark.parametrize(
    ("patch", "stride", "alone", "reflected", "whole"),
    [
        ((96, 96, 96), (16, 16, 16), [3, 3, 3], (), [3, 3, 3]),
        ((96, 96, 96), (32, 32, 32), [2, 2, 2], (0, 1, 2), [3, 3, 3]),  # 32 would leave one voxel, 48 is no multiple
        ((128, 128, 128), (32, 32, 32), [2, 2, 2], (), [2, 2, 2]),
        ((64, 160, 160), (16, 32, 32), [2, 2, 2], (1, 2), [2, 2, 2]),  # the first axis needs no reflection
        ((192, 160, 112), (32, 32, 16), [3, 2, 2], (1, 2), [3, 2, 2]),
        ((20, 320, 256), (4, 64, 64), [2, 2, 2], (0, 1), [2, 2, 2]),
        ((16, 16, 16), (4, 4, 4), [2, 2, 2], (), [2, 2, 2]),
        ((8, 16, 16), (2, 4, 4), [2, 2, 2], (), [2, 2, 2]),
        ((40, 56, 40), (8, 8, 8), [2, 2, 2], (0, 1, 2), [2, 2, 2]),
        ((512, 384), (128, 64), [2, 3], (), [2, 3]),
        ((3, 2, 7), (1, 1, 1), [1, 1, 1], (), [1, 1, 1]),  # a cube has two voxels along each axis
        ((48, 32, 32), (16, 32, 32), [2, 1, 1], (0,), [3, 2, 2]),
    ],
)
def test_legal_counts_of_each_axis(patch, stride, alone, reflected, whole):
    assert legal_counts(patch, stride) == alone
    assert legal_counts(patch, [1] * len(patch)) == whole
    for axis, (n, length, s) in enumerate(zip(alone, patch, stride, strict=True)):
        if axis in reflected:
            assert length % n == 0
            assert s < length // n
            assert (length // n) % s
        else:
            assert n == 1 or (length // n // s >= 2 and length % (n * s) == 0)


def test_reflected_cubes_leave_two_voxels_as_well():
    assert not fits(3, 96, 32, padded=True)  # 32 would be one voxel
    assert fits(2, 96, 32, padded=True)


@pytest.mark.parametrize("multiple", [(8, 8), (8, 8, 8)])
def test_reflected_up_to_a_multiple_and_back(multiple):
    x = torch.randn(2, 3, *(20, 28, 9)[: len(multiple)])
    padded = reflect_pad(x, multiple)
    assert all(n % 8 == 0 and n - m < 8 for n, m in zip(padded.shape[2:], x.shape[2:], strict=True))
    assert torch.equal(center_crop(padded, x.shape[2:]), x)
    for axis, n in enumerate(x.shape[2:], start=2):
        low = (-n % 8) // 2
        if low:  # the voxel before the first is the second
            others = [range_ for i, range_ in enumerate(x.shape[2:], start=2) if i != axis]
            line = center_crop(padded.movedim(axis, 2), [padded.shape[axis], *others])
            assert torch.equal(line[:, :, low - 1], x.movedim(axis, 2)[:, :, 1])
    assert reflect_pad(torch.zeros(1, 1, 16, 8, 8), (8, 8, 8)).shape == (1, 1, 16, 8, 8)


def test_location_loss_is_the_mean_over_cubes_and_images():
    logits = torch.randn(3, 8, 8)
    expected = 0.0
    for b, n in itertools.product(range(3), range(8)):
        expected -= logits[b, n].log_softmax(0)[n] / 24
    torch.testing.assert_close(location_loss(logits), expected)
    assert location_loss(torch.zeros(2, 27, 27)).item() == pytest.approx(math.log(27))
    right = 50 * torch.eye(8).expand(2, 8, 8)
    assert location_loss(right) < 1e-6
    assert location_loss(right.flip(1)) > 40
    assert location_loss(logits.bfloat16()).dtype == torch.float32


def test_class_weights():
    counts = torch.tensor([6.0, 0.0, 3.0, 1.0, 0.0])
    assert class_weights(counts, 1.0).tolist() == pytest.approx([1, 0, 1 / 2, 1 / 6, 0])
    assert class_weights(7.3 * counts, 1.0).tolist() == pytest.approx([1, 0, 1 / 2, 1 / 6, 0])
    assert class_weights(counts, 2.0).tolist() == pytest.approx([1, 0, 0.5**0.5, (1 / 6) ** 0.5, 0])
    assert class_weights(torch.zeros(3), 1.0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 5)])
@pytest.mark.parametrize("classes", [2, 5])
def test_blending_voxel_by_voxel(shape, classes):
    torch.manual_seed(0)
    teacher, cubes = torch.randn(2, 2, classes, *shape).unbind(0)
    omega = class_weights(torch.rand(classes), 1.0)
    labels = blended_pseudo_labels(teacher.requires_grad_(), hard_pseudo_labels(teacher), cubes, omega)
    assert labels.shape == (2, 1, *shape)
    assert labels.dtype == torch.int16
    assert not labels.requires_grad
    for b in range(2):
        for v in itertools.product(*map(range, shape)):
            t, o = teacher[(b, slice(None), *v)], cubes[(b, slice(None), *v)]
            w = omega[t.argmax()]
            assert labels[(b, 0, *v)] == ((1 - w) * t + w * o).argmax()


def test_frequent_classes_come_from_the_cubes_and_rare_ones_from_the_teacher():
    teacher, cubes = torch.randn(2, 1, 3, 40, 40).unbind(0)
    labels = blended_pseudo_labels(teacher, hard_pseudo_labels(teacher), cubes, torch.tensor([1.0, 0.0, 0.0]))[:, 0]
    frequent = teacher.argmax(1) == 0
    assert torch.equal(labels[frequent].long(), cubes.argmax(1)[frequent])
    assert torch.equal(labels[~frequent].long(), teacher.argmax(1)[~frequent])
    teacher = teacher.bfloat16()
    alone = blended_pseudo_labels(teacher, hard_pseudo_labels(teacher), cubes, torch.zeros(3))
    assert torch.equal(alone[:, 0].long(), teacher.argmax(1))
