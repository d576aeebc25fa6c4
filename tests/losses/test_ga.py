"""GADice and GACE against slow oracles written from their equations, and the gradients that they are named for."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_ssl.losses.ga import GACELoss, GADiceLoss, GALoss, present_classes

S = 1e-10


def some_voxels(num_classes=5, spatial=(4, 5, 6), absent=(), ignore=None, seed=0):
    """Logits, and labels without the ``absent`` classes; with ``ignore`` a third of the voxels has that label."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, num_classes, *spatial, generator=generator)
    left = torch.tensor([c for c in range(num_classes) if c not in absent])
    labels = left[torch.randint(0, len(left), (2, 1, *spatial), generator=generator)].to(torch.int16)
    if ignore is not None:
        labels[torch.rand(labels.shape, generator=generator) < 1 / 3] = ignore
    return logits, labels


def voxels_of(logits, labels, ignore):
    """Each valid voxel as (probabilities, label), plain floats."""
    p = logits.double().softmax(1).movedim(1, -1).reshape(-1, logits.shape[1]).tolist()
    return [(q, y) for q, y in zip(p, labels.flatten().tolist(), strict=True) if y != ignore]


def ga_dice(logits, labels, ignore=None, present=None):
    """E1 to E3, class by class and voxel by voxel."""
    voxels, num_classes = voxels_of(logits, labels, ignore), logits.shape[1]
    terms = []
    for c in range(num_classes):
        if any(y == c for _, y in voxels):
            overlap = sum(p[c] for p, y in voxels if y == c)
            squares = sum(p[c] ** 2 for p, _ in voxels)
            terms.append(1 - (2 * overlap + S) / (squares + sum(1 for _, y in voxels if y == c) + S))
        elif present is not None and present[c]:
            terms.append(0.0)
        else:
            terms.append(sum(p[c] / len(voxels) * p[c] for p, _ in voxels))
    return sum(terms) / num_classes


def ga_ce(logits, labels, k, gamma, ignore=None):
    """E4: rank, count, sum."""
    losses = sorted(((-math.log(p[y]), y) for p, y in voxels_of(logits, labels, ignore)), reverse=True)
    selected = losses[: max(1, int(len(losses) * k / 100))]
    total = 0.0
    for c in range(logits.shape[1]):
        of_class = [loss for loss, y in selected if y == c]
        total += sum(of_class) / (len(of_class) ** (1 - gamma) * len(selected) ** gamma + S)
    return total


CASES = pytest.mark.parametrize(
    ("num_classes", "absent"), [(2, ()), (2, (1,)), (5, (2, 4)), (14, (0, 3, 7)), (14, range(1, 14)), (14, range(13))]
)
SPATIAL = pytest.mark.parametrize("spatial", [(9, 7), (4, 5, 6)])
IGNORE = pytest.mark.parametrize("ignore", [None, 20])


# ------------------------------------------------------------------------------------------------------------ GADice


@IGNORE
@SPATIAL
@CASES
def test_ga_dice_equals_the_oracle(num_classes, absent, spatial, ignore):
    logits, labels = some_voxels(num_classes, spatial, absent, ignore)
    loss = GADiceLoss(ignore)(logits, labels)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(ga_dice(logits, labels, ignore), abs=1e-6)


def test_a_class_that_is_present_at_full_resolution_only_is_not_pushed_down():
    logits, labels = some_voxels(5, absent=(2, 4))
    present = torch.tensor([True, True, True, True, False])  # 2 has vanished at this scale, 4 is absent altogether
    logits.requires_grad_()
    loss = GADiceLoss()(logits, labels, present)
    assert loss.item() == pytest.approx(ga_dice(logits, labels, present=present), abs=1e-6)
    assert loss.item() < GADiceLoss()(logits, labels).item()


def gradient_in_p(labels, p, present=None):
    """The gradient of GADice in the probabilities: softmax of their logarithms gives them back."""
    p = p.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:  # what the loss calls softmax is p itself
        patch.setattr(torch.Tensor, "softmax", lambda x, dim: x)
        GADiceLoss()(p, labels, present).backward()
    return p.grad


def test_an_absent_class_has_the_gradient_p_over_n_and_k_and_a_vanished_one_has_none():
    logits, labels = some_voxels(5, absent=(2, 4))
    p = logits.softmax(1)
    gradient = gradient_in_p(labels, p, present_classes(labels, 5) | (torch.arange(5) == 2))
    torch.testing.assert_close(gradient[:, 4], p[:, 4] / labels.numel() / 5)  # not twice that: sg stops one factor
    assert (gradient[:, 2] == 0).all()
    assert (gradient[:, 1] != 0).all()


def test_perfect_and_opposite_predictions():
    labels = torch.randint(0, 3, (2, 1, 8, 8))
    logits = 200.0 * torch.nn.functional.one_hot(labels[:, 0], 3).movedim(-1, 1)
    assert GADiceLoss()(logits, labels).item() == pytest.approx(0, abs=1e-6)
    assert GADiceLoss()(logits.roll(1, 1), labels).item() == pytest.approx(1, abs=1e-6)


def test_classes_present():
    labels = torch.tensor([[[[0, 3], [9, 9]]], [[[-1, 0], [0, 1]]]])
    assert present_classes(labels, 5, ignore_label=9).tolist() == [True, True, False, True, False]
    assert present_classes(torch.full((1, 1, 2, 2), 9), 3, ignore_label=9).tolist() == [False] * 3


# -------------------------------------------------------------------------------------------------------------- GACE


@IGNORE
@SPATIAL
@CASES
@pytest.mark.parametrize(("k", "gamma"), [(10, 0.5), (100, 0.5), (33.3, 0.0), (50, 1.0), (0.01, 0.5)])
def test_ga_ce_equals_the_oracle(num_classes, absent, spatial, ignore, k, gamma):
    logits, labels = some_voxels(num_classes, spatial, absent, ignore)
    loss = GACELoss(k, gamma, ignore)(logits, labels)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(ga_ce(logits, labels, k, gamma, ignore), rel=1e-5)


def test_with_gamma_one_and_all_voxels_it_is_the_cross_entropy():
    logits, labels = some_voxels()
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 0].long())
    torch.testing.assert_close(GACELoss(100, 1.0)(logits, labels), expected)


def test_a_voxel_weighs_one_over_the_root_of_its_classes_number():
    logits, labels = torch.zeros(1, 2, 10, 10, requires_grad=True), torch.zeros(1, 1, 10, 10, dtype=torch.int16)
    labels[0, 0, 0, :4] = 1
    GACELoss(100, 0.5)(logits, labels).backward()
    of_true_class = logits.grad.gather(1, labels.long())
    rare, common = labels == 1, labels == 0
    torch.testing.assert_close(of_true_class[rare], torch.full((4,), -0.5 / math.sqrt(4 * 100)))
    torch.testing.assert_close(of_true_class[common], torch.full((96,), -0.5 / math.sqrt(96 * 100)))


@IGNORE
def test_only_the_hardest_valid_voxels_have_a_gradient(ignore):
    logits, labels = some_voxels(5, ignore=ignore)
    logits.requires_grad_()
    GACELoss(10, 0.5, ignore)(logits, labels).backward()
    moved = logits.grad.abs().sum(1, keepdim=True) > 0
    valid = labels != 20
    losses = torch.nn.functional.cross_entropy(logits, labels[:, 0].long().clamp(max=4), reduction="none")[:, None]
    assert moved.sum() == valid.sum() // 10
    assert losses[moved].min() > losses[valid & ~moved].max()


@IGNORE
def test_equal_losses_of_one_class_may_be_ranked_in_any_order(ignore):
    labels = torch.ones(1, 1, 10, 10, dtype=torch.int16)
    labels[0, 0, 9] = 20 if ignore else 1
    logits = torch.zeros(1, 3, 10, 10, requires_grad=True)
    loss = GACELoss(30, 0.5, ignore)(logits, labels)
    assert loss.item() == pytest.approx(math.log(3), rel=1e-5)
    loss.backward()
    assert (logits.grad.abs().sum(1) > 0).sum() == (27 if ignore else 30)


def test_all_voxels_are_not_ranked(monkeypatch):
    logits, labels = some_voxels(ignore=20)
    monkeypatch.setattr(torch.Tensor, "topk", None)
    GACELoss(100, 0.5, 20)(logits, labels)
    with pytest.raises(TypeError):
        GACELoss(99, 0.5, 20)(logits, labels)


# -------------------------------------------------------------------------------------------------------------- both

LOSSES = pytest.mark.parametrize("make", [GADiceLoss, lambda i=None: GACELoss(10, 0.5, i), lambda i=None: GALoss(100, 0.5, i)])  # noqa: E501  # fmt: skip


def test_the_sum_is_of_both_and_hands_the_presence_on():
    logits, labels = some_voxels(5, absent=(2,), ignore=20)
    present = torch.ones(5, dtype=torch.bool)
    expected = ga_ce(logits, labels, 10, 0.5, 20) + ga_dice(logits, labels, 20, present)
    assert GALoss(10, 0.5, 20)(logits, labels, present).item() == pytest.approx(expected, rel=1e-5)


@LOSSES
def test_ignored_voxels_do_not_matter_at_all(make):
    logits, labels = some_voxels(ignore=20)
    other = torch.where(labels == 20, 50 * torch.randn_like(logits), logits).requires_grad_()
    loss = make(20)(other, labels)
    torch.testing.assert_close(loss, make(20)(logits, labels))
    loss.backward()
    assert (other.grad * (labels == 20) == 0).all()


@LOSSES
def test_no_valid_voxel_gives_zero_and_zero_gradients(make):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = make(20)(logits, torch.full((2, 1, 4, 4), 20))
    assert loss.item() == 0
    loss.backward()
    assert (logits.grad == 0).all()


@LOSSES
def test_padding_counts_as_background(make):
    logits, labels = some_voxels()
    padded = torch.where(labels == 0, -1, labels)
    assert torch.equal(make()(logits, padded), make()(logits, labels))


@LOSSES
def test_extreme_logits_have_finite_losses_and_gradients(make):
    logits, labels = some_voxels(absent=(1,))
    logits = (1e4 * logits).requires_grad_()
    loss = make()(logits, labels)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@LOSSES
def test_autocast_does_not_reach_the_losses(make):
    logits, labels = some_voxels(ignore=20)
    logits = logits.bfloat16()
    plain = make(20)(logits, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = make(20)(logits, labels)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(plain, under_autocast)
    torch.testing.assert_close(plain, make(20)(logits.float(), labels))


@IGNORE
@LOSSES
def test_nothing_waits_for_a_value(make, ignore):
    """Tensors without data: an ``.item()``, a mask as an index or a bincount would raise."""
    with FakeTensorMode():
        logits = torch.randn(2, 4, 8, 8, requires_grad=True)
        make(ignore)(logits, torch.zeros(2, 1, 8, 8, dtype=torch.int16)).backward()
