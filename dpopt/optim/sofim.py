"""DP-FedSOFIM's server step (2601.09166): a natural gradient whose Fisher matrix is one outer product.

With U the mean of clipped and noised updates of all clients, over all parameters at once,

    M ← βM + (1 − β)U,   M̂ = M/(1 − βᵗ)
    θ ← θ − lr·F⁻¹M̂,   F = M̂M̂ᵀ + ρI,   and F⁻¹M̂ = M̂/(ρ + ‖M̂‖²) exactly

so the step is along M̂, of length lr·‖M̂‖/(ρ + ‖M̂‖²): at most lr/(2√ρ), where ‖M̂‖ = √ρ. Noise alone, of standard
deviation s in each of d coordinates, contributes s²·d·(1 − β)/(1 + β) to ‖M̂‖². U is what lies in `p.grad`: a mean
gradient, or a pseudo-gradient where clients take several steps. The step itself knows nothing of clients.
"""

from typing import Any

import torch
from torch import Tensor

from dpopt.optim.base import BELOW_ONE, PerTensorOptimizer, check_options


class FedSOFIM(PerTensorOptimizer):
    """SGD with momentum over ρ + the squared norm of the momentum.

    Args:
        params: parameters or parameter groups; the norm is over those of a group.
        lr: learning rate η.
        momentum: β.
        rho: ρ, in squared units of the gradient.
        weight_decay: decoupled.

    Raises:
        ValueError: for an option outside its range.
    """

    def __init__(
        self, params: Any, lr: float = 1.0, momentum: float = 0.9, rho: float = 0.5, weight_decay: float = 0.0
    ) -> None:
        check_options(lr=(lr, 0, 1e6), momentum=(momentum, 0, BELOW_ONE), rho=(rho, 1e-30, 1e6))
        check_options(weight_decay=(weight_decay, 0, 1e6))
        super().__init__(params, dict(lr=lr, momentum=momentum, rho=rho, weight_decay=weight_decay))

    def step_group(self, group: dict[str, Any]) -> None:
        """Move the momentum of every parameter, then the parameters by its common length."""
        super().step_group(group)
        moved = [p for p in group["params"] if p.grad is not None]
        if not moved:
            return
        means = [self.state[p]["exp_avg"] / (1 - group["momentum"] ** self.state[p]["step"]) for p in moved]
        scale = group["lr"] / (group["rho"] + torch.stack([m.double().square().sum() for m in means]).sum())
        for p, mean in zip(moved, means, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(mean * scale.to(mean.dtype))

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Move the momentum; `step_group` moves the parameter."""
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(g))
        state["step"] += 1
        state["exp_avg"].lerp_(g, 1 - group["momentum"])
