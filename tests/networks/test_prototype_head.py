"""SS-Net's head: what it remembers, what learns, and that voxels without a class take no part."""

from __future__ import annotations

import pytest
import torch

from nnunet_ssl.networks.prototype_head import PROTOTYPES, PrototypeHead, scores


@pytest.fixture
def head():
    torch.manual_seed(0)
    return PrototypeHead(4, 4)


def feature_and_labels(dim=3):
    torch.manual_seed(1)
    feature = torch.randn(2, 4, *[6] * dim)
    labels = torch.randint(0, 3, (2, 1, *[6] * dim))  # class 3 is not there
    return feature, labels


def test_it_remembers_the_voxels_that_the_selector_values_most(head):
    """The authors' code takes those that it values least."""
    feature, labels = feature_and_labels()
    head.remember(feature, labels)
    assert head.known.tolist() == [True, True, False]
    with torch.no_grad():
        for c in (1, 2):
            z = head.project(feature.movedim(1, -1)[labels[:, 0] == c])
            score = head.weigh_voxels[c - 1](z)[:, 0]
            kept = head.prototypes[c - 1]
            distance = (kept[:, None] - z).abs().amax(2)
            assert distance.amin(1).max() < 1e-5  # they are voxels of the class
            of_kept = head.weigh_voxels[c - 1](kept)[:, 0]
            # each voxel is drawn several times of 1,024, so the best few of them all are there
            assert of_kept.max().item() == pytest.approx(score.max().item(), abs=1e-5)
            assert of_kept.min() > score.quantile(0.7)


def test_its_prototypes_are_different_voxels_where_there_are_enough(head):
    feature, labels = feature_and_labels()
    labels[:] = 0
    labels.flatten()[torch.randperm(labels.numel())[:50]] = 1
    head.remember(feature, labels)
    assert len(head.prototypes[0].unique(dim=0)) == PROTOTYPES
    labels.flatten()[labels.flatten().nonzero()[20:, 0]] = 0
    head.remember(feature, labels)
    assert len(head.prototypes[0].unique(dim=0)) == 20


def test_the_old_prototypes_stay_where_a_class_is_not_there(head):
    feature, labels = feature_and_labels()
    head.remember(feature, labels)
    before = head.prototypes.clone()
    head.remember(feature + 1, torch.where(labels == 2, 2, 0))
    assert torch.equal(head.prototypes[0], before[0])
    assert not torch.equal(head.prototypes[1], before[1])
    assert head.known.tolist() == [True, True, False]


def test_it_is_saved_with_what_it_remembers(head):
    head.remember(*feature_and_labels())
    other = PrototypeHead(4, 4)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.prototypes, head.prototypes)
    assert torch.equal(other.known, head.known)


def test_the_feature_and_every_selector_of_a_class_learn(head):
    """In the authors' code the weights of the prototypes are 1, and what would give them learns nothing."""
    feature, labels = feature_and_labels()
    head.remember(feature, labels)
    feature.requires_grad_()
    loss = head(feature, labels)
    loss.backward()
    assert 0 < loss < 4
    for selectors in (head.weigh_voxels, head.weigh_prototypes):
        assert [bool(s[0].weight.grad.any()) for s in selectors] == [True, True, False]
    assert all(p.grad.any() for module in (head.project, head.predict) for p in module.parameters())
    taught = feature.grad.abs().sum(1) > 0
    assert taught.any()
    assert (labels[:, 0][taught] > 0).all()  # the background has no prototypes


def test_the_selectors_weigh_what_they_are_shown_and_do_not_move_it(head):
    feature, labels = feature_and_labels()
    head.remember(feature, labels)
    h = torch.randn(3, 5, 32, requires_grad=True)
    assert scores(head.weigh_voxels, h).shape == (3, 5)
    seen = []
    head.weigh_voxels[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    head(feature.requires_grad_(), labels)
    assert not seen[0].requires_grad


def test_a_batch_without_a_known_class_teaches_nothing(head):
    feature, labels = feature_and_labels(2)
    loss = head(feature.requires_grad_(), labels)  # nothing is remembered yet
    loss.backward()
    assert loss == 0
    assert not feature.grad.any()
    assert not head.prototypes.any()
    assert head.prototypes.shape == (3, PROTOTYPES, 32)


def test_labels_that_name_no_class_take_no_part(head):
    feature, labels = feature_and_labels()
    head.remember(feature, torch.where(labels == 1, 9, labels))
    assert head.known.tolist() == [False, True, False]


def test_it_is_in_full_precision_under_autocast(head):
    feature, labels = feature_and_labels()
    found = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            torch.manual_seed(0)
            head.remember(feature, labels)
            found.append(head(feature, labels))
    assert found[1].dtype == torch.float32
    assert torch.equal(found[0], found[1])
