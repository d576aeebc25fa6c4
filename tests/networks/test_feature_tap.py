import copy

import pytest
import torch
from helpers.networks import a_network
from torch import nn

from nnunet_ssl.networks.feature_tap import FeatureTap


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dim", [2, 3])
def test_the_feature_is_what_the_last_head_takes_in(dim, residual):
    network = a_network(dim, residual)
    x = torch.randn(2, 1, *[8] * dim)
    plain = network(x)
    outputs, feature = FeatureTap(network)(x)
    assert all(torch.equal(a, b) for a, b in zip(plain, outputs, strict=True))
    assert torch.equal(network.decoder.seg_layers[-1](feature), outputs[0])


def test_the_network_stays_what_it_was():
    network = a_network()
    state = copy.deepcopy(network.state_dict())
    FeatureTap(network)
    assert list(network.state_dict()) == list(state)
    x = torch.randn(1, 1, 8, 8, 8)
    untouched = a_network()
    untouched.load_state_dict(state)
    assert torch.equal(network(x)[0], untouched(x)[0])


def test_a_feature_is_never_held_after_the_forward():
    tap = FeatureTap(a_network())
    tap(torch.randn(1, 1, 8, 8, 8))
    assert tap._kept is None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_as_one_graph_it_gives_the_same_feature_and_gradients(backend):
    network = a_network()
    tap, x = FeatureTap(network), torch.randn(1, 1, 8, 8, 8)
    compiled = torch.compile(tap, backend=backend, fullgraph=True)
    gradients = []
    for forward in (tap, compiled):
        network.zero_grad()
        outputs, feature = forward(x)
        (feature.square().mean() + outputs[0].mean()).backward()
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in network.parameters()])
    assert sum(bool(g.abs().max() > 0) for g in gradients[0]) > 5
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_network_without_such_a_decoder_is_refused():
    with pytest.raises(TypeError, match=r"decoder\.seg_layers"):
        FeatureTap(nn.Conv3d(1, 1, 1))
