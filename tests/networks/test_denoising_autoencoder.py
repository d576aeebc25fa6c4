"""The autoencoder takes any patch, has no way around its code, and undoes errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnunet_ssl.losses.squared_dice import squared_dice_loss
from nnunet_ssl.networks.denoising_autoencoder import CODE, DenoisingAutoencoder


@pytest.mark.parametrize("size", [(16, 24), (4, 32, 20), (14, 7, 16)])
def test_it_gives_masks_of_the_patch_through_its_code(size):
    torch.manual_seed(0)
    autoencoder = DenoisingAutoencoder(3, size)
    masks = (torch.rand(2, 3, *size) > 0.5).float()
    codes = []
    autoencoder.code[1].register_forward_hook(lambda _, __, code: codes.append(code.shape))
    assert autoencoder(masks).shape == masks.shape
    assert codes == [(2, CODE)]
    nn.init.zeros_(autoencoder.code[-1].weight)
    a, b = autoencoder.eval()(masks)
    assert torch.equal(a, b)


def test_no_axis_of_an_even_number_of_voxels_above_six_is_left():
    assert DenoisingAutoencoder(2, (64, 96)).up[0].unflattened_size == (256, 4, 6)
    assert DenoisingAutoencoder(2, (14, 7, 40)).up[0].unflattened_size == (128, 7, 7, 5)


def test_it_learns_to_undo_errors_by_nnunets_rule():
    """Discs anywhere, of which a tenth of the voxels is wrong; after a few steps it says them better than that."""
    torch.manual_seed(0)
    axis, autoencoder = torch.arange(16), DenoisingAutoencoder(1, (16, 16))
    sgd = torch.optim.SGD(autoencoder.parameters(), 0.01, momentum=0.99, nesterov=True)
    for _ in range(80):
        y, x = torch.randint(5, 11, (2, 16, 1))
        discs = ((axis[:, None] - y[..., None]) ** 2 + (axis - x[:, None]) ** 2 < 16)[:, None]
        given = discs ^ (torch.rand(discs.shape) < 0.1)
        logits = autoencoder(given.float())
        sgd.zero_grad()
        (F.mse_loss(logits.sigmoid(), discs.float()) + squared_dice_loss(logits, discs, regions=True)).backward()
        sgd.step()
    assert ((logits > 0) != discs).float().mean() < 0.5 * (given != discs).float().mean()
