"""Low-bit storage of a tensor: 2, 4 or 8 bits per value, with a range per bucket of consecutive values.

A bucket keeps its minimum l and maximum h in bfloat16, rounded outwards so that every value lies between them. With
2ᵇ − 1 steps of u = (h − l)/(2ᵇ − 1), a value x is stored as q = ⌊x/u + (d − l/u)⌋ and read back as l + q·u. Rounding to
nearest has d = ½ and an error of at most u/2. Stochastic rounding has d uniform in [0, 1): unbiased, error below u.

Defined corners: a bucket of one value that bfloat16 holds has u = 0 and q = 0, and reads back exactly; where u is below
2⁻¹²⁰ every value reads back as l; a value that is not finite, or not below 2¹²⁶ in magnitude, counts as zero.

Within a bucket, a byte holds values that lie a quarter (2 bits) or half (4 bits) of the bucket apart.
"""

import torch
from torch import Tensor

HUGE = 2.0**126
TINY = 2.0**-120


def quantize(x: Tensor, packed: Tensor, ranges: Tensor, work: Tensor, dither: Tensor | None = None) -> None:
    """Store rows of values.

    Args:
        x: (rows, size) float32; values that count as zero are set to zero in place.
        packed: receives the codes, (rows, size·bits/8) uint8; its shape says the bits: 2, 4 or 8.
        ranges: receives l and h, (rows, size/bucket, 2) bfloat16; its shape says the bucket, a multiple of 4.
        work: scratch, like x.
        dither: (rows, size) in [0, 1) for stochastic rounding; None rounds to nearest.
    """
    bits = 8 * packed.shape[1] // x.shape[1]
    values, scaled = (t.view(len(x), ranges.shape[1], 8 // bits, -1) for t in (x, work))
    extremes = torch.stack([values.amin((2, 3)), values.amax((2, 3))], 2)
    if x.device.type != "cpu" or not bool(extremes.abs().amax() < HUGE):  # to ask would wait for a GPU
        values.masked_fill_(~(values.abs() < HUGE), 0.0)
        extremes = torch.stack([values.amin((2, 3)), values.amax((2, 3))], 2)
    ranges.copy_(_outwards(extremes))
    low, unit = _grid(ranges, bits)
    inverse = torch.where(unit > TINY, 1 / unit, 0.0)
    torch.mul(values, inverse, out=scaled)
    if dither is None:
        scaled.add_(0.5 - low * inverse)
    else:
        scaled.add_(dither.view(scaled.shape)).sub_(low * inverse).clamp_(0, 2**bits - 1)
    codes = scaled.floor_()
    for place in range(1, 8 // bits):
        codes[:, :, 0].add_(codes[:, :, place], alpha=1 << (bits * place))
    packed.view(len(x), ranges.shape[1], -1).copy_(codes[:, :, 0])


def dequantize(packed: Tensor, ranges: Tensor, out: Tensor) -> Tensor:
    """Read back what `quantize` stored, into (rows, size) float32."""
    rows, buckets, _ = ranges.shape
    bits = 8 * packed.shape[1] // out.shape[1]
    codes, values = packed.view(rows, buckets, 1, -1), out.view(rows, buckets, 8 // bits, -1)
    for place in range(8 // bits):
        shifted = codes >> (bits * place) if place else codes
        values[:, :, place : place + 1] = shifted if place == 8 // bits - 1 else shifted & (2**bits - 1)
    low, unit = _grid(ranges, bits)
    values.mul_(unit).add_(low)
    return out


def golden_dither(rows: Tensor, step: int, buckets: int, bucket: int) -> Tensor:
    """Uniform offsets in [0, 1) for stochastic rounding, (rows, buckets·bucket) float32, without a generator's state.

    Within a bucket they are multiples of the golden ratio, shifted by a hash of row, bucket and step, so that every
    value sees a uniform offset over the steps.

    Args:
        rows: a number for each row, (rows,), integer.
        step: number of the step.
        buckets: buckets of a row.
        bucket: values of a bucket.
    """
    number = rows.long()[:, None] * buckets + torch.arange(buckets, device=rows.device)
    word = (number * 0x9E3779B1 + (step * 0x85EBCA6B & 0xFFFFFFFF)) & 0xFFFFFFFF
    for multiplier in (0x7FEB352D, 0x846CA68B):
        word = ((word ^ (word >> 16)) * multiplier) & 0xFFFFFFFF
    word = (word ^ (word >> 16)) >> 8
    pattern = (torch.arange(bucket, device=rows.device) * 0x9E3779B1 & 0xFFFFFFFF) >> 8
    total = (word.int()[:, :, None] + pattern.int()).bitwise_and_(0xFFFFFF)
    return total.view(len(rows), -1).float().mul_(2.0**-24)


def _grid(ranges: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """l and u of every bucket, (rows, buckets, 1, 1)."""
    low, high = ranges.float()[:, :, None, None].unbind(4)
    steps = torch.full((), 2**bits - 1, dtype=torch.float32, device=ranges.device)
    return low, (high - low) / steps  # by a number, torch on a GPU would multiply by its rounded inverse


def _outwards(extremes: Tensor) -> Tensor:
    """Minimum and maximum (…, 2) to values that bfloat16 holds, towards −∞ and +∞.

    Cutting the lower half of the word rounds towards zero, so carry where that is wrong.
    """
    extremes = extremes + 0.0  # −0 becomes 0
    wrong = torch.stack([extremes[..., 0] < 0, extremes[..., 1] > 0], -1)
    return ((extremes.view(torch.int32) + wrong.int() * 0xFFFF) & -0x10000).view(torch.float32)
