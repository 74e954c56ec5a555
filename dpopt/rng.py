"""Keyed random streams: every draw is a pure function of (key, labels, position).

The words of a stream are the ChaCha20 keystream (Bernstein, 2008) under the key SHAKE-256(key ‖ labels), with a 64-bit
block counter from 0: a cryptographic generator of 32-bit additions, rotations and XORs, which a GPU runs as well as a
CPU, and whose block n is found without the blocks before it. How far the draws can be trusted is therefore decided by
the key alone. A key from the operating system gives secret randomness that still replays after a crash. A key derived
from a seed gives reproducible research randomness: whoever knows the seed knows the noise.

Uniform draws have 53 bits. Gaussian draws are sums of two Box–Muller transforms of half the variance, in chunks of
131,072 draws: a quarter of a chunk's words belongs to the first transform's radii, the next to its angles, then follow
those of the second; pair j gives draws j and 65,536 + j of the chunk. In float32 a transform takes two words of 32
bits, 40 bits for the radius and 24 for the angle; in float64 two words of 64 bits, 53 for each.

One transform would have gaps. In float32 its radius is never below 2⁻¹¹, the next radii are farther apart than what is
released is fine, and so are those above 6.4. Of a million pairs some lie there in a run, and whoever knows a sum that
puts them into a gap can rule it out. The sum of two has no gap up to 9 standard deviations, beyond which one pair in
10¹⁷ lies: what one cannot reach, the other fills (Holohan & Braghin, 2107.10138, add several draws for the same end).
"""

import hashlib
import math
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

CHUNK = 1 << 17  # Gaussian draws that are made together: they stay in the cache of one core
_HALF = CHUNK // 2
_BLOCK = 64  # bytes of a ChaCha20 block
_ALIGN = 1024  # pairs are made in multiples of so many, so that vector and remainder loops agree from call to call


@dataclass(frozen=True)
class RandomKey:
    """A 256-bit key from which named streams are drawn.

    Attributes:
        material: the key.
        secure: whether it came from the operating system. Such a key cannot be copied or pickled: two copies would draw
            the same noise, and the difference of two releases would be free of it.
        released: number of steps whose noise is out, and of statistics; shared by everything that uses this key.
        process: that made the key. A secure key draws nowhere else: a forked process would draw the same noise.
    """

    material: bytes = field(repr=False)
    secure: bool = False
    released: list[int] = field(default_factory=lambda: [0, 0], repr=False, compare=False)
    process: int = field(default_factory=os.getpid, repr=False, compare=False)

    @classmethod
    def from_seed(cls, seed: int, *context: str) -> "RandomKey":
        """Derive a reproducible key from a seed and from what distinguishes this run from others of the same seed."""
        return cls(hashlib.shake_256("\0".join(("dpopt", str(seed), *context)).encode()).digest(32))

    @classmethod
    def from_os(cls) -> "RandomKey":
        """Draw a secret key from the operating system."""
        return cls(secrets.token_bytes(32), secure=True)

    def derive(self, *context: str) -> "RandomKey":
        """Derive a key for this context."""
        self._check_process()
        return RandomKey(hashlib.shake_256(self.material + "\0".join(context).encode()).digest(32), self.secure)

    def for_workers(self, label: str) -> "RandomKey":
        """Derive a key that worker processes may receive: it draws what `label` names and no noise."""
        return RandomKey(self.derive("workers", label).material)

    def __reduce__(self) -> Any:
        if self.secure:
            self._refuse()
        return RandomKey, (self.material, self.secure, self.released)

    def __copy__(self) -> "RandomKey":
        return self._refuse() if self.secure else RandomKey(self.material, self.secure, self.released)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RandomKey":
        return self._refuse() if self.secure else RandomKey(self.material, self.secure, list(self.released))

    def _check_process(self) -> None:
        if self.secure and self.process != os.getpid():
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(
            "a secret key cannot be copied, pickled or used in another process, because two trainings would then share "
            "their noise: make a plan in each process with PrivacyPlan.calibrate"
        )

    def keystream(self, start: int, size: int, *labels: str | int) -> bytes:
        """Return `size` bytes of the stream named by `labels` from block `start` of 64 bytes on."""
        out = bytearray(size + _BLOCK)
        _Stream(self, labels).read_into(start, memoryview(out), size)
        return bytes(out[:size])

    def words(self, count: int, *labels: str | int) -> np.ndarray:
        """Draw `count` uniform 64-bit words, as uint64 of shape (count,)."""
        return np.frombuffer(self.keystream(0, 8 * count, *labels), dtype="<u8")

    def seed(self, *labels: str | int) -> int:
        """Draw a 63-bit seed for another generator (model initialization, torchvision's transforms)."""
        return int(self.words(1, *labels)[0] >> 1)

    def uniform(self, count: int, *labels: str | int) -> torch.Tensor:
        """Draw uniforms in [0, 1) with 53 bits, float64 of shape (count,)."""
        return torch.from_numpy((self.words(count, *labels) >> np.uint64(11)) * 2.0**-53)

    def gaussians(
        self, count: int, *labels: str | int, start: int = 0, dtype: torch.dtype = torch.float32, std: float = 1.0
    ) -> Iterator[torch.Tensor]:
        """Yield Gaussian draws `start`, …, `start + count − 1` of a stream in consecutive pieces.

        A piece is overwritten by the next. Draw i depends on the stream, the dtype and i, not on `start` or `count`.

        Args:
            count: number of draws.
            labels: of the stream.
            start: number of the first draw.
            dtype: float32 or float64; the two are independent streams.
            std: standard deviation, which costs nothing here.
        """
        make = _Float64Pairs if dtype == torch.float64 else _Float32Pairs
        pairs = make(_Stream(self, (*labels, str(dtype))), std)
        end = start + count
        for chunk in range(start // CHUNK, -(-end // CHUNK)):
            low, high = max(start - chunk * CHUNK, 0), min(end - chunk * CHUNK, CHUNK)
            yield pairs.draws(chunk, low, high)

    def normal(
        self, count: int, *labels: str | int, start: int = 0, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Draw standard Gaussians `start`, …, `start + count − 1` of a stream, of shape (count,)."""
        pieces = self.gaussians(count, *labels, start=start, dtype=dtype)
        return torch.cat([torch.empty(0, dtype=dtype), *(piece.clone() for piece in pieces)])


def stream_key(key: RandomKey, *labels: str | int) -> bytes:
    """Return the 256-bit ChaCha20 key of a stream."""
    key._check_process()
    return hashlib.shake_256(key.material + "\0".join(map(str, labels)).encode()).digest(32)


class _Stream:
    """The ChaCha20 keystream of a key and labels, read from any block on."""

    def __init__(self, key: RandomKey, labels: tuple[str | int, ...]) -> None:
        self.key = stream_key(key, *labels)
        self.zeros = bytes(1 << 16)

    def read_into(self, start: int, out: memoryview, size: int) -> None:
        """Write `size` bytes from block `start` on into `out`, which has room for a block more."""
        place = 0
        while place < size:
            # OpenSSL counts blocks in 32 bits; the upper half of our 64-bit counter is the word after it.
            counter = start + place // _BLOCK
            left = ((1 << 32) - counter % (1 << 32)) * _BLOCK
            part = min(size - place, left, len(self.zeros))
            if place == 0 or counter % (1 << 32) == 0:
                nonce = counter.to_bytes(8, "little") + bytes(8)
                cipher = Cipher(algorithms.ChaCha20(self.key, nonce), None).encryptor()
            cipher.update_into(memoryview(self.zeros)[:part], out[place : place + part + _BLOCK])
            place += part


class _Float32Pairs:
    """Gaussian draws of a chunk in float32, from words of 32 bits."""

    width, dtype, integers = 4, torch.float32, torch.int32
    radius_bits, angle_unit = 40, math.pi * 2.0**-23

    def __init__(self, stream: _Stream, std: float = 1.0) -> None:
        self.stream, self.factor = stream, -(std**2)  # radius² = factor·log(uniform), of half the variance
        size = self.width * _HALF + _BLOCK
        self.raw = [np.empty(size, np.uint8) for _ in range(2)]
        kind = np.int32 if self.width == 4 else np.int64
        self.first, self.second = (torch.from_numpy(r[: self.width * _HALF].view(kind)) for r in self.raw)
        self.work = torch.empty(_HALF, dtype=self.integers)
        self.radius, self.angle = (torch.empty(_HALF, dtype=self.dtype) for _ in range(2))
        self.out, self.wave = torch.empty(CHUNK, dtype=self.dtype), torch.empty(_HALF, dtype=self.dtype)
        # Added to what has been scaled: half a unit of the radius's uniform, and of the angle.
        self.half_radius = torch.tensor(0.5 * 2.0**-self.radius_bits, dtype=self.dtype)
        self.half_angle = torch.tensor(0.5 * self.angle_unit, dtype=self.dtype)

    def draws(self, chunk: int, low: int, high: int) -> torch.Tensor:
        """Return draws [low, high) of a chunk."""
        first, last = (0, _HALF) if low < _HALF < high else (low % _HALF, (high - 1) % _HALF + 1)
        first, last = first // _ALIGN * _ALIGN, min(_HALF, -(-last // _ALIGN) * _ALIGN)
        at, bytes_of = slice(first, last), self.width * (last - first)
        cosines, sines = self.out[at], self.out[_HALF + first : _HALF + last]
        for part in (0, 1):
            for raw, half in zip(self.raw, (0, 1), strict=True):
                block = (self.width * ((2 * chunk + part) * CHUNK + half * _HALF + first)) // _BLOCK
                self.stream.read_into(block, memoryview(raw)[self.width * first :], bytes_of)
            radius, angle = self.transform(at)
            for name, out, wanted in (("cos", cosines, low < _HALF), ("sin", sines, high > _HALF)):
                if wanted and part == 0:
                    self.apply(name, angle, out).mul_(radius)
                elif wanted:
                    out.add_(self.apply(name, angle, self.wave[at]).mul_(radius))
        return self.out[low:high]

    def apply(self, name: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write a function of x into out. In float32 NumPy's log, cos and sin take a third of torch's time."""
        getattr(np, name)(x.numpy(), out=out.numpy())
        return out

    def transform(self, at: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn words into radii, 40 bits, and angles in [−π, π], 24 bits and never 0."""
        first, second, work = self.first[at], self.second[at], self.work[at]
        radius, angle = self.radius[at], self.angle[at]
        radius.copy_(first.view(torch.uint32))
        torch.bitwise_and(second, 255, out=work)
        radius.add_(angle.copy_(work), alpha=2.0**-8)
        # The largest words would round to a uniform of 1.
        torch.add(self.half_radius, radius, alpha=2.0**-32 * (1 - 2.0**-23), out=radius)
        self.apply("log", radius, radius).mul_(self.factor).sqrt_()
        torch.bitwise_right_shift(second, 8, out=work)
        return radius, torch.add(self.half_angle, angle.copy_(work), alpha=self.angle_unit, out=angle)


class _Float64Pairs(_Float32Pairs):
    """Gaussian draws of a chunk in float64, from words of 64 bits."""

    width, dtype, integers = 8, torch.float64, torch.int64
    radius_bits, angle_unit = 53, math.pi * 2.0**-52

    def apply(self, name: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write a function of x into out. In float64 torch's cos and sin take a third of NumPy's time."""
        result: torch.Tensor = getattr(torch, name)(x, out=out)
        return result

    def transform(self, at: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn words into radii and angles in [−π, π] of 53 bits each."""
        first, second, work = self.first[at], self.second[at], self.work[at]
        radius, angle = self.radius[at], self.angle[at]
        torch.bitwise_right_shift(first, 11, out=work).bitwise_and_((1 << 53) - 1)
        torch.add(self.half_radius, radius.copy_(work), alpha=2.0**-53 * (1 - 2.0**-52), out=radius)
        radius.log_().mul_(self.factor).sqrt_()
        torch.bitwise_right_shift(second, 11, out=work)
        return radius, torch.add(self.half_angle, angle.copy_(work), alpha=self.angle_unit, out=angle)
