"""Public images that nobody took: patches of gratings, drawn by a fixed seed, for training before private training.

They hold nothing of anyone, so weights trained on them without privacy cost no ε. A class is an orientation and a
wavelength; position, size, phase and the two colors of the patch, and a second grating behind it, are random.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from dpopt.data.datasets import DataSpec, Loaded, normalization
from dpopt.data.sources import TensorSource
from dpopt.rng import RandomKey

_WAVELENGTHS = (3.0, 5.0, 8.0)  # pixels of 32
_AT_ONCE = 2000
_MEAN, _STD = 0.5, 0.25


def procedural(
    train_size: int = 50_000,
    test_size: int = 2000,
    channels: int = 3,
    image_size: int = 32,
    orientations: int = 4,
    seed: int = 0,
) -> DataSpec:
    """Patches of gratings in `orientations` directions and three wavelengths: 12 classes by default; no file needed.

    Args:
        train_size: number of training images.
        test_size: number of test images.
        channels: 3 for color, 1 for grey.
        image_size: pixels.
        orientations: number of directions.
        seed: of all images; it makes another public dataset, too.
    """
    if min(train_size, test_size, image_size) < 1 or channels not in (1, 3) or orientations < 2:
        raise ValueError("dataset=procedural needs sizes of at least 1, 1 or 3 channels, and 2 or more orientations")

    def load(data_dir: Path, device: torch.device, workers: int) -> Loaded:
        key = RandomKey.from_seed(seed, "procedural")

        def part(name: str, count: int) -> TensorSource:
            draws = key.uniform(count * 16, name).view(count, 16)
            labels = (draws[:, 0] * orientations * len(_WAVELENGTHS)).long()
            pieces = zip(draws.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True)
            images = torch.cat([_draw(u, y, channels, image_size, orientations) for u, y in pieces])
            return TensorSource(images.to(device), labels.to(device), (_MEAN,) * channels, (_STD,) * channels)

        return part("train", train_size), part("test", test_size)

    constants = normalization((_MEAN,) * channels, (_STD,) * channels, "fixed")
    name, classes = f"procedural{seed or ''}", orientations * len(_WAVELENGTHS)
    shape = (channels, image_size, image_size)
    unit = "none to protect: the images are drawn by a program"
    return DataSpec(name, train_size, classes, shape, load, constants, collection="", unit=unit)


def _draw(u: Tensor, labels: Tensor, channels: int, size: int, orientations: int) -> Tensor:
    """Images (n, channels, size, size) as uint8, from uniform draws (n, 16)."""
    u = u.float()[:, :, None, None]
    at = torch.arange(size).float() / size * 32  # in pixels of 32
    y, x = at[:, None], at[None, :]
    wavelengths = torch.tensor(_WAVELENGTHS)[labels % len(_WAVELENGTHS)][:, None, None]
    turn = (labels // len(_WAVELENGTHS))[:, None, None] + 0.5 * (u[:, 1] - 0.5)
    front = _wave(x, y, math.pi * turn / orientations, wavelengths, u[:, 2])
    back = _wave(x, y, math.pi * u[:, 3], 4 + 20 * u[:, 4], u[:, 5])
    distance = (x - 8 - 16 * u[:, 6]).square() + (y - 8 - 16 * u[:, 7]).square()
    window = torch.exp(-distance / (2 * (4 + 6 * u[:, 8]).square()))[:, None]
    first, second = u[:, 9 : 9 + channels], u[:, 12 : 12 + channels]
    grating = first + (second - first) * front[:, None]
    behind = 0.5 + 0.5 * (u[:, 15:16] - 0.5) * (2 * back[:, None] - 1)
    return ((window * grating + (1 - window) * behind) * 255).round().clamp(0, 255).to(torch.uint8)


def _wave(x: Tensor, y: Tensor, angle: Tensor, wavelength: Tensor, phase: Tensor) -> Tensor:
    """Draw a grating, between 0 and 1."""
    along = x * angle.cos() + y * angle.sin()
    return 0.5 + 0.5 * torch.sin(2 * math.pi * (along / wavelength + phase))
