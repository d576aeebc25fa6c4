"""The discriminator: what it is made of, on patches of any shape."""

from __future__ import annotations

import pytest
import torch

from nnunet_ssl.networks.discriminator import Discriminator


def test_for_one_map_and_one_channel_it_has_the_parameters_of_the_authors():
    """11.02 million, without their last layer, which depends on the patch there and is a mean here."""
    network = Discriminator(1, 1, (112, 112, 80))
    assert sum(p.numel() for p in network.layers.parameters()) == 64 * 128 * 64 + 128 * 256 * 64 + 256 * 512 * 64 + 896
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(11.02e6, rel=0.001)


@pytest.mark.parametrize("patch", [(16, 16, 16), (16, 20), (1, 16, 16), (5, 24, 17), (2, 2, 2)])
def test_every_patch_has_two_logits_and_every_part_learns(patch):
    network = Discriminator(3, 2, patch)
    maps, images = torch.randn(2, 3, *patch, requires_grad=True), torch.randn(2, 2, *patch)
    logits = network(maps, images)
    assert logits.shape == (2, 2)
    logits.square().sum().backward()
    assert maps.grad.any()
    assert all(p.grad.any() for p in network.parameters())


def test_the_error_is_the_cross_entropy_and_who_is_right_is_counted():
    network = Discriminator(1, 1, (16, 16)).eval()
    maps, images = torch.randn(3, 1, 16, 16), torch.randn(3, 1, 16, 16)
    log_prob = network(maps, images).log_softmax(1)
    for labeled in (False, True):
        error, right = network.error(maps, images, labeled)
        assert error.item() == pytest.approx(-log_prob[:, int(labeled)].mean().item(), rel=1e-5)
        assert right.item() == pytest.approx((log_prob.argmax(1) == labeled).float().mean().item())


def test_dropout_is_of_training_and_logits_are_in_full_precision():
    network = Discriminator(1, 1, (16, 16))
    maps, images = torch.randn(2, 1, 16, 16), torch.randn(2, 1, 16, 16)
    assert not torch.equal(network(maps, images), network(maps, images))
    network.eval()
    assert torch.equal(network(maps, images), network(maps, images))
    with torch.autocast("cpu", torch.bfloat16):
        assert network(maps, images).dtype == torch.float32
