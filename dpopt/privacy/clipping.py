"""Clip rules: the weight by which an example's gradient enters the sum, and the sensitivity that follows.

A rule is a frozen record with `sensitivity`, the bound S such that ‖w(‖g‖)·g‖ ≤ S for every g, and `weight(norm)`. The
noise reads S from the rule, and nothing else states it.

| rule      | w(g)            | S | source                       |
|-----------|-----------------|---|------------------------------|
| Flat      | min(1, C/‖g‖)   | C | Abadi et al., 1607.00133     |
| Automatic | C/(‖g‖ + γ)     | C | Bu et al. (AUTO-S), 2206.07136 |
"""

from dataclasses import dataclass
from typing import Protocol

import torch


class ClipRule(Protocol):
    """What the engine asks of a clip rule."""

    @property
    def sensitivity(self) -> float:
        """The largest norm that a weighted gradient can have."""
        ...

    def weight(self, norm: torch.Tensor) -> torch.Tensor:
        """Weights for gradients of these norms; both of shape (examples,), in the norms' dtype."""
        ...


@dataclass(frozen=True)
class Flat:
    """Scale gradients longer than `clip_norm` down to it (Abadi et al., 2016).

    Raises:
        ValueError: for a clip norm that is not positive and finite.
    """

    clip_norm: float

    def __post_init__(self) -> None:
        _check_positive(clip_norm=self.clip_norm)

    @property
    def sensitivity(self) -> float:
        return self.clip_norm

    def weight(self, norm: torch.Tensor) -> torch.Tensor:
        return (self.clip_norm / norm).clamp(max=1.0)


@dataclass(frozen=True)
class Automatic:
    """Normalise every gradient to nearly `clip_norm`; `gamma` keeps the order of small ones (Bu et al., 2022, AUTO-S).

    Raises:
        ValueError: for a clip norm or a gamma that is not positive and finite.
    """

    clip_norm: float
    gamma: float = 0.01

    def __post_init__(self) -> None:
        _check_positive(clip_norm=self.clip_norm, gamma=self.gamma)

    @property
    def sensitivity(self) -> float:
        return self.clip_norm

    def weight(self, norm: torch.Tensor) -> torch.Tensor:
        return self.clip_norm / (norm + self.gamma)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} must be a positive number")
