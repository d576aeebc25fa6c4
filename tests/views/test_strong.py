"""The strong view: repeatable, without gradient, what it changes and how often."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_ssl.views import intensity
from nnunet_ssl.views.strong import StrongView

NOTHING = {"jitter": 0.0, "strength": 0.5, "blur": 0.0, "noise": 0.0}
ALL = {"jitter": 1.0, "strength": 0.5, "blur": 1.0, "noise": 1.0}


def images_of(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def view(images, seed=0, **settings):
    torch.manual_seed(seed)
    return StrongView(**settings)(images, np.random.default_rng(seed))


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 8, 9, 10)])
def test_equal_draws_give_equal_views_and_the_images_stay(shape):
    images = images_of(shape).requires_grad_()
    before = images.detach().clone()
    strong = view(images, **ALL)
    assert torch.equal(strong, view(images, **ALL))
    assert not torch.equal(strong, view(images, seed=1, **ALL))
    assert torch.equal(images, before)
    assert not strong.requires_grad
    assert strong.isfinite().all()
    channels = (strong - images).flatten(2)
    assert all((channel != 0).any() for image in channels for channel in image)


def test_what_is_drawn_for_nobody_changes_nothing():
    images = images_of((3, 2, 8, 8))
    assert torch.equal(view(images, **NOTHING), images)
    assert torch.equal(view(images, **{**ALL, "blur": 0.0, "noise": 0.0, "strength": 0.0}), images)


@pytest.mark.parametrize(("name", "changes"), [("blur", ["blur"]), ("noise", ["noise", "low_resolution"])])
def test_a_share_of_the_images_is_changed(name, changes):
    images = images_of((400, 1, 32, 32))
    changed = (view(images, **{**NOTHING, name: 0.3}) != images).flatten(1).any(1).float().mean()
    expected = 1 - 0.7 ** len(changes)
    assert changed.item() == pytest.approx(expected, abs=0.08)


def test_how_far_jitter_goes(monkeypatch):
    seen = {}
    for name in ("brightness", "contrast", "gamma"):
        monkeypatch.setattr(
            intensity, name, lambda images, values, *_, name=name: seen.__setitem__(name, values) or images
        )
    view(images_of((500, 2, 2, 2)), **{**ALL, "jitter": 0.8, "blur": 0.0, "noise": 0.0})
    for name, low, unchanged, high in (
        ("brightness", -0.5, 0, 0.5),
        ("contrast", 2 / 3, 1, 1.5),
        ("gamma", 2 / 3, 1, 1.5),
    ):
        values = seen[name]
        still = values == unchanged
        assert (still[:, 0] == still[:, 1]).all()  # an image's channels change together
        assert still[:, 0].float().mean().item() == pytest.approx(0.2, abs=0.05)
        assert not torch.equal(values[:, 0], values[:, 1])  # by their own numbers
        assert low - 1e-6 <= values.min() < low + 0.02
        assert high - 0.02 < values.max() <= high + 1e-6


def test_what_is_masked_stays_zero_in_its_channels_alone():
    images = images_of((2, 2, 8, 8))
    images[..., :3] = 0
    strong = view(images, **ALL, zero_outside=(True, False))
    assert (strong[:, 0, :, :3] == 0).all()
    assert (strong[:, 1, :, :3] != 0).all()
    assert (strong[..., 3:] != images[..., 3:]).float().mean() > 0.9


def test_axes_that_are_left_alone():
    images = images_of((2, 1, 6, 12, 12))
    images[:, :, 1:] = images[:, :, :1]  # constant along the first axis
    images[:, :, 3] += 10
    strong = view(images, **{**NOTHING, "blur": 1.0}, axes=(1, 2))
    assert (strong[:, :, 3].mean((-1, -2)) - strong[:, :, 2].mean((-1, -2))).sub(10).abs().max() < 1e-4
