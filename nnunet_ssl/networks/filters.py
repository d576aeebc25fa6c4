"""The filters of a network's convolutions, as rows."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def filters_of(network: nn.Module) -> list[Tensor]:
    """Of each convolution the filters ``[out, in x kernel]``, views of its weights, which give them their gradients.

    Left out are layers with as many filters as a filter has numbers, or more, whose filters span every other; and heads
    of nnU-Net's U-Nets that are not at full resolution, of which deep supervision trains some and some not.

    Args:
        network: of any kind, 2D or 3D.
    """
    heads = list(getattr(getattr(network, "decoder", None), "seg_layers", ()))[:-1]
    found = []
    for module in network.modules():  # each once, though nnU-Net has some under several names
        if not isinstance(module, _ConvNd) or any(module is head for head in heads):
            continue
        weight = module.weight.transpose(0, 1) if isinstance(module, _ConvTransposeNd) else module.weight
        rows = weight.flatten(1)
        if len(rows) < rows.shape[1]:
            found.append(rows)
    return found
