"""DP-LAMB (You et al., 1904.00962; on privatized gradients Mehta et al., 2205.02973): Adam with a step size per tensor.

With m̂ and v̂ as in Adam,

    r = m̂/(√v̂ + ε) + weight_decay·θ
    θ ← θ − lr·(‖θ‖/‖r‖)·r                                the ratio is 1 where ‖θ‖ or ‖r‖ is 0

so a tensor moves by the fraction lr of its norm. 2205.02973 uses it for fine-tuning with very large batches and a
last layer that starts at zero (`model.zero_head`), which the ratio of 1 lets move. Differences from public code: φ is
the identity, the norm of θ is not clipped, and biases are not excepted.
"""

from typing import Any

import torch
from torch import Tensor

from dpopt.optim.base import BELOW_ONE, PerTensorOptimizer, check_options, first_and_second_moment


class LAMB(PerTensorOptimizer):
    """Adam's direction, at the length of the tensor that it moves.

    Args:
        params: parameters or parameter groups.
        lr: learning rate: the fraction of a tensor's norm by which it moves.
        betas: decay of the first and second moment.
        eps: added to the denominator.
        weight_decay: coupled: in the direction before its length is set.

    Raises:
        ValueError: for an option outside its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        check_options(lr=(lr, 0, 1e6), eps=(eps, 0, 1e6), weight_decay=(weight_decay, 0, 1e6))
        check_options(**{f"betas[{i}]": (beta, 0, BELOW_ONE) for i, beta in enumerate(betas)})
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        m, v = first_and_second_moment(g, state, group["betas"])
        direction = (m / (v.sqrt_() + group["eps"])).add_(p, alpha=group["weight_decay"])
        length, size = p.norm(), direction.norm()
        ratio = torch.where((length > 0) & (size > 0), length / size, 1.0)
        p.sub_(direction.mul_(group["lr"] * ratio))
