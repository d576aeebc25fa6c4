"""The head that regresses distance maps: its shape, its start, and tanh in half precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_ssl.networks.regression_head import regression_head


@pytest.mark.parametrize("conv", [nn.Conv2d, nn.Conv3d])
def test_it_takes_what_the_segmentation_head_takes_and_starts_at_zero(conv):
    head = regression_head(conv(4, 3, 1), 2)
    feature = torch.randn(2, 4, *[5] * (2 if conv is nn.Conv2d else 3))
    maps = head(feature)
    assert maps.shape == (2, 2, *feature.shape[2:])
    assert not maps.any()
    maps.sum().backward()
    torch.testing.assert_close(head[0].weight.grad[0].flatten(), feature.transpose(0, 1).flatten(1).sum(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_learns_in_half_precision_where_it_is_sure(dtype):
    """In float16 tanh(5) is 1, and its gradient 0."""
    head = regression_head(nn.Conv2d(1, 3, 1), 1)
    head[0].weight.data.fill_(1.0)
    x = torch.tensor([5.0, -6.0]).view(2, 1, 1, 1).requires_grad_()
    with torch.autocast("cpu", dtype):
        value = head(x)
    assert value.dtype == torch.float32
    value.sum().backward()
    expected = 1 - torch.tensor([5.0, -6.0]).double().tanh() ** 2
    torch.testing.assert_close(x.grad.flatten().double(), expected, rtol=0.01, atol=0)
