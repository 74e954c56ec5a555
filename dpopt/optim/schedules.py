"""Learning-rate schedules that torch lacks."""

import math

import torch
from torch.optim.lr_scheduler import LRScheduler


class ClipRate(LRScheduler):
    """The learning rate of DP-Adam-AC (2510.05288), which follows the fraction ρ of examples that were clipped:

        lr ← lr·exp(rate·(target − ρ)), within `bounds` times its first value

    ρ is the privatized clip rate of an adaptive clip rule, which `PrivateGradient.update_param_groups` writes into the
    parameter groups; without one, as in a run without privacy, the learning rate stays. The paper's law was not at
    hand: this one is our reading.

    Args:
        optimizer: whose learning rates move.
        target: the clip rate at which they stand still; the clip's quantile should be 1 − target.
        rate: of the move.
        bounds: smallest and largest multiple of the first learning rate.
        last_epoch: as in torch.

    Raises:
        ValueError: for a value outside its range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        target: float = 0.2,
        rate: float = 0.1,
        bounds: tuple[float, float] = (0.1, 10.0),
        last_epoch: int = -1,
    ) -> None:
        if not (0 < target < 1 and rate > 0 and 0 < bounds[0] <= 1 <= bounds[1]):
            raise ValueError(f"target={target}, rate={rate}, bounds={bounds}: a fraction, a positive number, around 1")
        self.target, self.rate, self.bounds = target, rate, tuple(bounds)
        for group in optimizer.param_groups:
            group.setdefault("clip_rate", math.nan)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Compute the learning rates of the next step."""
        groups = self.optimizer.param_groups
        if self.last_epoch == 0:
            return [group["lr"] for group in groups]
        if any(math.isnan(group["clip_rate"]) for group in groups):
            return [group["lr"] for group in groups]
        moved = [group["lr"] * math.exp(self.rate * (self.target - group["clip_rate"])) for group in groups]
        low, high = self.bounds
        return [min(max(lr, low * base), high * base) for lr, base in zip(moved, self.base_lrs, strict=True)]
