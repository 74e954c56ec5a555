"""Σ wᵢ·gᵢ over the examples of a micro-batch on a GPU, in one read, whatever examples of weight zero hold."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """Σ weights[i]·rows[i], (n,) float32; a row of weight zero is not read, so that it may hold NaN.

    Args:
        rows: (B, n) of 16- or 32-bit floats, contiguous in n.
        weights: (B,) float32.
    """
    total = torch.empty(rows.shape[1], dtype=torch.float32, device=rows.device)
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        _sum_kernel[(triton.cdiv(len(total), _BLOCK),)](
            rows, weights, total, len(total), rows.stride(0), COUNT=len(rows), BLOCK=_BLOCK
        )
    return total


@triton.jit
def _sum_kernel(rows, weights, total, size, stride, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), tl.float32)
    row = rows + at
    for i in range(COUNT):
        weight = tl.load(weights + i)
        read = at < tl.where(weight != 0.0, size, 0)
        found += weight * tl.load(row, mask=read, other=0.0).to(tl.float32)
        row += stride
    tl.store(total + at, found, mask=at < size)
