"""Adam with one second moment for every bucket of values, and its momentum in few bits.

    m ← β₁·m + (1 − β₁)·g,   v ← β₂·v + (1 − β₂)·mean of g² over the bucket
    θ ← θ(1 − lr·weight_decay) − lr·m̂/(√v̂ + ε)

A second moment per block instead of per value is Adam-mini's (Zhang et al., 2406.16793), whose blocks are rows and
heads; states in 4 bits are those of Li et al., 2309.01507. Here both go by consecutive values. Under noise Adam's √v̂ is
nearly the same in all of them: what one per value would add is mostly error. Where the signal is most of the
gradient, v follows it and the step stays bounded, unlike a step over the noise's deviation. A bucket of 64 keeps
4/8 + 4/64 bytes per parameter for m, and 4/64 for v. A gradient's value that is not finite spoils its bucket.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpopt.optim.base import BELOW_ONE, PerTensorOptimizer, check_options
from dpopt.optim.few_bits import check_bits, no_momentum, read_momentum, write_momentum


class AdamMini(PerTensorOptimizer):
    """Adam with a second moment per bucket and a momentum in few bits.

    Args:
        params: parameters or parameter groups.
        lr: learning rate; Adam's serve.
        betas: β₁ of the momentum, β₂ of the second moment.
        eps: added to √v̂.
        weight_decay: decoupled.
        bits: of a stored value of m: 4 or 8, or 32 for none of it quantized.
        bucket: consecutive values that share a range and a second moment, a multiple of 4.
        dense_size: tensors of up to so many values keep Adam's two moments.

    Raises:
        ValueError: for an option outside its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bits: int = 4,
        bucket: int = 64,
        dense_size: int = 1024,
    ) -> None:
        check_options(lr=(lr, 0, 1e6), eps=(eps, 0, 1e6), weight_decay=(weight_decay, 0, 1e6))
        check_options(**{f"betas[{i}]": (beta, 0, BELOW_ONE) for i, beta in enumerate(betas)})
        check_bits(bits, bucket)
        options = dict(eps=eps, weight_decay=weight_decay, bits=bits, bucket=bucket, dense_size=dense_size)
        super().__init__(params, dict(lr=lr, betas=tuple(betas), **options))

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        (b1, b2), bucket = group["betas"], 1 if g.numel() <= group["dense_size"] else group["bucket"]
        squares = _mean_squares(g, bucket)
        if not state:
            state.update(step=0, number=len(self.state), **no_momentum(g, group), mean_sq=torch.zeros_like(squares))
        state["step"] += 1
        m = read_momentum(p, state).lerp_(g, 1 - b1)
        write_momentum(m, state)
        v = state["mean_sq"].lerp_(squares, 1 - b2)
        root = (v / (1 - b2 ** state["step"])).sqrt().add_(group["eps"])
        root = root.repeat_interleave(bucket)[: g.numel()].view_as(p)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.addcdiv_(m, root, value=-group["lr"] / (1 - b1 ** state["step"]))  # in v's dtype: ε is 0 in float16

    def first_moment(self, p: Tensor) -> Tensor:
        """Copy m, in the shape of the parameter."""
        return read_momentum(p, self.state[p]).clone()


def _mean_squares(g: Tensor, bucket: int) -> Tensor:
    """Mean of g² over buckets of consecutive values; the last bucket may have fewer."""
    squares = g.flatten().to(torch.promote_types(g.dtype, torch.float32)).square()
    if bucket == 1:
        return squares
    sums = F.pad(squares, (0, -len(squares) % bucket)).view(-1, bucket).sum(1)
    sums[:-1] /= bucket
    sums[-1] /= len(squares) - bucket * (len(sums) - 1)
    return sums
