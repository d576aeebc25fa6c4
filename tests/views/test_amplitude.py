"""Mixed amplitudes against numpy's whole spectrum, shifted and cut as the authors do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_ssl.views import amplitude
from nnunet_ssl.views.amplitude import amplitude_mixed


def by_numpy(image, style, share, band):
    least = min(image.min(), style.min())
    return within(image - least, style - least, share, band) + least


def within(image, style, share, band):
    """Of images from 0, as the authors' are."""
    mixed = within_unclipped(image, style, share, band)
    return mixed.clip(min(image.min(), style.min()), max(image.max(), style.max()))


def within_unclipped(image, style, share, band):
    spectrum, of_style = (np.fft.fftshift(np.fft.fftn(x)) for x in (image, style))
    size, phase = np.abs(spectrum), np.angle(spectrum)
    window = tuple(slice(n // 2 - int(band * n), n // 2 + int(band * n) + 1) for n in image.shape)
    size[window] = (1 - share) * size[window] + share * np.abs(of_style)[window]
    return np.fft.ifftn(np.fft.ifftshift(size * np.exp(1j * phase))).real


@pytest.mark.parametrize("band", [0.01, 0.1])
@pytest.mark.parametrize("spatial", [(24, 31), (16, 10, 21)])
def test_each_channel(monkeypatch, spatial, band):
    monkeypatch.setattr(amplitude, "BAND", band)
    torch.manual_seed(0)
    images, styles = torch.randn(2, 2, *spatial), 2 * torch.randn(2, 2, *spatial) + 1
    share = torch.tensor([0.3, 1.0])
    mixed = amplitude_mixed(images, styles, share)
    for b, c in np.ndindex(2, 2):
        expected = by_numpy(images[b, c].double().numpy(), styles[b, c].double().numpy(), share[b].item(), band)
        np.testing.assert_allclose(mixed[b, c], expected, atol=1e-5)
    assert not torch.allclose(mixed, images)


def test_the_mean_goes_to_the_styles_though_their_signs_differ():
    torch.manual_seed(0)
    image, style = torch.rand(2, 1, 16, 16) - 1, torch.rand(2, 1, 16, 16)
    share = torch.tensor([0.5, 1.0])
    means = amplitude_mixed(image, style, share).mean((1, 2, 3))
    expected = torch.lerp(image.mean((1, 2, 3)), style.mean((1, 2, 3)), share)
    torch.testing.assert_close(means, expected, atol=0.03, rtol=0)


def test_no_share_no_change():
    images = torch.randn(1, 1, 12, 13)
    torch.testing.assert_close(amplitude_mixed(images, images + 5, torch.zeros(1)), images, atol=1e-5, rtol=0)


def test_half_precision_is_transformed_in_single():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert amplitude_mixed(torch.randn(1, 1, 8, 8), torch.randn(1, 1, 8, 8), torch.ones(1)).dtype == torch.float32


def test_the_range_of_both_images_is_kept(monkeypatch):
    monkeypatch.setattr(amplitude, "BAND", 0.3)
    torch.manual_seed(0)
    image, style = (torch.rand(2, 1, 1, 16, 16) > 0.5).float()
    mixed = amplitude_mixed(image, style, torch.ones(1))
    unclipped = within_unclipped(image[0, 0].numpy(), style[0, 0].numpy(), 1.0, 0.3)
    assert unclipped.min() < 0 or unclipped.max() > 1  # or nothing is shown
    assert mixed.min() >= 0
    assert mixed.max() <= 1
