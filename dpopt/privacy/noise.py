"""The noise of a step: drawn, added and divided by qN in one pass over the summed gradients.

Drawing Gaussian noise costs more than most optimizers' steps, so it is drawn in pieces that stay in the cache, or in
registers on a GPU, and each piece is added where it belongs at once. It depends on key, step and position in the vector
of all parameters only. On a GPU the generator is Philox under a 64-bit seed derived from the key; a key from the
operating system keeps to the cryptographic generator, on the CPU.
"""

import functools
import importlib.util
import warnings

from torch import Tensor

from dpopt.rng import RandomKey


def add_noise(total: Tensor, std: float, divisor: float, key: RandomKey, step: int) -> Tensor:
    """(total + std·z)/divisor with standard Gaussian z, in place.

    Args:
        total: (d,), float32 or float64.
        std: standard deviation of the noise; 0 adds none.
        divisor: q·N.
        key: of the run.
        step: number of the logical step.
    """
    if std == 0:
        return total.div_(divisor)
    if total.is_cuda and not key.secure:
        if importlib.util.find_spec("triton") is not None:
            from dpopt.privacy.noise_triton import add_noise_kernel

            return add_noise_kernel(total, std, divisor, key.seed("noise", step))
        _warn_once()
    start = 0
    for piece in key.gaussians(len(total), "noise", step):
        target = total[start : start + len(piece)]
        target.add_(piece.to(total.device, total.dtype), alpha=std).div_(divisor)
        start += len(piece)
    return total


@functools.cache
def _warn_once() -> None:
    warnings.warn("the noise is drawn on the CPU: pip install triton draws it on the GPU", stacklevel=3)
