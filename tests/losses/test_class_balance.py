"""How often voxels of a class are drawn, by counting those that are."""

from __future__ import annotations

import torch

from nnunet_ssl.losses.class_balance import ClassBalance


def after(*steps):
    classes = ClassBalance(3)
    for step, counts in enumerate(steps):
        classes.update(torch.tensor(counts), step)
    return classes


def test_of_each_class_as_many_are_drawn_as_there_are_of_the_rarest():
    classes = after([9000.0, 600.0, 0.0], [7000.0, 200.0, 200.0])
    torch.testing.assert_close(classes.counts, torch.tensor([8000.0, 400.0, 100.0]))
    torch.testing.assert_close(classes.shares(), torch.tensor([1 / 80, 1 / 4, 1.0]))
    torch.manual_seed(0)
    labels = torch.arange(3).repeat_interleave(torch.tensor([80000, 4000, 1000]))
    drawn = labels[classes.draw(labels)].bincount(minlength=3)
    assert drawn[2] == 1000
    assert (drawn[:2] - 1000).abs().max() < 150


def test_all_are_drawn_at_first():
    classes, labels = after([8000.0, 400.0, 100.0]), torch.zeros(40000, dtype=torch.int64)
    assert classes.draw(labels, 0.0).all()
    torch.manual_seed(0)
    assert abs(classes.draw(labels, 0.5).float().mean() - (1 - 0.5 * 79 / 80)) < 0.01


def test_a_class_that_was_not_seen_spoils_nothing():
    """In the authors' code it makes the least count 0, so that nothing is drawn, and its own share 0 / 0."""
    classes = after([8000.0, 400.0, 0.0])
    torch.testing.assert_close(classes.shares(), torch.tensor([0.05, 1.0, 1.0]))
    assert after([0.0, 0.0, 0.0]).shares().tolist() == [1, 1, 1]
