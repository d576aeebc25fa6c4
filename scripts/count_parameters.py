"""Parameters of SHTA's branch compared with nnU-Net's U-Nets with 32 first-stage features.

python scripts/count_parameters.py
"""

from __future__ import annotations

from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_ssl.networks.shta_branch import SHTABranch
from nnunet_ssl.trainers.shta import SHTASettings

NETWORKS = {(32, 64, 128): 3, (32, 64, 128, 256): 3, (32, 64, 128, 256, 320, 320): 14}  # features -> classes


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    """Print the table."""
    print("| stages | classes | network | branch | ratio | ratio with two networks |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    settings = SHTASettings()
    for features, classes in NETWORKS.items():
        stages = len(features)
        network = PlainConvUNet(
            1, stages, features, nn.Conv3d, 3, [1] + [2] * (stages - 1), 2, classes, 2, conv_bias=True,
            norm_op=nn.InstanceNorm3d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, deep_supervision=True,
        )  # fmt: skip
        branch = SHTABranch(
            features[0], (4, 4, 4), classes, settings.shta_hidden_dim, settings.shta_embedding_dim, None
        )
        host, extra = count(network), count(branch)
        ratios = " | ".join(f"{1 + extra / (n * host):.4f}" for n in (1, 2))
        print(f"| {stages} | {classes} | {host:,} | {extra:,} | {ratios} |")


if __name__ == "__main__":
    main()
