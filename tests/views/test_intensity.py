"""Each change of intensity against batchgeneratorsv2's or scipy's, image by image, on equal draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.intensity.brightness import BrightnessAdditiveTransform
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from scipy.ndimage import gaussian_filter1d

from nnunet_ssl.views import intensity

SHAPES = [(2, 1, 18, 20), (3, 2, 10, 12, 14)]


def drawn(shape, low, high):
    """Images, and a number for each of their channels."""
    rng = np.random.default_rng(0)
    images = rng.normal(0.3, 1.5, shape).astype(np.float32)
    return torch.from_numpy(images), torch.from_numpy(rng.uniform(low, high, shape[:2]).astype(np.float32))


def by_oracle(transform, images, **parameters):
    """What batchgeneratorsv2 makes of each image, told what it would draw: ``[B, C]`` each."""
    return torch.stack(
        [
            transform._apply_to_image(
                image.clone(),
                apply_to_channel=torch.arange(len(image)),
                **{name: values[b] for name, values in parameters.items()},
            )
            for b, image in enumerate(images)
        ]
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_brightness(shape):
    images, shift = drawn(shape, -1, 1)
    expected = by_oracle(BrightnessAdditiveTransform(0, 1), images, shift=shift * images.flatten(2).std(2))
    torch.testing.assert_close(intensity.brightness(images, shift), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_contrast(shape):
    images, factor = drawn(shape, 0.5, 1.5)
    expected = by_oracle(ContrastTransform((1, 1), True, False), images, multipliers=factor)
    torch.testing.assert_close(intensity.contrast(images, factor), expected)
    assert (factor > 1).any()  # where the range is left, and clipped


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inverted", [False, True])
def test_gamma(shape, inverted):
    images, exponent = drawn(shape, 0.6, 1.6)
    flags = {"retain_stats": torch.ones(shape[:2]), "invert_image": torch.full(shape[:2], inverted)}
    expected = by_oracle(GammaTransform((1, 1), 0, False, 1, 1), images, gamma=exponent, **flags)
    sign = torch.full(shape[:2], -1.0 if inverted else 1.0)
    torch.testing.assert_close(intensity.gamma(images, exponent, sign), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axes", [None, (1,)])
def test_blur(shape, axes):
    images, sigma = drawn(shape, 0.3, 2.0)
    sigma[0, 0] = 0
    blurred = intensity.blur(images, sigma, 4, axes)
    for b in range(shape[0]):
        for c in range(shape[1]):
            expected = images[b, c].numpy()
            for axis in (range(expected.ndim) if axes is None else axes) if sigma[b, c] else ():
                expected = gaussian_filter1d(expected, sigma[b, c].item(), axis, mode="mirror", radius=4)
            np.testing.assert_allclose(blurred[b, c], expected, rtol=1e-4, atol=1e-5)


def test_blur_of_an_axis_that_is_shorter_than_the_kernel():
    images, sigma = drawn((1, 1, 2, 9, 9), 1, 1)
    blurred = intensity.blur(images, sigma, 4)
    assert blurred.isfinite().all()
    assert blurred.std() < images.std()


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_has_its_deviation(shape):
    shape = (*shape[:2], *(4 * n for n in shape[2:]))
    images, sigma = drawn(shape, 0.1, 0.3)
    torch.manual_seed(0)
    added = (intensity.noise(images, sigma) - images).flatten(2)
    torch.testing.assert_close(added.std(2), sigma, rtol=0.05, atol=0)
    assert (added.mean(2).abs() < 0.01).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axes", [None, (0, 1)])
def test_low_resolution(shape, axes):
    images, scale = drawn(shape, 0.5, 0.9)
    scale[0, 0] = 1
    ignored = None if axes is None or len(shape) == 4 else (2,)
    transform = SimulateLowResolutionTransform(1, False, True, ignored)
    scales = scale[..., None].repeat(1, 1, len(shape) - 2)
    if ignored:
        scales[..., 2] = 1
    expected = by_oracle(transform, images, scales=scales)
    before = images.clone()
    torch.testing.assert_close(intensity.low_resolution(images, scale.numpy(), axes), expected)
    assert torch.equal(images, before)


def test_a_constant_image_stays():
    images, one = torch.full((1, 1, 8, 8), 3.0), torch.ones(1, 1)
    for changed in (
        intensity.brightness(images, one),
        intensity.contrast(images, 2 * one),
        intensity.gamma(images, 2 * one, -one),
        intensity.blur(images, one, 2),
    ):
        torch.testing.assert_close(changed, images)
