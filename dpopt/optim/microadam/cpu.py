"""One step of MicroAdam on all blocks of a packed state in one pass on a CPU: `cpu.c` (`dpopt.native` builds it)."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpopt import native
from dpopt.optim.microadam.packing import PackedState
from dpopt.optim.microadam.reference import window_weights

_SOURCE = Path(__file__).with_name("cpu.c")
_WORTH_A_THREAD = 64  # blocks


class _Options(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("size", "k", "window", "bits", "bucket", "stochastic", "row", "step")),
        *((name, ctypes.c_float) for name in ("minus_lr", "shrink", "eps")),
    ]


def supports(packed: PackedState) -> str:
    """Say why this state needs the reference; empty when it does not."""
    form = packed.layout
    if any(p.dtype != torch.float32 for p in packed.first) or form.dtype != torch.float32:
        return "parameters other than float32"
    if form.window is None:
        return "" if form.size == 1 else "an unbounded window"
    return "" if form.size <= 1 << 15 else f"blocks of {form.size:,} values (they want scope=block, and a short bucket)"


def step_packed(
    packed: PackedState, parameters: dict[Tensor, tuple[Tensor, Tensor]], step: int, group: dict[str, Any]
) -> None:
    """Step parameters of one packed state that are at the same step.

    Args:
        packed: the state.
        parameters: for each parameter its values and its gradient, contiguous; the values change in place.
        step: t, from 1.
        group: the options of `MicroAdam`.
    """
    form, state, lr, betas = packed.layout, packed.tensors, float(group["lr"]), tuple(group["betas"])
    window = form.window or 1
    options = _Options(
        *(form.size, form.k, window, form.bits, form.bucket, group["rounding"] == "stochastic"),
        *((step - 1) % window, step, -lr, 1 - lr * float(group["weight_decay"]), group["eps"]),
    )
    tensors = torch.tensor(
        [(v.data_ptr(), g.data_ptr(), v.numel(), packed.first[p]) for p, (v, g) in parameters.items()],
        dtype=torch.int64,
        device="cpu",
    )
    if form.window is None:
        rates = [rate for beta in betas for rate in (beta, 1 - beta)] + [1 / (1 - beta**step) for beta in betas]
        constants = torch.tensor(rates, dtype=torch.float32, device="cpu")
        moments = [t.data_ptr() for t in (state["exp_avg"], state["exp_avg_sq"], constants)]
        library().microadam_dense_step(tensors.data_ptr(), len(tensors), *moments, ctypes.byref(options))
        return
    weights = window_weights(step, window, betas, torch.float32, form.device)
    shared = [state[name].data_ptr() if name in state else None for name in ("feedback", "ranges", "indices", "values")]

    def work(begin: int, end: int) -> None:
        scratch = native.room(4 * form.size + window * form.k)
        library().microadam_step(
            *(tensors.data_ptr(), begin, end, *shared, weights.data_ptr(), scratch.data_ptr(), ctypes.byref(options))
        )

    native.in_parts(work, sum(packed.count(p) for p in parameters), _WORTH_A_THREAD)


@functools.cache
def library() -> ctypes.CDLL:
    """Load the compiled step.

    Raises:
        OSError: when there is no compiler, or it fails.
    """
    loaded = native.library(_SOURCE, flags="-ffp-contract=off")  # no fused multiply-add: the reference's bits
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    loaded.microadam_step.argtypes = [pointer, count, count, *[pointer] * 7]
    loaded.microadam_dense_step.argtypes = [pointer, count, *[pointer] * 4]
    loaded.microadam_step.restype = loaded.microadam_dense_step.restype = None
    return loaded
