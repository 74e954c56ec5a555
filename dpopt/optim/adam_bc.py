"""DP-AdamBC (Tang et al., 2312.14334) and DP-AdamW-BC (2511.07843): Adam without the noise's part of the second moment.

Gaussian noise of standard deviation s in every coordinate of the gradient adds s² to the expected second moment, and in
private training that is nearly all of it. With m̂ and v̂ as in Adam, the step is

    Φ ← β₂Φ + (1 − β₂)s²,   Φ̂ = Φ/(1 − β₂ᵗ)                        s² itself as long as s does not change
    θ ← θ(1 − lr·weight_decay) − lr·m̂/√max(v̂ − Φ̂, floor)          floor is the paper's γ′; there is no further ε

Public code differs: the code released with DP-MicroAdam (2511.20509) subtracts the noise of a σ that it was given once,
not of the σ that is used. Here s is an option of the parameter groups, `noise_std`. Before every step
`PrivateGradient.update_param_groups` writes it there; under adaptive clipping it moves.
"""

from typing import Any

from torch import Tensor

from dpopt.optim.base import BELOW_ONE, PerTensorOptimizer, check_options, first_and_second_moment


class AdamBC(PerTensorOptimizer):
    """Adam on noisy gradients, with the variance of the noise taken out of the second moment.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the first and second moment.
        floor: of the corrected second moment, in squared units of the gradient: a step is at most lr·m̂/√floor.
        weight_decay: decoupled.
        noise_std: standard deviation of the noise in each coordinate of the gradient; 0 for none. It must be known
            before a step: `PrivateGradient.update_param_groups` writes it.

    Raises:
        ValueError: for an option outside its range, or a step without `noise_std`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        floor: float = 1e-6,
        weight_decay: float = 0.0,
        noise_std: float | None = None,
    ) -> None:
        check_options(lr=(lr, 0, 1e6), floor=(floor, 1e-30, 1e6), weight_decay=(weight_decay, 0, 1e6))
        check_options(**{f"betas[{i}]": (beta, 0, BELOW_ONE) for i, beta in enumerate(betas)})
        super().__init__(params, dict(lr=lr, betas=betas, floor=floor, weight_decay=weight_decay, noise_std=noise_std))

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        lr, betas = group["lr"], group["betas"]
        if group["noise_std"] is None:
            raise ValueError(
                "AdamBC does not know the noise that it corrects for: call private.update_param_groups(optimizer) "
                "after private.backward(batch), or pass noise_std"
            )
        m, v = first_and_second_moment(g, state, betas)
        state["noise"] = betas[1] * state.get("noise", 0.0) + (1 - betas[1]) * group["noise_std"] ** 2
        noise = state["noise"] / (1 - betas[1] ** state["step"])
        p.mul_(1 - lr * group["weight_decay"])
        p.addcdiv_(m, (v - noise).clamp_(min=group["floor"]).sqrt_(), value=-lr)
