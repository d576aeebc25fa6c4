"""The filters of a network: which layers, in which form, each once, and with their gradients."""

from __future__ import annotations

import pytest
import torch
from helpers.networks import a_network
from torch import nn

from nnunet_ssl.networks.filters import filters_of


@pytest.mark.parametrize("dim", [2, 3])
def test_each_layer_of_a_unet_is_there_once_without_the_coarse_heads(dim):
    network = a_network(dim)  # features 4, 8, 16; one convolution a stage
    kernel, strides = 3**dim, 2**dim
    encoder = [(4, kernel), (8, 4 * kernel), (16, 8 * kernel)]
    decoder = [(8, 16 * kernel), (4, 8 * kernel)]
    transposed = [(8, 16 * strides), (4, 8 * strides)]
    assert sorted(tuple(f.shape) for f in filters_of(network)) == sorted([*encoder, *decoder, *transposed, (3, 4)])


def test_a_transposed_convolution_has_a_row_for_each_channel_that_it_gives():
    layer = nn.ConvTranspose2d(3, 2, 2)
    [rows] = filters_of(nn.Sequential(layer))
    assert torch.equal(rows[1], layer.weight[:, 1].flatten())
    rows[1].sum().backward()
    assert layer.weight.grad[:, 1].all()
    assert not layer.weight.grad[:, 0].any()


def test_layers_whose_filters_span_all_are_left_out():
    assert filters_of(nn.Sequential(nn.Conv2d(1, 9, 3), nn.Conv3d(9, 9, 1), nn.Linear(2, 2))) == []
    assert len(filters_of(nn.Conv2d(1, 8, 3))) == 1
