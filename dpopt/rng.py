"""Keyed random streams: every draw is a pure function of (key, labels), so resuming needs the step number only.

The words of a stream are the AES-256 keystream in counter mode under the key SHAKE-256(key ‖ labels): a cryptographic
generator, and on processors with AES instructions a faster one than Philox or Mersenne Twister. What decides how far
the draws can be trusted is therefore the key alone: derived from a seed it gives reproducible research randomness
(whoever knows the seed knows the noise); taken from the operating system it gives secret randomness that still replays
after a crash. Uniforms have 53 bits. Gaussians are Box–Muller transforms of pairs of 32-bit uniforms in float32, at
most 6.8 standard deviations from zero, where one draw in 10¹¹ would be beyond.
"""

import hashlib
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

_CHUNK = 1 << 17  # Gaussians at a time: they stay in the cache of one core


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
        return np.frombuffer(self._keystream(*labels).update(bytes(8 * count)), dtype="<u8")

    def seed(self, *labels: str | int) -> int:
        """A 63-bit seed for somebody else's generator (model initialisation, torchvision's transforms)."""
        return int(self.words(1, *labels)[0] >> 1)

    def uniform(self, count: int, *labels: str | int) -> torch.Tensor:
        """Uniform draws in [0, 1) with 53 bits, float64 of shape (count,)."""
        return torch.from_numpy((self.words(count, *labels) >> np.uint64(11)) * 2.0**-53)

    def gaussians(self, count: int, *labels: str | int) -> Iterator[torch.Tensor]:
        """Standard Gaussian draws in consecutive pieces, `count` in all, float32.

        A piece is overwritten by the next. Draw i depends on the stream and on i, not on `count`.
        """
        stream, zeros = self._keystream(*labels), bytes(4 * _CHUNK)
        raw = np.empty(4 * _CHUNK + 16, np.uint8)  # the cipher asks for room for one block more
        words = torch.from_numpy(raw[: 4 * _CHUNK].view(np.uint32))
        half = _CHUNK // 2
        radius, angle, out = torch.empty(half), torch.empty(half), torch.empty(_CHUNK)
        for start in range(0, count, _CHUNK):
            stream.update_into(zeros, raw.data)
            # In float32 the largest words would round to a uniform of 1, and give no noise at all.
            radius.copy_(words[:half]).add_(0.5).mul_(2.0**-32 * (1 - 2.0**-24)).log_().mul_(-2).sqrt_()
            angle.copy_(words[half:].view(torch.int32)).add_(0.5).mul_(math.pi * 2.0**-31)  # in [−π, π], and not 0
            torch.cos(angle, out=out[:half]).mul_(radius)
            torch.sin(angle, out=out[half:]).mul_(radius)
            yield out[: count - start]

    def normal(self, count: int, *labels: str | int) -> torch.Tensor:
        """Standard Gaussian draws, float32 of shape (count,)."""
        return torch.cat([torch.empty(0), *(piece.clone() for piece in self.gaussians(count, *labels))])

    def _keystream(self, *labels: str | int) -> CipherContext:
        key = hashlib.shake_256(self.material + "\0".join(map(str, labels)).encode()).digest(32)
        return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
