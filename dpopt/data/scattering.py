"""The scattering transform of images, to second order (Bruna & Mallat, 1203.1513): features that need no training.

With wavelets ψ_{j,θ} of scales 2^j, j < J, and L orientations, and a Gaussian φ_J of width 2^J, features are averages

    x ⋆ φ_J,    |x ⋆ ψ_{j,θ}| ⋆ φ_J,    ||x ⋆ ψ_{j,θ}| ⋆ ψ_{j',θ'}| ⋆ φ_J    for j < j',

taken every 2^J pixels: 1 + JL + L²J(J−1)/2 maps per color. With J = 2, L = 8, each example normalized over groups of
channels, and a linear classifier they are the strongest small private model on CIFAR-10 (Tramèr & Boneh, 2011.11660).
Convolutions are products in the Fourier domain, on images that are continued by reflection; what a wavelet has made
smooth is kept at the resolution that it needs, by folding its spectrum. Averages are separable: two matrix products.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

VERSION = 1  # of the features; raised when their numbers change, so that files of older ones are not taken for them


def scattering_channels(channels: int, scales: int = 2, orientations: int = 8) -> int:
    """Count the feature maps of an image with so many channels."""
    paths = 1 + scales * orientations + orientations**2 * scales * (scales - 1) // 2
    return channels * paths


def mirrored_channels(channels: int, scales: int = 2, orientations: int = 8) -> list[int]:
    """For each feature map of an image, the number of the one that it becomes in the mirror image.

    A wavelet at the angle α turns into that at π − α. The maps themselves are mirrored about the middle of their grid,
    which keeps every 2^J-th pixel: that is the mirror image, shifted by 2^J − 1 pixels.
    """
    turned = [(2 * (orientations // 2 - 1) - direction) % orientations for direction in range(orientations)]
    paths = [0]
    for _ in range(scales):
        paths += [len(paths) + direction for direction in turned]
    for _ in range(scales * (scales - 1) // 2):
        paths += [len(paths) + first * orientations + second for first in turned for second in turned]
    return [color * len(paths) + path for color in range(channels) for path in paths]


def scatter(images: Tensor, scales: int = 2, orientations: int = 8) -> Tensor:
    """Compute the scattering features of images.

    Args:
        images: (N, C, H, W), floating point, H and W multiples of 2^scales.
        scales: J, the number of scales of wavelets.
        orientations: L, the number of their directions.

    Returns:
        (N, C·(1 + JL + L²J(J−1)/2), H/2^J, W/2^J), the features of a color one after the other: averages, first order
        by scale, second order.

    Raises:
        ValueError: when the sides of the images are no multiples of 2^scales, or less than that.
    """
    height, width = images.shape[-2:]
    margin = 2**scales
    if height % margin or width % margin or min(height, width) <= margin:
        raise ValueError(
            f"images of {height}×{width} cannot be scattered: the sides must be larger multiples of {margin}"
        )
    x = F.pad(images.flatten(0, 1).unsqueeze(1), (margin,) * 4, mode="reflect").squeeze(1)
    size = (height + 2 * margin, width + 2 * margin)
    filters = [wavelets(size, scale, orientations).to(x) for scale in range(scales)]
    average = [
        tuple(averaging(side, margin, scales, 2**scale).to(x) for side in (height, width)) for scale in range(scales)
    ]

    def low(u: Tensor, scale: int) -> Tensor:
        rows, columns = average[scale]
        return rows @ u @ columns.T

    zeroth = [low(x, 0).unsqueeze(1)]
    first, second = [], []
    spectrum = torch.fft.fft2(x)
    for scale, bank in enumerate(filters):
        u = _modulus(spectrum.unsqueeze(1), bank, 2**scale)  # (N·C, L, H', W')
        first.append(low(u, scale))
        paths = torch.fft.fft2(u).split(1, 1) if scale + 1 < scales else ()
        for coarser in range(scale + 1, scales):
            bank = fold(filters[coarser], 2**scale)  # on the grid of u: a sum, because its pixels are larger
            for path in paths:
                second.append(low(_modulus(path, bank, 2 ** (coarser - scale)), coarser))
    maps = torch.cat([*zeroth, *first, *second], 1)
    return maps.view(len(images), -1, *maps.shape[-2:])


@lru_cache(maxsize=8)
def wavelets(size: tuple[int, int], scale: int, orientations: int) -> Tensor:
    """Spectra of the Morlet wavelets of a scale on a periodic grid, (L, *size), real.

    ψ(u) = (e^{iξ·u} − κ)·e^{−uᵀΣ⁻¹u/2}/(2π√|Σ|), with |ξ| = 3π/4·2^{−j}, σ = .8·2^j along ξ, σ·L/4 across, and κ such
    that the mean vanishes.
    """
    sigma, frequency, slant = 0.8 * 2**scale, 3 * math.pi / 4 / 2**scale, 4 / orientations
    rows, columns = (torch.arange(-2 * n, 2 * n, dtype=torch.float64) for n in size)
    banks = []
    for direction in range(orientations):
        angle = math.pi * (orientations // 2 - 1 - direction) / orientations
        along = rows[:, None] * math.cos(angle) + columns * math.sin(angle)
        across = columns * math.cos(angle) - rows[:, None] * math.sin(angle)
        envelope = torch.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2)) * slant / (2 * math.pi * sigma**2)
        wave = envelope * torch.exp(1j * frequency * along)
        envelope, wave = (_periodic(field, size) for field in (envelope, wave))
        wave = wave - envelope * (wave.sum() / envelope.sum())
        banks.append(torch.fft.fft2(wave).real)
    return torch.stack(banks)


def averaging(side: int, margin: int, scales: int, step: int) -> Tensor:
    """Build the matrix (side/2^J, padded/step) that averages with φ_J.

    It keeps every 2^J-th pixel of the unpadded side.

    Args:
        side: pixels before padding.
        margin: pixels of padding at either end.
        scales: J; φ_J is a Gaussian of σ = .8·2^(J−1).
        step: spacing of the pixels that are averaged.
    """
    padded = side + 2 * margin
    sigma = 0.8 * 2 ** (scales - 1)
    at = torch.arange(margin, margin + side, 2**scales, dtype=torch.float64)
    grid = torch.arange(0, padded, step, dtype=torch.float64)
    distance = grid - at[:, None]
    images = torch.stack([distance + turn * padded for turn in (-2, -1, 0, 1, 2)])
    return step * torch.exp(-(images**2) / (2 * sigma**2)).sum(0) / (math.sqrt(2 * math.pi) * sigma)


def fold(spectrum: Tensor, step: int) -> Tensor:
    """step² times the spectrum of every `step`-th pixel in both directions: frequencies that coincide are added."""
    for axis in (-2, -1):
        parts = spectrum.chunk(step, axis)
        spectrum = sum(parts[1:], parts[0])
    return spectrum


def _modulus(spectrum: Tensor, bank: Tensor, step: int) -> Tensor:
    """Compute |image filtered by each of the bank| at every step-th pixel."""
    return torch.fft.ifft2(fold(spectrum * (bank / step**2), step)).abs()


def _periodic(field: Tensor, size: tuple[int, int]) -> Tensor:
    """Sum a field into one period, with the origin first.

    The field lies on −2n … 2n − 1 in both directions.
    """
    height, width = size
    return field.unflatten(1, (4, width)).unflatten(0, (4, height)).sum((0, 2))
