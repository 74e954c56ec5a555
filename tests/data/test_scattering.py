"""Scattering features against a literal transcription in NumPy; what is invariant must be."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dpopt.data.scattering import mirrored_channels, scatter, scattering_channels


def literal(image: np.ndarray, orientations: int) -> np.ndarray:
    """J = 2 features of one channel, in space: circular sums with sampled kernels, on the reflected image."""
    size, margin = image.shape[0], 4
    x = np.pad(image, margin, mode="reflect")

    def kernel(scale: int, direction: int, step: int) -> np.ndarray:
        side = len(x) // step
        sigma, xi, slant = 0.8 * 2**scale, 3 * math.pi / 4 / 2**scale, 4 / orientations
        angle = math.pi * (orientations // 2 - 1 - direction) / orientations
        wave, bump = np.zeros((len(x), len(x)), complex), np.zeros((len(x), len(x)))
        for r in range(-2 * len(x), 2 * len(x)):
            for c in range(-2 * len(x), 2 * len(x)):
                u, v = r * math.cos(angle) + c * math.sin(angle), c * math.cos(angle) - r * math.sin(angle)
                g = math.exp(-(u**2 + slant**2 * v**2) / 2 / sigma**2) * slant / (2 * math.pi * sigma**2)
                bump[r % len(x), c % len(x)] += g
                wave[r % len(x), c % len(x)] += g * np.exp(1j * xi * u)
        psi = wave - bump * wave.sum() / bump.sum()
        assert side == len(psi[::step])
        return psi[::step, ::step] * step**2

    def convolve(u: np.ndarray, k: np.ndarray) -> np.ndarray:
        out = np.zeros(u.shape, complex)
        for r in range(len(u)):
            for c in range(len(u)):
                out += k[r, c] * np.roll(u, (r, c), (0, 1))
        return out

    def average(u: np.ndarray, step: int) -> np.ndarray:
        phi = np.zeros(u.shape)
        for r in range(-3 * len(u), 3 * len(u)):
            for c in range(-3 * len(u), 3 * len(u)):
                squared = (r * step) ** 2 + (c * step) ** 2
                phi[r % len(u), c % len(u)] += step**2 * math.exp(-squared / 2 / 1.6**2) / (2 * math.pi * 1.6**2)
        kept = convolve(u, phi).real[:: 4 // step, :: 4 // step]
        return kept[1 : 1 + size // 4, 1 : 1 + size // 4]

    first = [[np.abs(convolve(x, kernel(j, t, 1)))[:: 2**j, :: 2**j] for t in range(orientations)] for j in (0, 1)]
    maps = [average(x, 1), *(average(u, 2**j) for j in (0, 1) for u in first[j])]
    for u in first[0]:
        maps += [average(np.abs(convolve(u, kernel(1, t, 1)))[::2, ::2], 2) for t in range(orientations)]
    return np.stack(maps)


def test_scattering_is_its_definition() -> None:
    images = torch.randn(2, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features = scatter(images, orientations=2)
    assert features.shape == (2, scattering_channels(2, orientations=2), 2, 2) == (2, 2 * 9, 2, 2)
    for image, found in zip(images, features, strict=True):
        expected = np.concatenate([literal(channel.numpy(), 2) for channel in image])
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-9)


def test_constant_images_have_no_waves_and_shifts_hardly_matter() -> None:
    constant = scatter(torch.full((1, 3, 32, 32), 2.5))
    assert constant.shape == (1, 243, 8, 8)
    averages = constant.view(3, 81, 8, 8)
    torch.testing.assert_close(averages[:, 0], torch.full((3, 8, 8), 2.5), rtol=1e-4, atol=1e-4)
    assert float(averages[:, 1:].abs().max()) < 1e-4
    smooth = F.avg_pool2d(torch.randn(1, 1, 36, 37, generator=torch.Generator().manual_seed(0)), 5, 1)
    one, two = scatter(smooth[..., :32]), scatter(smooth[..., 1:33])
    pixels = float((smooth[..., :32] - smooth[..., 1:33]).norm() / smooth[..., :32].norm())
    assert float((one - two).norm() / one.norm()) < 0.6 * pixels


@pytest.mark.parametrize(("scales", "orientations"), [(2, 8), (3, 3)])
def test_maps_of_a_mirror_image_are_mirrored_maps_in_another_order(scales: int, orientations: int) -> None:
    images = torch.randn(2, 2, 96, 96, generator=torch.Generator().manual_seed(0))
    mirror = images.flip(3).roll(1 - 2**scales, 3)
    order = mirrored_channels(2, scales, orientations)
    maps, expected = (scatter(x, scales, orientations) for x in (images, mirror))
    inner = slice(4, -4)  # away from the border, where the shift by 2^J − 1 pixels brings other pixels in
    torch.testing.assert_close(maps.flip(3)[:, order][..., inner], expected[..., inner], rtol=1e-3, atol=1e-3)
    assert sorted(order) == list(range(maps.shape[1]))
    assert [order[at] for at in order] == list(range(maps.shape[1]))


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        scatter(torch.zeros(1, 3, 30, 32))
