"""DP-SignSGD (Bernstein et al., 1802.04434, on privatized gradients): every coordinate moves by lr, up or down.

    m ← β·m + (1 − β)·g
    θ ← θ(1 − lr·weight_decay) − lr·sign(m)               β = 0: the sign of the gradient itself

As with Adam, and unlike SGD, the best learning rate does not depend on ε: the noise changes how often a sign is wrong,
not how far it moves.
"""

from typing import Any

import torch
from torch import Tensor

from dpopt.optim.base import BELOW_ONE, PerTensorOptimizer, check_options


class SignSGD(PerTensorOptimizer):
    """Steps of one size in the direction of the sign of the gradient or of its average.

    Args:
        params: parameters or parameter groups.
        lr: learning rate: how far every coordinate moves.
        momentum: β, of the average; 0 for none, and no state.
        weight_decay: decoupled.

    Raises:
        ValueError: for an option outside its range.
    """

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        check_options(lr=(lr, 0, 1e6), momentum=(momentum, 0, BELOW_ONE), weight_decay=(weight_decay, 0, 1e6))
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if group["momentum"]:
            if not state:
                state["momentum_buffer"] = torch.zeros_like(g)
            g = state["momentum_buffer"].lerp_(g, 1 - group["momentum"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(g.sign(), alpha=-group["lr"])
