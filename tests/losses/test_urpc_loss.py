"""The pyramid's consistency against a slow oracle, its two divergences, and where its gradients flow."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_ssl.losses.urpc import uncertainty_rectified_consistency as consistency

CODES = "mean_to_scale"


def pyramid(num_classes=3, spatial=(8, 12), strides=((1, 1), (2, 2), (4, 4)), dtype=torch.float32, seed=0):
    """Random logits at several resolutions, full resolution first."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [[n // s for n, s in zip(spatial, stride, strict=True)] for stride in strides]
    return [(2 * torch.randn(2, num_classes, *size, generator=generator)).to(dtype) for size in sizes]


def upsampled(logits):
    size = logits[0].shape[2:]
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return [torch.nn.functional.interpolate(x.double(), size=list(size), mode=mode) for x in logits]


def oracle(logits, kl="mean_to_scale", regions=False):
    """E1 to E4, a scale, a voxel and a class at a time."""
    scales = upsampled(logits)
    p = [(x.sigmoid() if regions else x.softmax(1)).movedim(1, -1).reshape(-1, x.shape[1]).tolist() for x in scales]
    num_scales, num_voxels, num_classes = len(p), len(p[0]), len(p[0][0])

    def divergence(q, r):
        if regions:
            q, r = ([*x, *[1 - v for v in x]] for x in (q, r))
        return sum(a * math.log(a / b) for a, b in zip(q, r, strict=True))

    mean = [[sum(p[s][v][c] for s in range(num_scales)) / num_scales for c in range(num_classes)]
            for v in range(num_voxels)]  # fmt: skip
    total = 0.0
    for s in range(num_scales):
        kls = [
            divergence(mean[v], p[s][v]) if kl == "mean_to_scale" else divergence(p[s][v], mean[v])
            for v in range(num_voxels)
        ]
        weights = [math.exp(-d) for d in kls]
        squares = sum(
            (mean[v][c] - p[s][v][c]) ** 2 * weights[v] for v in range(num_voxels) for c in range(num_classes)
        ) / (num_voxels * num_classes)
        total += squares / (sum(weights) / num_voxels + 1e-8) + sum(kls) / num_voxels
    return total / num_scales


SHAPES = pytest.mark.parametrize(
    ("spatial", "strides"),
    [
        ((8, 12), ((1, 1), (2, 2))),
        ((8, 12), ((1, 1), (2, 2), (4, 4), (8, 4))),
        ((4, 8, 8), ((1, 1, 1), (1, 2, 2), (2, 4, 4))),
    ],
)


@SHAPES
@pytest.mark.parametrize("num_classes", [2, 14])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("kl", ["mean_to_scale", "scale_to_mean"])
def test_it_equals_the_oracle(spatial, strides, num_classes, regions, kl):
    logits = pyramid(num_classes, spatial, strides)
    loss = consistency(logits, kl, regions=regions)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(oracle(logits, kl, regions), rel=1e-4)
    assert torch.equal(consistency(logits, kl, detach_mean=True, regions=regions), loss)  # the value is the same


def test_the_two_divergences_differ():
    logits = pyramid()
    assert consistency(logits, CODES).item() != pytest.approx(consistency(logits, "scale_to_mean").item(), rel=1e-2)


def test_one_region_is_background_and_foreground():
    """A sigmoid of x is a softmax of (0, x): the same divergence, and the same mean square."""
    one = pyramid(1)
    two = [torch.cat([torch.zeros_like(x), x], 1) for x in one]
    torch.testing.assert_close(consistency(one, CODES, regions=True), consistency(two, CODES))


@pytest.mark.parametrize("regions", [False, True])
def test_scales_that_agree_leave_nothing_to_lose(regions):
    full = pyramid(4)[0]
    logits = [full.clone().requires_grad_() for _ in range(4)]
    loss = consistency(logits, CODES, regions=regions)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert all(x.grad.abs().max() < 1e-6 for x in logits)


def test_the_order_of_the_coarse_scales_does_not_matter():
    a, b, c = pyramid()
    torch.testing.assert_close(consistency([a, b, c], CODES), consistency([a, c, b], CODES))


def autograd(scale, logits, **settings):
    leaves = [x.clone().requires_grad_() for x in logits]
    consistency(leaves, **settings).backward()
    return leaves[scale].grad


def rewritten(logits, kl, stop):
    """The loss once more in double precision, with the gradient stopped in what ``stop`` names."""
    p = torch.stack([x.softmax(1) for x in upsampled(logits)])
    mean = p.mean(0)
    mean = mean.detach() if "mean" in stop else mean
    divergence = (mean * (mean / p).log() if kl == "mean_to_scale" else p * (p / mean).log()).sum(2)
    weight = (-divergence).exp()
    weight = weight.detach() if "weight" in stop else weight
    divergence = divergence.detach() if "divergence" in stop else divergence
    over = (1, 2, 3)
    squares = (((mean - p) ** 2).mean(2) * weight).mean(over) / (weight.mean(over) + 1e-8)
    return (squares + divergence.mean(over)).mean()


def gradient_of_rewritten(scale, logits, kl, stop):
    leaves = [x.double().requires_grad_() for x in logits]
    rewritten(leaves, kl, stop).backward()
    return leaves[scale].grad.float()


@pytest.mark.parametrize("kl", ["mean_to_scale", "scale_to_mean"])
@pytest.mark.parametrize("scale", [0, 2])
def test_gradients_flow_through_the_mean_the_weight_and_the_divergence(scale, kl):
    logits = pyramid()
    gradient = autograd(scale, logits, kl=kl)
    torch.testing.assert_close(gradient, gradient_of_rewritten(scale, logits, kl, ()), rtol=1e-3, atol=1e-6)
    for stop in ("mean", "weight", "divergence"):
        assert (gradient - gradient_of_rewritten(scale, logits, kl, (stop,))).abs().max() > 1e-5, stop


@pytest.mark.parametrize("kl", ["mean_to_scale", "scale_to_mean"])
def test_a_detached_mean_gives_no_gradient(kl):
    logits = pyramid()
    for scale in (0, 2):
        expected = gradient_of_rewritten(scale, logits, kl, ("mean",))
        torch.testing.assert_close(autograd(scale, logits, kl=kl, detach_mean=True), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("kl", ["mean_to_scale", "scale_to_mean"])
def test_extreme_logits_have_finite_losses_and_gradients(kl, regions):
    """exp(-200) is 0 in float32, so that log(softmax) would be infinite."""
    logits = [(100 * x).requires_grad_() for x in pyramid()]
    loss = consistency(logits, kl, regions=regions)
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in logits)


def test_autocast_does_not_reach_the_loss():
    logits = pyramid(dtype=torch.bfloat16)
    plain = consistency(logits, CODES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = consistency(logits, CODES)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(plain, under_autocast)
    torch.testing.assert_close(plain, consistency([x.float() for x in logits], CODES))


def test_one_scale_is_refused():
    with pytest.raises(ValueError, match="needs two"):
        consistency(pyramid()[:1], CODES)


def test_nothing_waits_for_a_value():
    with FakeTensorMode():
        logits = [torch.randn(2, 3, n, n, requires_grad=True) for n in (8, 4)]
        consistency(logits, CODES).backward()
