"""The clip norm that follows a quantile of the gradients' norms, privately (Andrew et al., 2021, 1905.03871).

    b̃ = ½ + (Σ_{i in batch} (1[‖g_i‖ ≤ C] − ½) + N(0, σ_b²))/(qN)          the fraction that is not clipped
    C ← C·exp(−lr·(b̃ − quantile))

The count is centered: one example more or less moves it by ½, and an example that is not there adds 0. Count and sum of
gradients are one Gaussian release: over their sensitivities ½ and C their noise is 2σ_b and z_Δ, and together they cost
what a single release with z = (z_Δ⁻² + (2σ_b)⁻²)^(−1/2) does. The plan's noise multiplier is z, from which
`PrivacyPlan.gradient_noise_multiplier` derives z_Δ > z, so the count is in ε and no data is spent on it otherwise.

DP-Adam-AC (2510.05288) takes C from a percentile of the raw history of norms, which is not private; this one is.
"""

import math
from typing import Any

import torch


def check_positive(name: str, value: float) -> None:
    """Refuse what is not positive, or so small or large that the square of a gradient leaves the range of fp32.

    Raises:
        ValueError: naming it.
    """
    if not 1e-12 <= value <= 1e30:
        raise ValueError(f"{name}={value} must be a positive number between 1e-12 and 1e30")


class Adaptive:
    """A flat clip at a quantile of the norms.

    Args:
        clip_norm: C at the start.
        quantile: fraction of the examples that is to stay unclipped.
        lr: of the clip norm, in its logarithm.
        count_noise: σ_b, that of the plan; None for whatever the plan says (`run.py`: a twentieth of the batch).
        bounds: C stays within these multiples of its first value.

    Raises:
        ValueError: for a value outside its range.
    """

    def __init__(
        self,
        clip_norm: float,
        quantile: float = 0.8,
        lr: float = 0.2,
        count_noise: float | None = None,
        bounds: tuple[float, float] = (0.01, 100.0),
    ) -> None:
        positive = {"clip_norm": clip_norm, "smallest clip norm": clip_norm * bounds[0], "lr": lr}
        for name, value in (positive | ({} if count_noise is None else {"count_noise": count_noise})).items():
            check_positive(name, value)
        if not 0 < quantile < 1:
            raise ValueError(f"quantile={quantile} must be a fraction between 0 and 1")
        if not 0 < bounds[0] <= 1 <= bounds[1] < math.inf:
            raise ValueError(f"bounds={bounds} must be a number up to 1 and one from 1")
        self.clip_norm, self.quantile, self.lr, self.count_noise = clip_norm, quantile, lr, count_noise
        self.limits = (clip_norm * bounds[0], clip_norm * bounds[1])
        self.clip_rate = 1 - quantile
        self.coordinates = 0  # that an example has besides its gradient (`Slack`)

    @property
    def sensitivity(self) -> float:
        return self.clip_norm

    def count_std(self, batch_size: int) -> float:
        """Return σ_b, a twentieth of the batch where it was left open; 0 where nothing is counted."""
        return 0.0 if self.coordinates else self.count_noise or batch_size / 20

    def weight(self, norm: torch.Tensor) -> torch.Tensor:
        """min(1, C/‖g‖)."""
        return (self.clip_norm / norm).clamp(max=1.0)

    def count(self, norm: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Σ (1[‖g‖ ≤ C] − ½) over the examples that are present, a float64 scalar; raw, hence private."""
        return torch.where(present, (norm <= self.clip_norm).double() - 0.5, 0.0).sum()

    def observe(self, count: float, batch_size: float) -> None:
        """Move C by a count that has been noised.

        Args:
            count: the noised count.
            batch_size: the expected batch size qN.
        """
        fraction = 0.5 + count / batch_size
        self.clip_rate = 1 - fraction
        moved = self.clip_norm * math.exp(-self.lr * (fraction - self.quantile))
        self.clip_norm = min(max(moved, self.limits[0]), self.limits[1])

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"clip_norm": self.clip_norm, "clip_rate": self.clip_rate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.clip_norm, self.clip_rate = float(state["clip_norm"]), float(state["clip_rate"])


class Slack(Adaptive):
    """The same clip, which learns the norms at no privacy cost (SlaClip, ICML 2026).

    What a gradient leaves of the sensitivity is filled: an example has K coordinates more, each holds at most
    λ = C/√K, and they are filled one after the other until they hold √K·(C − n) = λ·u together, where n is the norm of
    the clipped gradient and u = K·(1 − n/C). Of these, ⌊u⌋ are full and one holds the rest, so with the gradient

        n² + Σ_j s_j² ≤ n² + λ²·u = n² + C·(C − n) = C² − n·(C − n) ≤ C²

    because x² ≤ x for the rest x < 1. The sensitivity stays C, and sums of gradients and of these coordinates are one
    Gaussian release, so σ is what it is without them. Divided by λ·qN, coordinate j is the share of the batch with a
    norm below about C·(1 − (j + ½)/K), with noise of σ·√K/(qN). The first one moves C. It counts gradients that
    are barely shorter than C in part, and is not centered, so it moves with the number of examples in the batch.

    Args:
        clip_norm: C at the start.
        quantile: fraction of the examples that is to stay unclipped.
        lr: of the clip norm, in its logarithm.
        coordinates: K.
        bounds: C stays within these multiples of its first value.

    Attributes:
        shares: of the expected batch, noised, by coordinate, as of the last step.

    Raises:
        ValueError: for a value outside its range.
    """

    def __init__(
        self,
        clip_norm: float,
        quantile: float = 0.8,
        lr: float = 0.2,
        coordinates: int = 16,
        bounds: tuple[float, float] = (0.01, 100.0),
    ) -> None:
        super().__init__(clip_norm, quantile, lr, None, bounds)
        if not 1 <= coordinates <= 4096:
            raise ValueError(f"coordinates={coordinates} must be a number from 1 to 4096")
        self.coordinates = int(coordinates)
        self.shares: list[float] = []

    def fill(self, norm: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Sum the coordinates (K,) of the examples that are present; raw, hence private.

        Args:
            norm: of the clipped gradients, (B,).
            present: (B,); the others add nothing.
        """
        free = self.coordinates * (1 - norm / self.clip_norm)
        filled = (free[:, None] - torch.arange(self.coordinates, device=norm.device)).clamp(0, 1)
        return torch.where(present[:, None], filled, 0.0).sum(0) * (self.clip_norm / self.coordinates**0.5)

    def observe_shares(self, released: torch.Tensor) -> None:
        """Move C by what was released of the coordinates, (K,), noised and divided by qN."""
        self.shares = (released.double() * (self.coordinates**0.5 / self.clip_norm)).cpu().tolist()
        self.observe(self.shares[0] - 0.5, 1.0)
