"""What one optimizer step did, measured from outside: it works for any optimizer and costs nothing between probes."""

from typing import Any

import torch
from torch import Tensor


class StepMetrics:
    """Compare parameters and first moments before and after a step. All of it derives from `p.grad`: post-processing.

    Args:
        optimizer: any; its first moment is read from `exp_avg`, `momentum_buffer` or a method `first_moment(p)`, and a
            method `step_metrics()`, called before the step, may return figures, or a function that gives them after it.

    Attributes:
        lr: learning rate of the step, of the first parameter group.
    """

    @torch.no_grad()
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.lr = float(optimizer.param_groups[0]["lr"])
        self.own = optimizer.step_metrics() if hasattr(optimizer, "step_metrics") else {}
        self.before = [
            (p, p.detach().clone(), _first_moment(optimizer, p), group["lr"])
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """After the step.

        Returns:
            `optimizer/effective_step`: root mean square of |Δθ|/lr over the coordinates that moved;
            `optimizer/moved_fraction`: the fraction of coordinates that moved;
            `optimizer/moment_fluctuation`: ‖m_t − m_{t−1}‖/‖m_{t−1}‖, where there is a first moment;
            `optimizer/grad_norm`: norm of the privatized gradient; and the optimizer's own.
        """
        squares = moved = total = grad = change = size = 0.0
        for p, old, moment, lr in self.before:
            difference = (p - old).double()
            squares += float(difference.square().sum()) / max(float(lr), 1e-30) ** 2
            moved += int((difference != 0).sum())
            total += p.numel()
            grad += float(p.grad.double().square().sum())
            new = _first_moment(self.optimizer, p)
            if moment is not None and new is not None:
                change += float((new - moment).double().square().sum())
                size += float(moment.double().square().sum())
        values = {
            "optimizer/effective_step": (squares / max(moved, 1)) ** 0.5,
            "optimizer/moved_fraction": moved / max(total, 1),
            "optimizer/moment_fluctuation": (change / size) ** 0.5 if size else 0.0,
            "optimizer/grad_norm": grad**0.5,
        }
        return values | (self.own() if callable(self.own) else self.own)


def _first_moment(optimizer: Any, parameter: Tensor) -> Tensor | None:
    state = optimizer.state.get(parameter)
    if not state:
        return None
    if hasattr(optimizer, "first_moment"):
        return optimizer.first_moment(parameter)
    moment = state.get("exp_avg", state.get("momentum_buffer"))
    return None if moment is None else moment.clone()
