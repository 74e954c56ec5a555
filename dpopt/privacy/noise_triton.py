"""Gaussian noise added to a vector in one launch: Philox words by counter, Box–Muller in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_QUARTER = 1024  # four draws come from one counter


def add_noise_kernel(total: Tensor, std: float, divisor: float, seed: int) -> Tensor:
    """(total + std·z)/divisor in place, for a contiguous (d,) of float32 or float64.

    Args:
        total: the vector.
        std: standard deviation of the noise.
        divisor: divided by after the noise.
        seed: 63 bits; draw i depends on seed and i only.
    """
    with torch.cuda.device_of(total):  # Triton launches on the current device
        _noise_kernel[(triton.cdiv(len(total), 4 * _QUARTER),)](total, len(total), seed, std, divisor, QUARTER=_QUARTER)
    return total


@triton.jit(do_not_specialize=["count", "seed"])
def _noise_kernel(total, count, seed, std, divisor, QUARTER: tl.constexpr):
    block = tl.program_id(0)
    lanes = tl.arange(0, QUARTER)
    w0, w1, w2, w3 = tl.randint4x(seed, block * QUARTER + lanes)
    a, b = _pair(w0, w1)
    c, d = _pair(w2, w3)
    at = block.to(tl.int64) * 4 * QUARTER + lanes
    _add(total, at, count, a, std, divisor)
    _add(total, at + QUARTER, count, b, std, divisor)
    _add(total, at + 2 * QUARTER, count, c, std, divisor)
    _add(total, at + 3 * QUARTER, count, d, std, divisor)


@triton.jit
def _pair(first, second):
    """Two Gaussians from two words of 32 bits."""
    # times 2⁻³²·(1 − 2⁻²⁴): between 0 and 1, and neither; half a unit keeps the angle from 0, where the sine is 0
    uniform = (first.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283062977608182e-10
    radius = tl.sqrt(-2.0 * tl.log(uniform))
    angle = (second.to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 1.4629180792671596e-09  # times π·2⁻³¹
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _add(total, at, count, z, std, divisor):
    inside = at < count
    value = tl.load(total + at, mask=inside, other=0.0)
    tl.store(total + at, (value + std * z) / divisor, mask=inside)
