"""Scale-then-privatize (2507.01129, algorithm 8): gradients are clipped and noised in the optimizer's own geometry.

From the raw second moment v of the privatized gradients so far, the optimizer offers a scale, elementwise:

    s = 1/(√(v + eps_root) + eps_scale),  and s = 1 before the first step
    ḡ = (Σ clip(s∘g_i) + noise)/(qN)/s     by `PrivateGradient(..., pre_clip_scale=optimizer.pre_clip_scale)`

and steps on ḡ as usual. A constant scale k with a clip norm of kC is no scale with C. The released code of DP-MicroAdam
(2511.20509) divides by s without having multiplied by it: that is a plain clip with noise of another shape, and a test
tells the two apart.

What is clipped is s∘g_i, in other units. Where ḡ is mostly noise, √v is about σC/(qN)/s; so while σC/(qN) is well
below 1, s settles at 1/eps_scale everywhere, and the clip is one at C·eps_scale. The first step, at s = 1, has a noise
that is 1/eps_scale times that of the later ones and stays in v for 1/(1 − β₂) steps: with the 1e-2 of the released code
the learning rate has to grow tenfold to make up for it. Here eps_scale is .1, about the largest noise of a training on
digits at s = 1. A geometry that differs much between coordinates wants a larger clip norm, up to about qN/σ.
"""

from typing import Any

import torch
from torch import Tensor

from dpopt.optim.base import check_options, check_origin
from dpopt.optim.microadam import MicroAdam


class _ScaleThenPrivatize(torch.optim.Optimizer):
    """What both optimizers share: the options of the scale in every parameter group, and what is refused."""

    def _offer_scale(self, eps_scale: float, eps_root: float) -> None:
        """Add the options, and one that `PrivateGradient.update_param_groups` sets once it knows the scale."""
        check_options(eps_scale=(eps_scale, 1e-12, 1e6), eps_root=(eps_root, 0, 1e6))
        options = {"eps_scale": eps_scale, "eps_root": eps_root, "pre_clip_scaled": None}
        self.defaults.update(options)
        for group in self.param_groups:
            group.update({name: group.get(name, value) for name, value in options.items()})

    def step(self, closure: Any = None) -> Any:
        """Take one step; raises ValueError where gradients were not scaled before the clip."""
        if any(group["pre_clip_scaled"] is not True for group in self.param_groups):
            raise ValueError(
                f"{type(self).__name__} steps on gradients that were not scaled before the clip: pass "
                "pre_clip_scale=optimizer.pre_clip_scale to PrivateGradient, and call "
                "private.update_param_groups(optimizer) after private.backward(batch)"
            )
        return super().step(closure)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_origin(self, state_dict)
        super().load_state_dict(state_dict)

    def pre_clip_scale(self, parameter: Tensor) -> Tensor | None:
        """s, of the parameter's shape; None before its first step."""
        if (v := self._second_moment(parameter)) is None:
            return None
        group = next(group for group in self.param_groups if any(p is parameter for p in group["params"]))
        return scale_of(v.view(parameter.shape), group["eps_scale"], group["eps_root"])

    def _second_moment(self, parameter: Tensor) -> Tensor | None:
        raise NotImplementedError


class AdamSTP(_ScaleThenPrivatize, torch.optim.Adam):
    """torch's Adam, with a scale for the gradients to come.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the denominator of the step.
        weight_decay: added to the gradient.
        eps_scale: added to the denominator of the scale.
        eps_root: added under its root.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        eps_scale: float = 0.1,
        eps_root: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._offer_scale(eps_scale, eps_root)

    def _second_moment(self, parameter: Tensor) -> Tensor | None:
        found: Tensor | None = self.state.get(parameter, {}).get("exp_avg_sq")
        return found


class MicroAdamSTP(_ScaleThenPrivatize, MicroAdam):
    """MicroAdam, with a scale from the second moment over its window: s is 1/eps_scale outside of it.

    Args:
        params: parameters or parameter groups.
        eps_scale: added to the denominator of the scale.
        eps_root: added under its root.
        options: of `MicroAdam`.
    """

    def __init__(self, params: Any, eps_scale: float = 0.1, eps_root: float = 0.0, **options: Any) -> None:
        super().__init__(params, **options)
        self._offer_scale(eps_scale, eps_root)

    def _second_moment(self, parameter: Tensor) -> Tensor | None:
        return self.second_moment(parameter) if self.state.get(parameter, {}).get("step") else None


def scale_of(v: Tensor, eps_scale: float, eps_root: float) -> Tensor:
    """1/(√(v + eps_root) + eps_scale)."""
    return 1 / ((v + eps_root).sqrt() + eps_scale)
