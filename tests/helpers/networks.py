"""A small network."""

from __future__ import annotations

from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn


def a_network(dim=3, residual=False):
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dim == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    blocks = {"n_blocks_per_stage": [1, 1, 1]} if residual else {"n_conv_per_stage": [1, 1, 1]}
    return (ResidualEncoderUNet if residual else PlainConvUNet)(
        input_channels=1, n_stages=3, features_per_stage=(4, 8, 16), conv_op=conv, kernel_sizes=3, strides=[1, 2, 2],
        **blocks, num_classes=3, n_conv_per_stage_decoder=[1, 1], norm_op=norm, nonlin=nn.LeakyReLU,
        deep_supervision=True,
    )  # fmt: skip
