import torch

from nnunet_ssl.losses.class_counts import class_counts


def test_it_counts_what_bincount_counts():
    labels = torch.randint(0, 14, (2, 1, 20, 20, 20), dtype=torch.int16)
    counts = class_counts(labels, 14)
    assert counts.dtype == torch.float32
    assert counts.tolist() == torch.bincount(labels.flatten().long(), minlength=14).tolist()


def test_absent_classes_have_none_and_other_values_are_not_counted():
    labels = torch.tensor([0] * 6 + [2] * 3 + [3] + [-1, 9])
    assert class_counts(labels, 5).tolist() == [6, 0, 3, 1, 0]


def test_voxels_that_are_not_valid_are_not_counted():
    labels = torch.tensor([[0, 0, 1], [2, 2, 2]])
    valid = torch.tensor([[True, False, False], [True, True, False]])
    assert class_counts(labels, 3, valid).tolist() == [1, 0, 2]
    assert class_counts(labels, 3, torch.zeros_like(valid)).tolist() == [0, 0, 0]
