import torch

from nnunet_ssl.losses.masked import masked_mean


def test_the_mean_is_over_what_the_mask_holds():
    values = torch.tensor([[1.0, torch.inf], [3.0, torch.nan]])
    assert masked_mean(values, torch.tensor([[True, False], [True, False]])) == 2


def test_an_empty_mask_gives_zero_and_zero_gradients():
    values = torch.ones(3, requires_grad=True)
    mean = masked_mean(values, torch.zeros(3, dtype=torch.bool))
    mean.backward()
    assert mean == 0
    assert values.grad.tolist() == [0, 0, 0]
