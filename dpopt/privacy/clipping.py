"""Clip rules: the weight by which an example's gradient enters the sum, and the sensitivity that follows.

A rule is a record with `sensitivity`, the bound S such that ‖w(‖g‖)·g‖ ≤ S for every g, and `weight(norm)`. The noise
reads S from the rule, and nothing else states it.

| rule        | w(g)                         | S   | source                                  |
|-------------|------------------------------|-----|-----------------------------------------|
| Flat        | min(1, C/‖g‖)                | C   | Abadi et al., 1607.00133                |
| Automatic   | C/(‖g‖ + γ)                  | C   | Bu et al. (AUTO-S), 2206.07136          |
| PSAC        | C/(‖g‖ + r/(‖g‖ + r))        | C   | Xia et al., 2212.00328                  |
| PSASC       | C/(s·‖g‖ + r/(‖g‖ + r))      | C/s | DP-PSASC, 2411.03059                    |
| PerLayer    | min(1, C/(√L·‖g_l‖)) of g_l  | C   | a flat clip of each of L layers         |
| Adaptive    | min(1, C_t/‖g‖)              | C_t | Andrew et al., 1905.03871 (`adaptive`)  |
| Slack       | min(1, C_t/‖g‖)              | C_t | SlaClip (`adaptive`)                    |
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from dpopt.privacy.adaptive import Adaptive, Slack, check_positive

__all__ = ["PSAC", "PSASC", "Adaptive", "Automatic", "ClipRule", "Flat", "PerLayer", "Slack"]


class ClipRule(Protocol):
    """What the engine asks of a clip rule.

    A rule with an attribute `by_layer` that is true is asked for weights of layers instead: norms and weights are then
    (examples, layers), and S bounds the norm of all weighted layers together.
    """

    @property
    def sensitivity(self) -> float:
        """The largest norm that a weighted gradient can have."""
        ...

    def weight(self, norm: torch.Tensor) -> torch.Tensor:
        """Weights for gradients of these norms; both of shape (examples,), in the norms' dtype."""
        ...


class _Positive:
    """A record of positive numbers; raises ValueError for any other."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_positive(name, value)


class _WithinClipNorm(_Positive):
    clip_norm: float

    @property
    def sensitivity(self) -> float:
        return self.clip_norm


@dataclass(frozen=True)
class Flat(_WithinClipNorm):
    """Scale gradients longer than `clip_norm` down to it (Abadi et al., 2016)."""

    clip_norm: float

    def weight(self, norm: torch.Tensor) -> torch.Tensor:
        return (self.clip_norm / norm).clamp(max=1.0)


@dataclass(frozen=True)
class Automatic(_WithinClipNorm):
    """Normalize gradients to nearly `clip_norm`; `gamma` keeps the order of small ones (Bu et al., 2022, AUTO-S)."""

    clip_norm: float
    gamma: float = 0.01

    def weight(self, norm: torch.Tensor) -> torch.Tensor:
        return self.clip_norm / (norm + self.gamma)


@dataclass(frozen=True)
class PSAC(_WithinClipNorm):
    """As `Automatic`, with a γ that falls as the gradient grows: small ones are not blown up (Xia et al., 2022)."""

    clip_norm: float
    r: float = 0.1

    def weight(self, norm: torch.Tensor) -> torch.Tensor:
        return self.clip_norm / (norm + self.r / (norm + self.r))


@dataclass(frozen=True)
class PSASC(_Positive):
    """`PSAC` with the gradient's own norm weighted by s < 1 (DP-PSASC, 2411.03059): the sensitivity is C/s.

    It is PSAC with C/s and r/s, but for the r next to ‖g‖ in the inner fraction: at a fixed learning rate a smaller s
    is also a larger step, so compare values of s at equal clip_norm/s, or with the learning rate scaled by s.
    """

    clip_norm: float
    s: float = 0.5
    r: float = 0.1

    @property
    def sensitivity(self) -> float:
        return self.clip_norm / self.s

    def weight(self, norm: torch.Tensor) -> torch.Tensor:
        return self.clip_norm / (self.s * norm + self.r / (norm + self.r))


@dataclass(frozen=True)
class PerLayer(_WithinClipNorm):
    """Clip each of L layers to clip_norm/√L, so that no layer takes the share of another.

    A layer is a module that directly holds trainable parameters, whichever way its gradients are taken.
    """

    clip_norm: float
    by_layer: ClassVar[bool] = True

    def weight(self, norm: torch.Tensor) -> torch.Tensor:
        return (self.clip_norm / norm.shape[1] ** 0.5 / norm).clamp(max=1.0)
