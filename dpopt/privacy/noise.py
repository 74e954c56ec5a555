"""The noise of a step: drawn, added, rounded to a public grid and divided by qN in one pass over the summed gradients.

Drawing Gaussian noise costs more than most optimizers' steps, so it is drawn in pieces that stay in the cache, or in
registers on a GPU, and each piece is added where it belongs at once. It depends on key, step and position in the vector
of all parameters only. A float32 sum gets float32 noise, a float64 sum float64 noise.

Floating-point noise has gaps: a value that the noise cannot reach from a sum gives the sum away (Mironov, 2012). Sum
plus noise is therefore rounded, after the noise, to a grid of about std·2⁻¹². Every point of it can be reached from
every sum in thousands of ways, in one coordinate and in the two that share their words (`dpopt.rng`). Rounding what is
private already is post-processing: it costs no privacy.

Noise that is correlated over steps (`dpopt.privacy.correlated`) is released on the same grid. Given all earlier noise,
what is new in it has the deviation σS or more, so the grid is as fine to it: whoever knows the past finds every point
reachable from every sum, as without correlation. What is kept for later steps is not rounded and depends on no data.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dpopt.machine import have_triton
from dpopt.rng import RandomKey

# How randomness is drawn and released. Raised when the same key would give other draws or another release:
# 1 AES words, float32 noise, released as it is; 2 ChaCha20 words, noise in the dtype of the sum, released on a grid;
# 3 the same words, two Box–Muller transforms for each draw.
NOISE_VERSION = 3
_GRID_BITS = 12
_FINE = 2.0**-32  # rounds a float32 draw below 2⁻⁹ only, and no further than a draw near 2⁻⁹ is


def release_grid(std: float) -> float:
    """Return the spacing of what is released under noise of this standard deviation: a power of two ≤ std·2⁻¹²."""
    return 2.0 ** (math.floor(math.log2(std)) - _GRID_BITS)


def add_noise(
    total: Tensor,
    std: float,
    divisor: float,
    key: RandomKey,
    step: int,
    start: int = 0,
    correlated: Callable[[Tensor, RandomKey, int], Iterator[Tensor]] | None = None,
) -> Tensor:
    """Replace `total` by round(total + std·z)/divisor with standard Gaussian z, in place.

    Args:
        total: (d,), float32 or float64: the whole vector of parameters, or a shard of it.
        std: standard deviation of the noise; 0 adds none and rounds nothing.
        divisor: q·N.
        key: of the run.
        step: number of the logical step.
        start: position of the shard in the whole vector.
        correlated: (sum, key, step) → z in pieces, where z is not independent from step to step.

    Raises:
        ValueError: for a sum in another dtype.
    """
    if std == 0:
        return total.div_(divisor)
    if total.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the sum of gradients is {total.dtype}, whose noise would be coarse: sum in float32 or float64"
        )
    grid = release_grid(std)
    pieces: Iterator[Tensor]
    if correlated is not None:
        pieces = (piece.mul_(std / grid) for piece in correlated(total, key, step))
    elif _on_gpu(total):
        from dpopt.privacy.noise_triton import add_noise_kernel

        return add_noise_kernel(total, std, divisor, grid, key, step, start)
    else:
        pieces = key.gaussians(len(total), "noise", step, start=start, dtype=total.dtype, std=std / grid)
    begin = 0
    # In units of the grid, a power of two: that changes no bit of the sum.
    for piece in pieces:
        target = total[begin : begin + len(piece)]
        noisy = piece.to(total.device)
        torch.add(noisy, target, alpha=1 / grid, out=noisy).round_()
        torch.mul(noisy, grid / divisor, out=target)
        begin += len(piece)
    return total


def standard_noise(like: Tensor, key: RandomKey, step: int) -> Iterator[Tensor]:
    """Yield the z of a step in pieces, which the next ones overwrite, in dtype and place of a vector."""
    if _on_gpu(like):
        from dpopt.privacy.noise_triton import add_noise_kernel

        yield add_noise_kernel(torch.zeros_like(like), 1.0, 1.0, _FINE, key, step)
        return
    for piece in key.gaussians(len(like), "noise", step, dtype=like.dtype):
        yield piece.to(like.device)


def _on_gpu(total: Tensor) -> bool:
    """Tell whether noise is drawn on the GPU; warn where it could be."""
    if not (total.is_cuda and total.dtype == torch.float32):
        return False
    if not have_triton():
        _warn_once()
        return False
    return True


def add_count_noise(count: float, std: float, key: RandomKey, step: int) -> float:
    """Add Gaussian noise to a count and round the result to its grid, in float64.

    Args:
        count: raw, hence private.
        std: standard deviation of the noise; 0 adds none.
        key: of the run.
        step: number of the logical step.
    """
    if std == 0:
        return count
    grid = release_grid(std)
    noise = float(key.normal(1, "count", step, dtype=torch.float64))
    return round(count / grid + noise * (std / grid)) * grid


@functools.cache
def _warn_once() -> None:
    warnings.warn("the noise is drawn on the CPU: pip install triton draws it on the GPU", stacklevel=3)
