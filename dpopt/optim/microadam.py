"""MicroAdam (Modoranu et al., 2405.15593); on privatised gradients it is DP-MicroAdam (2511.20509).

With g the gradient, e the error feedback, and a window of the last m sparse gradients (I, V), a step t = 1, 2, … is

    a = g + e                                    accumulate
    (I, V) = TopK(|a|),  k = ⌈density·d⌉         select, into row t mod m of the window
    e = a, zero at I                             keep the rest for later
    m̂ = (1 − β₁)/(1 − β₁ᵗ) · Σ β₁^age V          first moment, over the window
    v̂ = (1 − β₂)/(1 − β₂ᵗ) · Σ β₂^age V²         second moment, over the window
    θ ← θ(1 − lr·weight_decay) − lr·m̂/(ε + √v̂)

As in the paper, selection is per tensor and error feedback is unquantised (`bits=32`). A coordinate outside the window
has m̂ = 0 and does not move. β₂ᵗ keeps shrinking while the window forgets, so with β₂ = .999 and m = 10 the step of an
always-selected coordinate grows from lr to about 6.5·lr: learning rates do not carry over from Adam.

Tensors of at most `dense_size` elements (biases, norms, small layers) select every coordinate: they are a fraction of a
percent of a model, and on digits at ε = 8 sparsifying them costs accuracy (docs/concepts.md has the figures).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def microadam_step(
    parameter: Tensor,
    gradient: Tensor,
    feedback: Tensor | None,
    indices: Tensor,
    values: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step on one tensor of d elements, in place.

    Args:
        parameter: any shape, contiguous or not.
        gradient: the same shape.
        feedback: error feedback (d,); None drops what is not selected.
        indices: the window's positions (m, k), int32; k is the number of coordinates selected.
        values: the window's values (m, k).
        step: t, from 1.
        lr: learning rate.
        betas: β₁, β₂.
        eps: ε of the denominator.
        weight_decay: decoupled.
    """
    window, k = indices.shape
    accumulated = gradient.flatten().to(values.dtype)
    if feedback is not None:
        accumulated = feedback.add_(accumulated)  # the buffer itself: what is selected below is zeroed in place
    if k < len(accumulated):
        selected = accumulated.abs().topk(k, sorted=False).indices
    else:
        selected = torch.arange(k, device=accumulated.device)
    row = (step - 1) % window
    indices[row] = selected
    values[row] = accumulated[selected]
    if feedback is not None:
        feedback[selected] = 0

    first, second = window_moments(indices, values, step, betas, len(accumulated))
    update = first.div_(second.sqrt_().add_(eps)).view(parameter.shape)
    if weight_decay:
        parameter.mul_(1 - lr * weight_decay)
    parameter.add_(update.to(parameter.dtype), alpha=-lr)


def window_moments(
    indices: Tensor, values: Tensor, step: int, betas: tuple[float, float], size: int
) -> tuple[Tensor, Tensor]:
    """The bias-corrected moments m̂ and v̂ after `step` steps, dense, (size,)."""
    window = len(indices)
    rows = min(step, window)
    # Row r was written at the latest step s ≤ step with (s − 1) mod window = r.
    age = (step - 1 - torch.arange(rows, dtype=torch.float64, device=values.device)) % window
    positions = indices[:rows].flatten().long()
    moments = []
    for beta, powers in zip(betas, (values[:rows], values[:rows].square()), strict=True):
        weights = (beta**age * (1 - beta) / (1 - beta**step)).to(values.dtype)
        dense = torch.zeros(size, dtype=values.dtype, device=values.device)
        moments.append(dense.index_add_(0, positions, (weights[:, None] * powers).flatten()))
    return moments[0], moments[1]


class MicroAdam(torch.optim.Optimizer):
    """Adam over a sliding window of sparse gradients with error feedback.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the denominator.
        weight_decay: decoupled.
        density: fraction of each tensor's coordinates selected in a step, in (0, 1].
        window: number of past sparse gradients that the moments see.
        bits: precision of the error feedback; 32 keeps it in the parameter's dtype.
        error_feedback: carry what was not selected over to later steps; off, it is dropped.
        dense_size: tensors of at most this many elements select every coordinate.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        density: float = 0.01,
        window: int = 10,
        bits: int = 32,
        error_feedback: bool = True,
        dense_size: int = 1024,
    ) -> None:
        ranges = {
            "lr": (lr, lr >= 0, "0 or more"),
            "betas": (betas, all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"),
            "eps": (eps, eps > 0, "positive"),
            "weight_decay": (weight_decay, weight_decay >= 0, "0 or more"),
            "density": (density, 0 < density <= 1, "in (0, 1]"),
            "window": (window, window >= 1, "at least 1"),
            "bits": (bits, bits == 32, "32: this version keeps the error feedback unquantised"),
            "dense_size": (dense_size, dense_size >= 0, "0 or more"),
        }
        for name, (value, good, meaning) in ranges.items():
            if not good:
                raise ValueError(f"{name}={value} must be {meaning}")
        defaults = dict(
            lr=lr,
            betas=tuple(betas),
            eps=eps,
            weight_decay=weight_decay,
            density=density,
            window=window,
            bits=bits,
            error_feedback=error_feedback,
            dense_size=dense_size,
        )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(_initial_state(parameter, group))
                state["step"] += 1
                microadam_step(
                    parameter,
                    parameter.grad,
                    state.get("error_feedback"),
                    state["window_indices"],
                    state["window_values"],
                    state["step"],
                    group["lr"],
                    group["betas"],
                    group["eps"],
                    group["weight_decay"],
                )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state, with the dtypes that it was saved in (torch would cast indices to floats)."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, name in zip(group["params"], saved["params"], strict=True):
                for key, value in state_dict["state"].get(name, {}).items():
                    if isinstance(value, Tensor):
                        self.state[parameter][key] = value.clone().to(parameter.device)

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """The norm of the error feedback over all parameters: what selection has kept back so far."""
        feedbacks = [s["error_feedback"] for s in self.state.values() if "error_feedback" in s]
        return {"optimizer/error_feedback_norm": math.sqrt(sum(float(e.double().square().sum()) for e in feedbacks))}

    @torch.no_grad()
    def first_moment(self, parameter: Tensor) -> Tensor:
        """m̂ of a parameter, dense, (d,), after at least one step."""
        state = self.state[parameter]
        betas = next(g["betas"] for g in self.param_groups if any(p is parameter for p in g["params"]))
        size = parameter.numel()
        return window_moments(state["window_indices"], state["window_values"], state["step"], betas, size)[0]


def _initial_state(parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    size = parameter.numel()
    k = size if size <= group["dense_size"] else math.ceil(group["density"] * size)
    device, dtype = parameter.device, parameter.dtype
    state = {
        "step": 0,
        "window_indices": torch.zeros(group["window"], k, dtype=torch.int32, device=device),
        "window_values": torch.zeros(group["window"], k, dtype=dtype, device=device),
    }
    if group["error_feedback"] and k < size:
        state["error_feedback"] = torch.zeros(size, dtype=dtype, device=device)
    return state
