"""A momentum that is kept in few bits, for optimizers of one tensor at a time.

Every `bucket` values share a range, and are rounded stochastically to 4 or 8 bits of it.
"""

from typing import Any

import torch
from torch import Tensor

from dpopt.optim.microadam.quantize import dequantize, golden_dither, quantize


def check_bits(bits: int, bucket: int) -> None:
    """Refuse what cannot be stored.

    Raises:
        ValueError: for other bits than 4, 8 and 32, or a bucket that is no multiple of 4.
    """
    if bits not in (4, 8, 32):
        raise ValueError(f"bits={bits} must be 4, 8 or 32")
    if bucket < 4 or bucket % 4:
        raise ValueError(f"bucket={bucket} must be a multiple of 4")


def no_momentum(g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """Make the state of a momentum of zero: in `bits`, or as it is for tensors of up to `dense_size` values."""
    bits, bucket = group["bits"], group["bucket"]
    if bits == 32 or g.numel() <= group["dense_size"]:
        return {"momentum_buffer": torch.zeros_like(g)}
    buckets = -(-g.numel() // bucket)
    codes = torch.zeros(1, buckets * bucket * bits // 8, dtype=torch.uint8, device=g.device)
    ranges = torch.zeros(1, buckets, 2, dtype=torch.bfloat16, device=g.device)
    return {"codes": codes, "ranges": ranges, "bucket": bucket}


def read_momentum(p: Tensor, state: dict[str, Any]) -> Tensor:
    """m: the buffer itself, or a copy of what is stored in few bits."""
    if "codes" not in state:
        buffer: Tensor = state["momentum_buffer"]
        return buffer
    values = torch.empty(1, state["ranges"].shape[1] * state["bucket"], device=p.device)
    return dequantize(state["codes"], state["ranges"], values)[0, : p.numel()].view_as(p).to(p.dtype)


def write_momentum(m: Tensor, state: dict[str, Any]) -> None:
    """Keep m in the bits of its state; `state["step"]` and `state["number"]` choose the rounding."""
    if "codes" not in state:
        return  # m is the buffer
    buckets, bucket = state["ranges"].shape[1], state["bucket"]
    values = torch.zeros(1, buckets * bucket, device=m.device)
    values[0, : m.numel()] = m.flatten()
    number = torch.full((1,), state["number"], device=m.device)
    dither = golden_dither(number, state["step"], buckets, bucket)
    quantize(values, state["codes"], state["ranges"], torch.empty_like(values), dither)
