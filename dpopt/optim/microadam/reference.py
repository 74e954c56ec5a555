"""One step of MicroAdam on rows of blocks, in plain PyTorch: the reference that the C and Triton kernels must equal.

A block is a row of `size` values of which k are selected; the window has m rows per block. The state of n blocks is
`indices` (n, m, k) and `values` (n, m, k), or for an unbounded window the moments `exp_avg` and `exp_avg_sq` (n, size);
and, where there is error feedback, `feedback`: (n, size), or packed codes (n, size·bits/8) with `ranges` (n,
size/bucket, 2).
"""

import functools
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dpopt.machine import sent
from dpopt.optim.microadam.quantize import dequantize, golden_dither, quantize


def microadam_step(
    scratch: Tensor,
    state: Mapping[str, Tensor],
    step: int,
    k: int,
    betas: tuple[float, float],
    eps: float,
    lr: float,
    rows: Tensor | None = None,
) -> Tensor:
    """Select, remember the rest, and form the update of n blocks; the state changes in place.

    Args:
        scratch: (2, n, size), contiguous; the first half holds gradient plus error feedback. Both are overwritten:
            fresh memory would cost more than most of what is done here.
        state: of these blocks.
        step: t, from 1.
        k: values selected per block.
        betas: β₁, β₂.
        eps: ε of the denominator.
        lr: learning rate.
        rows: number of each block within its tensor (n,), for stochastic rounding; None rounds to nearest.

    Returns:
        −lr·m̂/(ε + √v̂), (n, size), in the memory of `scratch`.
    """
    accumulated, work = scratch
    chosen = topk_positions(accumulated, k)
    picked = accumulated.gather(1, chosen)
    windowed = "indices" in state
    stored = picked.to(state["values"].dtype) if windowed else picked
    if "feedback" in state:
        # What rounding the selected values to their storage cuts off stays in the feedback: nothing is lost.
        write_feedback(accumulated.scatter_(1, chosen, picked - stored), state, step, work, rows)
    if windowed:
        row = (step - 1) % state["indices"].shape[1]
        state["indices"][:, row] = chosen
        state["values"][:, row] = stored
        positions = state["indices"].flatten(1).long()
        moments = window_moments(positions, state["values"], step, betas, scratch)
        first, second = (moment.gather(1, positions) for moment in moments)
        # Outside the window m̂ is 0, and so is the update: a tenth of the values are left to compute.
        return accumulated.zero_().scatter_(1, positions, first.div_(_root(second).add_(eps)).mul_(-lr))
    selected = accumulated.zero_().scatter_(1, chosen, picked) if k < accumulated.shape[1] else accumulated
    first = state["exp_avg"].mul_(betas[0]).add_(selected * (1 - betas[0]))
    second = state["exp_avg_sq"].mul_(betas[1]).add_(selected.square().mul_(1 - betas[1]))
    root = _root(torch.mul(second, 1 / (1 - betas[1] ** step), out=work))
    return torch.mul(first, 1 / (1 - betas[0] ** step), out=accumulated).div_(root.add_(eps)).mul_(-lr)


def _root(x: Tensor) -> Tensor:
    """√x, correctly rounded: on a CPU torch's is not in float32 (1 value in 150 is off by one bit), NumPy's is."""
    return x.sqrt() if x.device.type != "cpu" else torch.from_numpy(np.sqrt(x.numpy()))


def read_feedback(state: Mapping[str, Tensor], out: Tensor) -> Tensor:
    """Read the error feedback of n blocks into (n, size); zeros without feedback."""
    if "ranges" in state:
        return dequantize(state["feedback"], state["ranges"], out)
    return out.copy_(state["feedback"]) if "feedback" in state else out.zero_()


def write_feedback(rest: Tensor, state: Mapping[str, Tensor], step: int, work: Tensor, rows: Tensor | None) -> None:
    """Store what was not selected, (n, size), in the state."""
    if "ranges" not in state:
        state["feedback"].copy_(rest)
        return
    buckets = state["ranges"].shape[1]
    dither = None if rows is None else golden_dither(rows, step, buckets, rest.shape[1] // buckets)
    quantize(rest, state["feedback"], state["ranges"], work, dither)


def topk_positions(values: Tensor, k: int) -> Tensor:
    """Positions (n, k), ascending, of the k values of largest magnitude in each row of (n, size).

    Ties go to the lower position; NaN counts as infinite, so what is not finite is selected and shows.
    """
    n, size = values.shape
    if k >= size:
        return torch.arange(size, device=values.device).expand(n, size)
    magnitude = values.abs().nan_to_num_(nan=float("inf"), posinf=float("inf"))
    least = _kth_largest(magnitude, k)[:, None]
    chosen = magnitude >= least
    positions = chosen.nonzero()[:, 1]
    if len(positions) > n * k:  # ties
        above, equal = magnitude > least, magnitude == least
        chosen = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
        positions = chosen.nonzero()[:, 1]
    return positions.view(n, k)


def _kth_largest(x: Tensor, k: int) -> Tensor:
    """Of each row (n,): on a CPU by NumPy, whose partition is vectorized and five times as fast as torch.topk."""
    if x.device.type != "cpu":
        return x.topk(k).values[:, -1]
    return torch.from_numpy(np.partition(x.numpy(), x.shape[1] - k, axis=1)[:, x.shape[1] - k].copy())


@functools.lru_cache(maxsize=16)
def window_weights(
    step: int, window: int, betas: tuple[float, float], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Weigh the window's rows in the bias-corrected moments after `step` steps, (2, m).

    A row that is not yet written weighs 0.
    """
    # Row r was written at the latest step s ≤ step with (s − 1) mod window = r.
    ages = [(step - 1 - row) % window for row in range(window)]
    weights = [[b**age * (1 - b) / (1 - b**step) if age < step else 0.0 for age in ages] for b in betas]
    return sent(torch.tensor(weights, dtype=dtype), device)


def window_moments(positions: Tensor, values: Tensor, step: int, betas: tuple[float, float], out: Tensor) -> Tensor:
    """Compute the bias-corrected moments m̂ and v̂ into (2, n, size).

    Args:
        positions: the window's, (n, m·k) int64.
        values: the window's, (n, m, k).
        step: t, from 1.
        betas: β₁, β₂.
        out: receives them.
    """
    values = values.to(out.dtype)
    weights = window_weights(step, values.shape[1], tuple(betas), out.dtype, out.device)[:, :, None]
    # Row by row: one scatter of all would add in any order on a GPU.
    columns = positions.view(values.shape).unbind(1)
    for moment, terms in zip(out.zero_(), (values * weights[0], values * values * weights[1]), strict=True):
        for column, term in zip(columns, terms.unbind(1), strict=True):
            moment.scatter_add_(1, column, term)
    return out
