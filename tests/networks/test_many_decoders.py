"""MC-Net+'s decoders: the plans' own is untouched, and the others differ from it by how they upsample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import a_network
from torch import nn

from nnunet_ssl.networks.many_decoders import ManyDecoders, resampling_decoder


def images(dim, side=8):
    return torch.randn(2, 1, *[side] * dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dim", [2, 3])
def test_it_gives_the_plans_networks_outputs_and_those_of_each_further_decoder(dim, residual):
    network = a_network(dim, residual)
    names = list(network.state_dict())
    many = ManyDecoders(network, {mode: resampling_decoder(network, mode) for mode in ("linear", "nearest")})
    expected, found = network(images(dim)), many(images(dim))
    assert list(found) == ["own", "linear", "nearest"]
    assert all(torch.equal(a, b) for a, b in zip(found["own"], expected, strict=True))
    for mode in ("linear", "nearest"):
        assert [o.shape for o in found[mode]] == [o.shape for o in expected]
        assert not torch.allclose(found[mode][0], expected[0])
        assert not any(isinstance(m, nn.ConvTranspose2d | nn.ConvTranspose3d) for m in many.others[mode].modules())
    assert list(network.state_dict()) == names
    own = {id(p) for p in network.parameters()}
    assert not any(id(p) in own for p in many.others.parameters())


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_a_stage_interpolates_convolves_and_joins_the_skip(mode):
    """By hand, with anisotropic strides and kernels."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    network = PlainConvUNet(
        input_channels=1, n_stages=2, features_per_stage=(4, 6), conv_op=nn.Conv3d, kernel_sizes=[[1, 3, 3], [3, 3, 3]],
        strides=[[1, 1, 1], [1, 2, 2]], n_conv_per_stage=1, num_classes=2, n_conv_per_stage_decoder=1, conv_bias=True,
        norm_op=nn.InstanceNorm3d, nonlin=nn.LeakyReLU, deep_supervision=False,
    )  # fmt: skip
    decoder = resampling_decoder(network, mode)
    conv = decoder.transpconvs[0][1]
    assert conv.kernel_size == (1, 3, 3)
    skip, bottleneck = network.encoder(torch.randn(1, 1, 4, 8, 8))
    options = {"mode": "trilinear", "align_corners": True} if mode == "linear" else {"mode": "nearest"}
    up = F.interpolate(bottleneck, scale_factor=(1.0, 2.0, 2.0), **options)
    up = F.conv3d(up, conv.weight, conv.bias, padding=(0, 1, 1))
    expected = decoder.seg_layers[0](decoder.stages[0](torch.cat([up, skip], 1)))
    torch.testing.assert_close(decoder([skip, bottleneck]), expected)
