"""Keyed random streams: every draw is a pure function of (key, labels), so resuming needs the step number only.

The words of a stream are SHAKE-256(key ‖ labels), a cryptographic generator. What decides how far the draws can be
trusted is therefore the key alone: derived from a seed it gives reproducible research randomness (whoever knows the
seed knows the noise); taken from the operating system it gives secret randomness that still replays after a crash.
Uniforms have 53 bits, Gaussians are Box–Muller transforms of two such uniforms in float64.
"""

import hashlib
import math
import secrets
from dataclasses import dataclass, field

import numpy as np
import torch

_CHUNK = 1 << 18  # Box–Muller pairs per hash call: bounds the temporaries to a few MB whatever the model size


@dataclass(frozen=True)
class RandomKey:
    """A 256-bit key from which named streams are drawn; `secure` says whether it came from the operating system."""

    material: bytes = field(repr=False)
    secure: bool = False
    released: list[int] = field(default_factory=lambda: [0], repr=False, compare=False)  # steps whose noise is out

    @classmethod
    def from_seed(cls, seed: int, *context: str) -> "RandomKey":
        """Derive a reproducible key from a seed and from what distinguishes this run from others of the same seed."""
        return cls(hashlib.shake_256("\0".join(("dpopt", str(seed), *context)).encode()).digest(32))

    @classmethod
    def from_os(cls) -> "RandomKey":
        """Draw a secret key from the operating system."""
        return cls(secrets.token_bytes(32), secure=True)

    def derive(self, *context: str) -> "RandomKey":
        """A key of its own for this context."""
        return RandomKey(hashlib.shake_256(self.material + "\0".join(context).encode()).digest(32), self.secure)

    def words(self, count: int, *labels: str | int) -> np.ndarray:
        """`count` uniform 64-bit words of the stream named by `labels`, as uint64 of shape (count,)."""
        message = self.material + "\0".join(map(str, labels)).encode()
        return np.frombuffer(hashlib.shake_256(message).digest(8 * count), dtype="<u8")

    def seed(self, *labels: str | int) -> int:
        """A 63-bit seed for somebody else's generator (model initialisation, torchvision's transforms)."""
        return int(self.words(1, *labels)[0] >> 1)

    def uniform(self, count: int, *labels: str | int) -> torch.Tensor:
        """Uniform draws in [0, 1) with 53 bits, float64 of shape (count,)."""
        return torch.from_numpy((self.words(count, *labels) >> np.uint64(11)) * 2.0**-53)

    def normal(self, count: int, *labels: str | int) -> torch.Tensor:
        """Standard Gaussian draws, float64 of shape (count,)."""
        out = torch.empty(count, dtype=torch.float64)
        for chunk, start in enumerate(range(0, count, 2 * _CHUNK)):
            piece = out[start : start + 2 * _CHUNK]
            half = (len(piece) + 1) // 2
            radius, angle = self.uniform(2 * half, *labels, chunk).split(half)
            radius = (-2 * torch.log1p(-radius)).sqrt_()
            angle = angle.mul_(2 * math.pi)
            piece[:half] = radius * angle.cos()
            piece[half:] = (radius * angle.sin_())[: len(piece) - half]
        return out
