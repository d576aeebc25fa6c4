import math

import pytest
import torch

from nnunet_ssl.losses.shta import SHTALossSettings
from nnunet_ssl.networks.shta_branch import SHTABranch, token_stride

CAP = 262144


@pytest.mark.parametrize(
    ("patch", "spacing", "stride"),
    [
        ((96, 96, 96), (1, 1, 1), [3, 3, 3]),  # the paper's 32 x 32 x 32 tokens
        ((128, 128, 128), (1, 1, 1), [4, 4, 4]),
        ((40, 48, 40), (1, 1, 1), [4, 3, 4]),
        ((20, 28, 20), (2, 2, 2), [4, 4, 4]),
        ((16, 128, 128), (5, 1, 1), [1, 4, 4]),  # thick slices
        ((144, 128, 192), (1, 1, 1), [4, 4, 4]),
        ((512, 512), (0.8, 0.8), [4, 4]),
        ((192, 96), (0.8, 0.8), [4, 4]),
        ((7, 5, 11), (1, 1, 1), [1, 5, 1]),  # primes
    ],
)
def test_about_three_voxels_a_token(patch, spacing, stride):
    assert token_stride(patch, spacing, 2, CAP) == stride


@pytest.mark.parametrize(
    ("patch", "spacing", "batch"),
    [
        ((160, 256, 256), (1, 1, 1), 4),
        ((256, 256), (1, 1), 49),  # tokens of 8 x 4 pixels before
        ((256, 256), (1, 1), 99),
        ((512, 512), (0.8, 0.8), 24),
        ((320, 256), (0.7, 0.7), 60),
        ((128, 128, 128), (1, 1, 1), 12),
        ((28, 256, 224), (5, 1.25, 1.25), 12),
        ((16, 320, 320), (3.6, 0.6, 0.6), 8),
    ],
)
def test_a_capped_number_of_tokens_keeps_their_shape(patch, spacing, batch):
    uncapped = token_stride(patch, spacing, batch, 10**9)
    stride = token_stride(patch, spacing, batch, CAP)
    assert all(n % s == 0 for n, s in zip(patch, stride, strict=True))
    num_tokens = batch * math.prod(n // s for n, s in zip(patch, stride, strict=True))
    assert CAP / 2 ** len(patch) < num_tokens <= CAP  # no larger than need be
    in_plane = [s * mm for s, mm in zip(stride, spacing, strict=True)][-2:]
    assert max(in_plane) < 1.5 * min(in_plane)
    assert all(s >= u for s, u in zip(stride, uncapped, strict=True))


def test_what_no_stride_can_cap_is_one_token_a_sample():
    assert token_stride((7, 5, 11), (1, 1, 1), 100, 50) == [7, 5, 11]


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("spatial", [(8, 12), (4, 8, 12)])
def test_tokens_and_shares_are_aligned(spatial, ignored):
    """A feature that is the one-hot label map must be embedded token by token as the shares are counted.

    What it is where labels are ignored is no matter, and a token may be ignored as a whole.
    """
    stride = (4,) * len(spatial)
    labels = torch.randint(0, 3, (2, 1, *spatial))
    feature = torch.nn.functional.one_hot(labels[:, 0], 3).movedim(-1, 1).float()
    if ignored:
        nowhere = torch.rand(labels.shape) < ignored
        nowhere[..., :4, :4] = True
        feature = torch.where(nowhere, 100.0, feature)
        labels[nowhere] = 3
    branch = SHTABranch(3, stride, 3, 8, 3, ignore_label=3 if ignored else None)
    branch.embed = torch.nn.Identity()
    seen = {}
    branch.loss.register_forward_pre_hook(lambda _, inputs: seen.update(z=inputs[0], y=inputs[1]))
    branch(feature, labels)
    valid = seen["y"].sum(1) > 0
    torch.testing.assert_close(seen["z"][valid], seen["y"][valid])
    assert valid.sum() > 0
    assert bool(ignored) != bool(valid.all())


def test_under_autocast_everything_after_the_pooling_is_fp32():
    branch = SHTABranch(6, (2, 2, 2), 3, 8, 4)
    feature, labels = torch.randn(1, 6, 4, 4, 4).bfloat16(), torch.randint(0, 3, (1, 1, 4, 4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = branch(feature.requires_grad_(), labels)
    terms.total.backward()
    assert terms.total.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in branch.parameters())
    assert feature.grad.abs().sum() > 0


def test_every_loss_setting_reaches_the_loss():
    settings = SHTALossSettings(shta_temperature=0.3, shta_hard_ratio=0.2, shta_min_valid_fraction=0.75)
    branch = SHTABranch(6, (2, 2), 3, 8, 4, settings=settings)
    assert (branch.loss.settings, branch.loss.temperature, branch.min_valid_fraction) == (settings, 0.3, 0.75)
