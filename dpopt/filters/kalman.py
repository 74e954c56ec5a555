"""DiSK (2410.03883): a simplified Kalman filter over privatized gradients, around any optimizer.

With d = θ_t − θ_{t−1} the last move, the gradient of an example is taken ahead of and at the present point,

    g_i = c·∇f_i(θ + γd) + (1 − c)·∇f_i(θ),    c = (1 − κ)/(κγ)

clipped, summed and noised as one, and the result g is filtered:

    g̃ ← (1 − κ)·g̃ + κ·g

The first part needs the parameters only, the second is post-processing: ε does not change. With γ = (1 − κ)/κ, c is 1
and one gradient is enough. Public code exchanges κ and 1 − κ; this follows the paper. That g̃ starts as the first
gradient is our reading.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dpopt.privacy.private_gradient import Point


class Kalman:
    """The filter: `PrivateGradient` gets `query_points`; call `apply` between its `backward` and the optimizer's step.

    Args:
        parameters: those that are trained.
        kappa: κ, the weight of the new gradient, in (0, 1].
        gamma: γ, how far ahead along the last move, in units of it; None for (1 − κ)/κ, which takes one gradient.

    Raises:
        ValueError: for a value outside its range.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], kappa: float = 0.7, gamma: float | None = 0.5) -> None:
        if not 0 < kappa <= 1:
            raise ValueError(f"kappa={kappa} must lie in (0, 1]")
        if gamma is not None and not gamma > 0:
            raise ValueError(f"gamma={gamma} must be positive, or null for one gradient per step")
        self.parameters = [p for p in parameters if p.requires_grad]
        self.kappa = kappa
        self.gamma = (1 - kappa) / kappa if gamma is None else gamma
        self.ahead = 1.0 if gamma is None or kappa == 1 else (1 - kappa) / (kappa * gamma)
        self.before: list[Tensor] = []
        self.filtered: list[Tensor] = []

    @property
    def cost(self) -> int:
        """Gradients that a step takes."""
        return 1 if self.ahead == 1 else 2

    @torch.no_grad()
    def query_points(self) -> list[Point]:
        """Weights and displacements at which the gradients of this step are taken."""
        moved = None
        if self.before:
            pairs = zip(self.parameters, self.before, strict=True)
            moved = {p: (p.detach() - old).mul_(self.gamma) for p, old in pairs}
        self.before = [p.detach().clone() for p in self.parameters]
        if moved is None or self.kappa == 1:
            return [(1.0, None)]
        return [(1.0, moved)] if self.ahead == 1 else [(self.ahead, moved), (1 - self.ahead, None)]

    @torch.no_grad()
    def apply(self) -> None:
        """Replace every p.grad by its filtered value."""
        gradients = [p.grad for p in self.parameters]
        if any(g is None for g in gradients):
            raise ValueError("a parameter has no gradient: call PrivateGradient.backward before the filter")
        if not self.filtered:
            self.filtered = [g.clone() for g in gradients if g is not None]
        for g, filtered in zip(gradients, self.filtered, strict=True):
            assert g is not None
            g.copy_(filtered.lerp_(g, self.kappa))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"before": list(self.before), "filtered": list(self.filtered)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        for name in ("before", "filtered"):
            setattr(self, name, [t.to(p.device).clone() for t, p in zip(state[name], self.parameters, strict=False)])
