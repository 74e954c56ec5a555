"""Gaussian noise added to a vector in one launch: ChaCha20 words by block counter, Box–Muller in registers.

The words are those of `dpopt.rng`: a lane computes 32 draws: twice one block of 16
words for radii and one for angles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpopt.rng import CHUNK, RandomKey, stream_key

_LANES = 64  # ChaCha20 blocks of radii in a program
_BLOCKS = tl.constexpr(CHUNK // 32)  # blocks of radii in a chunk; as many of angles follow
_CHUNK = tl.constexpr(CHUNK)


def add_noise_kernel(
    total: Tensor, std: float, divisor: float, grid: float, key: RandomKey, step: int, start: int = 0
) -> Tensor:
    """Replace a contiguous float32 `total` (d,) by round(total + std·z)/divisor, in place.

    Args:
        total: the vector, or the shard of it that begins at `start`.
        std: standard deviation of the noise.
        divisor: q·N.
        grid: spacing of the release, a power of two.
        key: of the run.
        step: number of the logical step.
        start: position of the shard.
    """
    material = stream_key(key, "noise", step, str(total.dtype))
    words = [int.from_bytes(material[4 * i : 4 * i + 4], "little", signed=True) for i in range(8)]
    first = start // CHUNK
    lanes = (-(-(start + len(total)) // CHUNK) - first) * _BLOCKS.value
    with torch.cuda.device_of(total):  # Triton launches on the current device
        _noise_kernel[(triton.cdiv(lanes, _LANES),)](
            *(total, len(total), first, start, *words, 1 / grid, std / grid, grid / divisor),
            LANES=_LANES,
            enable_fp_fusion=False,
        )
    return total


@triton.jit(do_not_specialize=["count", "first", "start", "k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7"])
def _noise_kernel(
    total, count, first, start, k0, k1, k2, k3, k4, k5, k6, k7, into, std, back, LANES: tl.constexpr
):  # fmt: skip
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    chunk = first + (lane // _BLOCKS).to(tl.int64)
    block = lane % _BLOCKS
    radii = _chacha(4 * chunk * _BLOCKS + block, k0, k1, k2, k3, k4, k5, k6, k7)
    angles = _chacha((4 * chunk + 1) * _BLOCKS + block, k0, k1, k2, k3, k4, k5, k6, k7)
    more_radii = _chacha((4 * chunk + 2) * _BLOCKS + block, k0, k1, k2, k3, k4, k5, k6, k7)
    more_angles = _chacha((4 * chunk + 3) * _BLOCKS + block, k0, k1, k2, k3, k4, k5, k6, k7)
    at = chunk * _CHUNK + 16 * block - start
    for i in tl.static_range(16):
        cosine, sine = _pair(radii[i], angles[i])
        more_cosine, more_sine = _pair(more_radii[i], more_angles[i])
        _add(total, at + i, count, cosine + more_cosine, into, std, back)
        _add(total, at + _CHUNK // 2 + i, count, sine + more_sine, into, std, back)


@triton.jit
def _chacha(counter, k0, k1, k2, k3, k4, k5, k6, k7):
    """Compute the 16 words of the blocks with these 64-bit counters.

    The nonce is zeros.
    """
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low ^ low
    a0, a1, a2, a3 = zero + 0x61707865, zero + 0x3320646E, zero + 0x79622D32, zero + 0x6B206574
    b0, b1, b2, b3 = _word(k0, zero), _word(k1, zero), _word(k2, zero), _word(k3, zero)
    c0, c1, c2, c3 = _word(k4, zero), _word(k5, zero), _word(k6, zero), _word(k7, zero)
    d0, d1, d2, d3 = low, high, zero, zero
    for _ in range(10):
        a0, b0, c0, d0 = _quarter(a0, b0, c0, d0)
        a1, b1, c1, d1 = _quarter(a1, b1, c1, d1)
        a2, b2, c2, d2 = _quarter(a2, b2, c2, d2)
        a3, b3, c3, d3 = _quarter(a3, b3, c3, d3)
        a0, b1, c2, d3 = _quarter(a0, b1, c2, d3)
        a1, b2, c3, d0 = _quarter(a1, b2, c3, d0)
        a2, b3, c0, d1 = _quarter(a2, b3, c0, d1)
        a3, b0, c1, d2 = _quarter(a3, b0, c1, d2)
    a0, a1, a2, a3 = a0 + 0x61707865, a1 + 0x3320646E, a2 + 0x79622D32, a3 + 0x6B206574
    b0, b1, b2, b3 = b0 + _word(k0, zero), b1 + _word(k1, zero), b2 + _word(k2, zero), b3 + _word(k3, zero)
    c0, c1, c2, c3 = c0 + _word(k4, zero), c1 + _word(k5, zero), c2 + _word(k6, zero), c3 + _word(k7, zero)
    return a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0 + low, d1 + high, d2, d3


@triton.jit
def _word(k, zero):
    return zero + k.to(tl.uint32, bitcast=True)


@triton.jit
def _quarter(a, b, c, d):
    a = a + b
    d = _rotate(d ^ a, 16)
    c = c + d
    b = _rotate(b ^ c, 12)
    a = a + b
    d = _rotate(d ^ a, 8)
    c = c + d
    return a, _rotate(b ^ c, 7), c, d


@triton.jit
def _rotate(x, bits: tl.constexpr):
    return (x << bits) | (x >> (32 - bits))


@triton.jit
def _pair(first, second):
    """Two Gaussians of variance 1/2 from two words: 40 bits for the radius, 24 for the angle, as in `dpopt.rng`."""
    uniform = first.to(tl.float32) + (second & 255).to(tl.float32) * 0.00390625  # 2⁻⁸
    uniform = 4.547473508864641e-13 + uniform * 2.3283061589829401e-10  # 2⁻⁴¹, 2⁻³²·(1 − 2⁻²³)
    radius = tl.sqrt(-tl.log(uniform))
    angle = (second.to(tl.int32, bitcast=True) >> 8).to(tl.float32)
    angle = 1.8725351414619643e-07 + angle * 3.7450702829239286e-07  # π·2⁻²⁴, π·2⁻²³
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _add(total, at, count, z, into, std, back):
    inside = (at >= 0) & (at < count)
    value = tl.load(total + at, mask=inside, other=0.0) * into + z * std
    whole = tl.where(tl.abs(value) < 8388608.0, tl.floor(value + 0.5), value)  # beyond 2²³ every float32 is whole
    tl.store(total + at, whole * back, mask=inside)
