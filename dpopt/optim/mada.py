"""MADA (Ozkara et al., 2401.08893): an optimizer between Adam, Adan, Yogi and AVGrad that learns where it stands.

With d = g − g₋, the change of the gradient (0 at first), and all past quantities ₋ starting at 0,

    m̄ ← β₁m̄ + (1 − β₁)g,   n ← β₃n + (1 − β₃)d,   ĝ = g + β₃d                   β₃ = 0 without Adan
    ṽ ← β₂ṽ + (1 − β₂)(c·ĝ² + (1 − c)(v₋ + ĝ²·sign(ĝ² − v₋)))                    c = 1 without Yogi
    v̄ ← v̄ + (ṽ − v̄)/t,   v = ρṽ + (1 − ρ)v̄                                      ρ = 1 without AVGrad
    w₁ ← β₁w₁ + 1 − β₁,   w₂ ← β₂w₂ + 1 − β₂                                       Adam's 1 − βᵗ while β stays
    u = (m̄/w₁ + β₃n)/(√(v/w₂) + ε),   θ ← θ(1 − lr·weight_decay) − lr·u

and each coefficient q of β₁, β₂, β₃, c, ρ follows its hyper-gradient, that of the next loss through this step alone:

    q ← clip(q + hyper_lr·lr·⟨g₊, ∂u/∂q⟩), g₊ the next gradient

So q is a function of privatized gradients: post-processing. g₊ has noise that u does not know, so the hyper-gradient is
unbiased; at a small ε it is mostly noise. The paper was not at hand, only digests of it. Our reading: AVGrad's mean (of
ṽ, from the first step), the bias corrections (the digests leave them out; n has none), that v₋, w₋ and other past
quantities count as constants, that one set of coefficients serves a parameter group, and every default. Their bounds
are our own: c and ρ stay in [0, 1], and 1 − β within a factor of ten of where it began. Without them β₂ falls to 0 in
the first steps, where ⟨g₊, ∂u/∂β₂⟩ is of the order of 1/(1 − β₂), and training diverges.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpopt.optim.base import BELOW_ONE, PerTensorOptimizer, check_options

_SPAN = 10.0  # by which 1 − β may grow or shrink
_PAST = ("exp_avg", "exp_avg_change", "last_grad", "exp_avg_sq", "mean_sq", "weight", "weight_sq")


class MADA(PerTensorOptimizer):
    """Adam at first, with coefficients that follow their hyper-gradients.

    Args:
        params: parameters or parameter groups. The coefficients of a group are its options `betas`, `c` and `rho`.
        lr: learning rate.
        betas: β₁, β₂ and β₃: decay of the first moment, of the second, and of the change of the gradient.
        c: share of Adam's second moment; the rest is Yogi's.
        rho: share of the second moment itself; the rest is its mean over all steps (AVGrad).
        hyper_lr: learning rate of the coefficients; 0 leaves them as they are.
        eps: added to the denominator.
        weight_decay: decoupled.

    Raises:
        ValueError: for an option outside its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.0),
        c: float = 1.0,
        rho: float = 1.0,
        hyper_lr: float = 0.1,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if len(betas) != 3:
            raise ValueError(f"betas={tuple(betas)} must be three decays: of m, of v, and of the gradient's change")
        check_options(lr=(lr, 0, 1e6), c=(c, 0, 1), rho=(rho, 0, 1), hyper_lr=(hyper_lr, 0, 1e6), eps=(eps, 0, 1e6))
        check_options(**{f"betas[{i}]": (beta, 0, BELOW_ONE) for i, beta in enumerate(betas)})
        check_options(weight_decay=(weight_decay, 0, 1e6))
        options = dict(first_betas=list(betas), hyper_lr=hyper_lr, eps=eps, weight_decay=weight_decay)
        super().__init__(params, dict(lr=lr, betas=list(betas), c=c, rho=rho, **options))

    def step_metrics(self) -> Callable[[], dict[str, float]]:
        """Return a function that gives the coefficients of the first group, as `optimizer/beta1` … `optimizer/rho`."""
        names = ("beta1", "beta2", "beta3", "c", "rho")

        def after() -> dict[str, float]:
            group = self.param_groups[0]
            values = (*group["betas"], group["c"], group["rho"])
            return {f"optimizer/{name}": float(value) for name, value in zip(names, values, strict=True)}

        return after

    def step_group(self, group: dict[str, Any]) -> None:
        """Move the coefficients by what the gradients say of the last step, then the parameters."""
        self._learn(group)
        super().step_group(group)

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        g = g.to(torch.promote_types(g.dtype, torch.float32))  # a decay of 0.999 is 1 in bf16
        if not state:
            state.update({name: torch.zeros_like(g) for name in _PAST}, step=0, rho=group["rho"])
            state.update(last_grad=g.clone(), weight=g.new_zeros(()), weight_sq=g.new_zeros(()))
        state.update(step=state["step"] + 1, grad=g.clone(), lr=group["lr"])
        u, _ = _direction(_coefficients(group, g), state, group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(u.to(p.dtype), alpha=group["lr"])

    def _learn(self, group: dict[str, Any]) -> None:
        """Close the last step of every parameter, and move the coefficients that it was taken with."""
        ascent: Tensor | None = None
        for p in group["params"]:
            state = self.state.get(p, {})
            if "grad" not in state:  # before the first step, or no gradient in the last one
                continue
            q = _coefficients(group, state["grad"]).requires_grad_()
            with torch.enable_grad():
                u, now = _direction(q, state, group["eps"])
                if p.grad is not None and group["hyper_lr"]:
                    slope = (p.grad.to(u.dtype) * u).sum() * state["lr"]
                    found = torch.autograd.grad(slope, q)[0].double()
                    ascent = found if ascent is None else ascent + found.to(ascent.device)
            state.update({name: value.detach() for name, value in zip(_PAST, now, strict=True)}, rho=group["rho"])
            del state["grad"]
        ascent = None if ascent is None else ascent.cpu()  # once, as a GPU is waited for
        if ascent is None or not ascent.isfinite().all():
            return
        low = [max(0.0, 1 - _SPAN * (1 - beta)) for beta in group["first_betas"]] + [0.0, 0.0]
        high = [1 - (1 - beta) / _SPAN for beta in group["first_betas"]] + [1.0, 1.0]
        q = _coefficients(group, ascent) + group["hyper_lr"] * ascent
        *betas, c, rho = q.clamp(q.new_tensor(low), q.new_tensor(high)).tolist()
        group.update(betas=betas, c=c, rho=rho)


def _coefficients(group: dict[str, Any], like: Tensor) -> Tensor:
    """Stack β₁, β₂, β₃, c, ρ of a group; filled in on the device, so that nothing is copied there."""
    return torch.stack([like.new_full((), value) for value in (*group["betas"], group["c"], group["rho"])])


def _direction(q: Tensor, state: dict[str, Any], eps: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return u, and what the next step has as its past, as functions of the coefficients."""
    (b1, b2, b3, c, rho), g, t = q.unbind(), state["grad"], state["step"]
    m, n, last, v, mean, weight, weight_sq = (state[name] for name in _PAST)
    change = g - last
    m, n = b1 * m + (1 - b1) * g, b3 * n + (1 - b3) * change
    past, square = state["rho"] * v + (1 - state["rho"]) * mean, (g + b3 * change).square()
    v = b2 * v + (1 - b2) * (c * square + (1 - c) * (past + square * (square - past).sign()))
    mean = mean + (v - mean) / t
    weight, weight_sq = b1 * weight + (1 - b1), b2 * weight_sq + (1 - b2)
    second = (rho * v + (1 - rho) * mean) / weight_sq
    tiny = torch.finfo(g.dtype).tiny  # the root of 0 has no derivative
    u = (m / weight + b3 * n) / (second.clamp(min=tiny).sqrt() + eps)
    return u, (m, n, g, v, mean, weight, weight_sq)
