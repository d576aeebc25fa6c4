"""The attention over channels, against loops over heads and blocks, and where its gradients go."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnunet_ssl.networks.knowledge_exchange import ChannelAttention, KnowledgeExchange

SIZES = [(4, 6), (5, 1), (3, 4, 2), (1, 1, 1)]


def awake(module):
    """With random weights in place of the zeros that it starts with."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


@pytest.mark.parametrize("size", SIZES)
def test_at_the_start_nothing_is_exchanged(size):
    torch.manual_seed(0)
    x, other = torch.randn(2, 2, 6, *size)
    exchanged = KnowledgeExchange(6, len(size))(x, other)
    assert torch.equal(exchanged[0], x)
    assert torch.equal(exchanged[1], other)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_head_by_head_and_block_by_block(size, local):
    torch.manual_seed(0)
    layer = awake(ChannelAttention(6, len(size), local))
    x, other = torch.randn(2, 2, 6, *size)
    with torch.no_grad():
        q, k, v = layer.query(layer.norm(x)), layer.key(layer.norm_other(other)), layer.value(layer.norm_other(other))
        selected, halves = torch.zeros_like(x), []
        for n in size:
            first = (n + 1) // 2
            halves.append([slice(0, first), slice(first, n)] if local and n > 1 else [slice(0, n)])
        for block, b, head in itertools.product(itertools.product(*halves), range(2), range(2)):
            of = [t[b, head::2][(slice(None), *block)] for t in (q, k, v)]
            scores = of[0].flatten(1) @ of[1].flatten(1).T
            scores = (scores - scores.mean()) / (scores.var(unbiased=False) + 1e-5).sqrt()
            selected[b][(slice(None), *block)] += (scores.softmax(1) @ of[2].flatten(1)).view_as(of[2]) / 2
        expected = x + layer.project(selected)
        expected = expected + F.gelu(layer.layer(layer.norm_out(expected)))
        torch.testing.assert_close(layer(x, other), expected, rtol=1e-4, atol=1e-4)


def test_labeled_images_learn_from_unlabeled_ones_and_nothing_flows_back():
    torch.manual_seed(0)
    exchange = awake(KnowledgeExchange(6, 2))
    labeled, unlabeled = (torch.randn(2, 6, 4, 4, requires_grad=True) for _ in range(2))
    out, of_unlabeled = exchange(labeled, unlabeled)
    assert not of_unlabeled.requires_grad
    assert not torch.allclose(out, exchange(labeled, unlabeled.flip(0))[0])
    assert not torch.allclose(of_unlabeled, exchange(labeled.flip(0), unlabeled)[1])
    out.square().sum().backward()
    assert labeled.grad.any()
    assert unlabeled.grad is None
    assert all(p.grad.any() for p in exchange.parameters())
