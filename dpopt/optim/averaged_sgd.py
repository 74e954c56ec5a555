"""The variance reduction of DP-PSASC (2411.03059): SGD along an average of past privatized gradients.

    m ← γ·m + (1 − γ)·g,   m₁ = g₁
    θ ← θ(1 − lr·weight_decay) − lr·g     in the first `plain_steps` steps,     − lr·m     after them

The average is over *privatized* gradients, so it is post-processing: an average of raw sums would let one example into
several releases. The paper's schedule was not at hand: that averaging begins with the first step, and is used after
`plain_steps` of them, is our reading. Its clip rule is `clipping=psasc`.
"""

from typing import Any

from torch import Tensor

from dpopt.optim.base import BELOW_ONE, PerTensorOptimizer, check_options


class AveragedSGD(PerTensorOptimizer):
    """SGD along the exponential average of the gradients.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        momentum: γ.
        plain_steps: steps along the gradient itself, before the average is used.
        weight_decay: decoupled.

    Raises:
        ValueError: for an option outside its range.
    """

    def __init__(
        self, params: Any, lr: float = 1.0, momentum: float = 0.9, plain_steps: int = 10, weight_decay: float = 0.0
    ) -> None:
        check_options(lr=(lr, 0, 1e6), momentum=(momentum, 0, BELOW_ONE), weight_decay=(weight_decay, 0, 1e6))
        super().__init__(params, dict(lr=lr, momentum=momentum, plain_steps=plain_steps, weight_decay=weight_decay))

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state.update(step=0, momentum_buffer=g.clone())
        state["step"] += 1
        average = state["momentum_buffer"].lerp_(g, 1 - group["momentum"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(average if state["step"] > group["plain_steps"] else g, alpha=-group["lr"])
