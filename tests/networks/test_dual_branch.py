import copy

import pytest
import torch
from helpers.networks import a_network
from torch import nn

from nnunet_ssl.errors import UserError
from nnunet_ssl.losses.branches import Branches
from nnunet_ssl.networks.dual_branch import DualBranchUNet, mean_of_branches


def a_dual(dim=3, residual=False, low_level_start=1, deep_supervision=True):
    network = DualBranchUNet(a_network(dim, residual), low_level_start)
    network.set_deep_supervision(deep_supervision)
    return network


def images(dim=3):
    return torch.randn(2, 1, *[8] * dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dim", [2, 3])
def test_the_high_branch_is_the_plans_network(dim, residual):
    plain = a_network(dim, residual)
    dual = DualBranchUNet(copy.deepcopy(plain))
    assert {k: v.shape for k, v in dual.state_dict().items() if not k.startswith("low_decoder.")} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    expected = plain(images(dim))
    high, low = dual(images(dim))
    assert all(torch.equal(a, b) for a, b in zip(high.logits, expected, strict=True))
    assert [o.shape for o in low.logits] == [o.shape for o in expected[:-1]]  # one stage less
    for decoder, branch in ((dual.decoder, high), (dual.low_decoder, low)):
        assert torch.equal(decoder.seg_layers[-1](branch.feature), branch.logits[0])


def test_the_low_branch_has_weights_of_its_own_and_never_sees_the_bottleneck():
    dual = a_dual()
    pairs = zip(dual.low_decoder.stages.parameters(), dual.decoder.stages[1:].parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs if a.ndim > 1)
    assert {id(p) for p in dual.low_decoder.parameters()}.isdisjoint(id(p) for p in dual.decoder.parameters())
    _, low = dual(images())
    low.logits[0].sum().backward()
    assert all(p.grad is None for p in dual.encoder.stages[-1].parameters())
    assert all(p.grad is not None for p in dual.encoder.stages[-2].parameters())
    assert all(p.grad is None for p in dual.decoder.stages.parameters())


def test_the_low_branch_is_a_shallower_unet():
    """The plans' network with one stage less, given the same weights, gives the low-level branch's outputs."""
    dual = a_dual()
    shallow = a_network()
    skips = dual.encoder(images())[:-1]
    x = skips[-1]
    low = dual.low_decoder
    for skip, up, stage in zip(skips[-2::-1], low.transpconvs, low.stages, strict=True):
        x = stage(torch.cat([up(x), skip], 1))
    torch.testing.assert_close(dual(images())[1].logits[0], low.seg_layers[-1](x))
    assert len(low.stages) == len(shallow.decoder.stages) - 1


def test_without_a_low_branch_it_is_the_plans_network():
    plain = a_network()
    dual = DualBranchUNet(plain, low_level_start=0)
    assert dual.state_dict().keys() == plain.state_dict().keys()
    assert list(dual(images()).named()) == list(dual.decoders.named()) == ["high"]
    assert all(torch.equal(a, b) for a, b in zip(dual.eval()(images()), plain.eval()(images()), strict=True))


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_in_evaluation_softmax_gives_the_mean_of_both_branches(deep_supervision):
    dual = a_dual(deep_supervision=deep_supervision)
    high, low = (b.logits for b in dual(images()))
    both = dual.eval()(images())
    dual.branch = "each"
    each = dual(images())._asdict()
    if not deep_supervision:
        high, low, both = [high], [low], [both]
    for i, logits in enumerate(both):
        branches = [b[i].softmax(1) for b in (high, low) if i < len(b)]
        torch.testing.assert_close(logits.softmax(1), torch.stack(branches).mean(0))
    assert len(both) == len(high)
    for name, expected in (("high", high), ("low", low)):
        dual.branch = name
        for found in (dual(images()), each[name]):
            found = found if deep_supervision else [found]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_mean_is_right_for_extreme_logits_and_in_half_precision():
    high, low = torch.tensor([[[300.0], [0.0]]]), torch.tensor([[[0.0], [300.0]]])
    torch.testing.assert_close(mean_of_branches(Branches(high, low)).softmax(1), torch.full((1, 2, 1), 0.5))
    with torch.autocast("cpu", torch.bfloat16):
        assert mean_of_branches(Branches(high.bfloat16(), low.bfloat16())).dtype == torch.float32


@pytest.mark.parametrize("saved", [0, 1])
@pytest.mark.parametrize("built", [0, 1])
def test_the_weights_say_how_deep_the_low_branch_is(saved, built):
    trained, loaded = a_dual(low_level_start=saved), a_dual(low_level_start=built)
    loaded.load_state_dict(trained.state_dict())  # strict
    assert loaded.low_level_start == saved
    assert torch.equal(trained.eval()(images())[0], loaded.eval()(images())[0])


def test_a_deeper_start_leaves_fewer_stages():
    network = a_network()
    with pytest.raises(UserError, match=r"0 \(no low-level branch\) to 1"):
        DualBranchUNet(network, 2)


def test_a_network_that_is_no_unet_is_refused():
    with pytest.raises(UserError, match="Conv3d"):
        DualBranchUNet(nn.Conv3d(1, 1, 1))


@pytest.mark.parametrize(("training", "branch"), [(True, "both"), (False, "both"), (False, "high"), (False, "low")])
def test_compiled_as_one_graph_it_gives_the_same(training, branch):
    dual = a_dual().train(training)
    dual.branch = branch
    compiled = torch.compile(dual, backend="aot_eager" if training else "eager", fullgraph=True)
    found, expected = compiled(images()), dual(images())
    flat = torch.utils._pytree.tree_leaves
    assert len(flat(found)) == len(flat(expected))
    for a, b in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(a, b)
