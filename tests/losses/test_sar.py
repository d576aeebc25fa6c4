"""SAR against the paper's numbers."""

from __future__ import annotations

import pytest
import torch

from nnunet_ssl.losses.branches import Branches
from nnunet_ssl.losses.sar import reweight, true_class_confidence


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_figure_4_of_the_paper():
    """Both pixels, with and without SAR."""
    low = torch.tensor([[0.8, 0.3], [0.2, 0.7]])[None, :, :, None]  # [B, K, 2 pixels, 1]
    high = torch.tensor([[0.7, 0.4], [0.3, 0.6]])[None, :, :, None]
    conf_low = torch.tensor([0.2, 0.3])[None, :, None]
    conf_high = torch.tensor([0.3, 0.4])[None, :, None]
    prob, confidence = Branches(high=high, low=low), Branches(high=conf_high, low=conf_low)
    fused = reweight(prob, confidence, alpha=0.5)
    torch.testing.assert_close(fused[0, :, :, 0], torch.tensor([[1.685, 0.825], [0.565, 1.525]]))
    plain = reweight(prob, confidence, alpha=0.0)
    torch.testing.assert_close(plain[0, :, :, 0], torch.tensor([[1.5, 0.7], [0.5, 1.3]]))


def test_the_surer_branch_decides():
    prob = Branches(high=torch.tensor([[[0.4], [0.6]]]), low=torch.tensor([[[0.6], [0.4]]]))
    for conf_low, conf_high, winner in ((0.9, 0.1, 0), (0.1, 0.9, 1)):
        confidence = Branches(high=torch.tensor([[conf_high]]), low=torch.tensor([[conf_low]]))
        assert reweight(prob, confidence, 0.5).argmax(1).item() == winner


@pytest.mark.parametrize("num_classes", [3, 22])
@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 5)])
def test_many_classes_against_a_loop_over_voxels(num_classes, shape):
    low, high = torch.rand(2, 2, num_classes, *shape).softmax(2)
    conf_low, conf_high = torch.rand(2, 2, *shape)
    fused = reweight(Branches(high, low), Branches(conf_high, conf_low), 0.3)
    for b, k, *x in torch.cartesian_prod(*(torch.arange(n) for n in fused.shape)).tolist():
        at = (b, *x)
        wanted = (1 + 0.3 * conf_low[at]) * low[(b, k, *x)] + (1 + 0.3 * conf_high[at]) * high[(b, k, *x)]
        assert fused[(b, k, *x)] == pytest.approx(wanted.item(), abs=1e-6)


def test_two_classes_are_equation_7():
    prob = torch.rand(2, 2, 4, 5).softmax(1)
    truth = torch.randint(0, 2, (2, 4, 5))
    torch.testing.assert_close(
        true_class_confidence(prob, truth), prob[:, 0] * (truth == 0) + prob[:, 1] * (truth == 1)
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_confidence_of_the_true_class(dtype):
    prob = torch.rand(2, 4, 3, 4, 5).softmax(1)
    labels = torch.randint(0, 4, (2, 3, 4, 5))
    labels[0, 0], labels[1, 0] = 4, 255  # the ignore label, and a strange one
    confidence = true_class_confidence(prob, labels.to(dtype))
    assert confidence.dtype == torch.float32
    for at in torch.cartesian_prod(*(torch.arange(n) for n in labels.shape)).tolist():
        b, *x = at
        label = labels[tuple(at)].item()
        assert confidence[tuple(at)] == (prob[(b, label, *x)] if label < 4 else 0.5)


def test_a_negative_label_names_no_class():
    assert true_class_confidence(torch.tensor([[[0.9], [0.1]]]), torch.tensor([[-1]])).item() == 0.5


def test_half_precision_comes_out_as_float32():
    prob = torch.tensor([[[0.75], [0.25]]], dtype=torch.bfloat16)
    confidence = torch.full((1, 1), 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = reweight(Branches(prob, prob), Branches(confidence, confidence), 0.5)
        true = true_class_confidence(prob, torch.zeros(1, 1, dtype=torch.int16))
    assert fused.dtype == true.dtype == torch.float32
    assert fused[0, 0, 0].item() == pytest.approx(2 * 1.15 * 0.75, abs=1e-6)
    assert true.item() == 0.75
