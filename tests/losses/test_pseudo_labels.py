import pytest
import torch

from nnunet_ssl.losses.pseudo_labels import (
    cross_entropy_map,
    hard_pseudo_labels,
    labels_and_confidence,
    likeliest_class,
    pseudo_label_cross_entropy,
)


@pytest.mark.parametrize("spatial", [(5, 4), (4, 3, 5)])
def test_classes_are_the_argmax_and_the_cross_entropy_is_the_mean_over_voxels(spatial):
    logits = torch.randn(2, 4, *spatial)
    labels = hard_pseudo_labels(logits)
    assert labels.shape == (2, 1, *spatial)
    flat = logits.movedim(1, -1).reshape(-1, 4)
    assert torch.equal(labels.flatten(), torch.tensor([row.tolist().index(row.max().item()) for row in flat]))
    by_hand = torch.stack([row.logsumexp(0) - row.max() for row in flat]).mean()
    torch.testing.assert_close(pseudo_label_cross_entropy(logits, labels), by_hand)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_likeliest_class_is_the_argmax_with_ties_and_nan(dtype):
    torch.manual_seed(0)
    scores = torch.randint(0, 3, (2, 5, 7, 11, 13)).to(dtype)  # most voxels have several largest scores
    scores[torch.rand(scores.shape) < 0.1] = torch.nan
    scores[torch.rand(scores.shape) < 0.1] = -torch.inf
    for x in (scores, scores[:, :1], scores.movedim(-1, 1), scores[..., ::2]):
        assert torch.equal(likeliest_class(x), x.argmax(1, keepdim=True))


def test_regions_overlap_and_ignore_nothing():
    logits = torch.tensor([[[[2.0, -1.0]], [[3.0, 0.5]]]])  # [1, 2 regions, 1, 2]
    labels = hard_pseudo_labels(logits, has_regions=True, has_ignore_label=True)
    assert labels[0, :, 0].tolist() == [[True, False], [True, True], [False, False]]
    by_hand = torch.nn.functional.softplus(-logits.abs()).mean()  # each channel agrees with its own decision
    torch.testing.assert_close(pseudo_label_cross_entropy(logits, labels, has_regions=True), by_hand)


def test_no_gradient_reaches_the_network_that_labels():
    teacher, student = torch.randn(1, 3, 4, 4, requires_grad=True), torch.randn(1, 3, 4, 4, requires_grad=True)
    pseudo_label_cross_entropy(student, hard_pseudo_labels(teacher)).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_cross_entropy_is_in_fp32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = torch.randn(1, 3, 4, 4, dtype=torch.bfloat16)
        assert pseudo_label_cross_entropy(logits, hard_pseudo_labels(logits)).dtype == torch.float32


@pytest.mark.parametrize("regions", [False, True])
def test_confidence_is_the_probability_of_what_was_decided(regions):
    logits = torch.randn(2, 3, 4, 5)
    prob = logits.sigmoid() if regions else logits.softmax(1)
    labels, confidence = labels_and_confidence(prob, regions)
    assert torch.equal(labels, hard_pseudo_labels(logits, regions))
    expected = torch.where(labels, prob, 1 - prob) if regions else prob.gather(1, labels.long())
    assert torch.equal(confidence, expected)


@pytest.mark.parametrize("regions", [False, True])
def test_the_mean_of_the_map_is_the_cross_entropy(regions):
    logits = torch.randn(2, 3, 4, 5)
    labels = hard_pseudo_labels(torch.randn(2, 3, 4, 5), regions)
    per_voxel = cross_entropy_map(logits.bfloat16(), labels, regions)
    assert per_voxel.shape == labels.shape
    assert per_voxel.dtype == torch.float32
    mean = cross_entropy_map(logits, labels, regions).mean()
    torch.testing.assert_close(mean, pseudo_label_cross_entropy(logits, labels, regions))
