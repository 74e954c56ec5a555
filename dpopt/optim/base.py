"""The walk over parameter groups that optimizers of one tensor at a time share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BELOW_ONE = 1 - 1e-9  # the largest decay


class PerTensorOptimizer(torch.optim.Optimizer):
    """An optimizer that is a function of one tensor, its gradient and its state: subclasses write `update`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.step_group(group)
        return loss

    def step_group(self, group: dict[str, Any]) -> None:
        """Step the parameters of a group that have a gradient."""
        for parameter in group["params"]:
            if parameter.grad is not None:
                self.update(parameter, parameter.grad, self.state[parameter], group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_origin(self, state_dict)
        super().load_state_dict(state_dict)
        keep_dtypes(self, state_dict)

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Step one parameter in place.

        Args:
            p: the parameter.
            g: its gradient, of the same shape.
            state: its state, empty at first.
            group: the options.
        """
        raise NotImplementedError


def check_origin(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Refuse the state of another optimizer.

    Raises:
        ValueError: naming the options that its parameter groups lack.
    """
    missing = sorted({key for group in state_dict["param_groups"] for key in set(optimizer.defaults) - set(group)})
    if missing:
        name = type(optimizer).__name__
        raise ValueError(
            f"this state is of another optimizer than {name}, because its parameter groups lack {', '.join(missing)}: "
            f"load a state of {name}, or begin without one"
        )


def keep_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Give tensors of a state that was loaded the dtypes that it was saved in: torch casts codes to floats."""
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for parameter, name in zip(group["params"], saved["params"], strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                if isinstance(value, Tensor):
                    optimizer.state[parameter][key] = value.to(parameter.device)


def check_options(**ranges: tuple[float, float, float]) -> None:
    """Refuse options outside their range: name=(value, smallest, largest).

    Raises:
        ValueError: naming the option.
    """
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise ValueError(f"{name}={value} must lie between {low:g} and {high:g}")


def first_and_second_moment(g: Tensor, state: dict[str, Any], betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Adam's two moments in `state`, moved by a gradient, and returned with their bias corrected.

    m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,  m̂ = m/(1 − β₁ᵗ),  v̂ = v/(1 − β₂ᵗ)
    """
    if not state:
        state.update(step=0, exp_avg=torch.zeros_like(g), exp_avg_sq=torch.zeros_like(g))
    state["step"] += 1
    m, v = state["exp_avg"], state["exp_avg_sq"]
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    return m / (1 - betas[0] ** state["step"]), v / (1 - betas[1] ** state["step"])
