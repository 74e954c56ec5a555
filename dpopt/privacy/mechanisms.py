"""What the noise of a step is made of, which sampler goes with it, and what both cost.

The noise of step t is σS·n_t, with n = C⁻¹z for standard Gaussian z_0, z_1, … and a lower triangular Toeplitz C that
is public. Each mechanism states n_t as a recursion over keyed draws and earlier noises,

    n_t = Σ_i draws_i·z_{t−i} − Σ_{j≥1} feedback_j·n_{t−j}.

Why this is private: let x_t be the clipped sum of step t over its sensitivity S_t. S_t, and whatever else decides x_t,
depends on earlier releases only. Releasing x + σC⁻¹z is releasing Cx + σz, because C is invertible and public, and S_t
times row t of it is post-processing. Hence noise is scaled by S_t after it is correlated, and a clip norm that moves by
what was released, a scale or a filter leaves ε as it is (the noise then cancels less over steps: that is accuracy). One
example adds a vector of norm ≤ 1 to x_t in the steps that it takes part in, so it moves Cx by columns of C.

Samplers: an example's group is its own coin, drawn once, uniform over `groups`. Step t draws from group t mod
`groups` only, each of its examples by a coin of probability q·groups. As groups and coins are independent between
examples, one example added or removed changes nothing for the others. One group is plain Poisson sampling.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Recursion = tuple[tuple[float, ...], tuple[float, ...]]  # draws, feedback
_DIGITS = 6  # of coefficients: beyond, processors differ


@dataclass(frozen=True)
class Gaussian:
    """Independent noise in every step, under Poisson sampling: DP-SGD's."""

    kept = 0

    def groups(self, sample_rate: float) -> int:
        """Return the number of groups of the sampler."""
        return 1

    def check(self, sample_rate: float, steps: int) -> None:
        """Accept every plan."""

    def recursion(self, steps: int) -> Recursion:
        """Return weights of draws and of earlier noises, for a plan of so many steps."""
        return (1.0,), ()

    def composition(self, sample_rate: float, steps: int) -> tuple[float, float, int]:
        """Return sensitivity, sample rate and number of the subsampled Gaussians that so many steps compose."""
        return 1.0, sample_rate, steps

    def to_dict(self, steps: int) -> dict[str, Any]:
        """Return what a plan records."""
        return {"name": "gaussian"}


@dataclass(frozen=True)
class BandMF:
    """Noise that cancels over steps, by a C of b bands (Choquette-Choo et al., 2306.08153), under cyclic sampling.

    C's columns have norm 1, or less at the end. Between two steps that an example may take part in lie b steps or more,
    so its columns have no row in common. The rows of one such column are a Gaussian of sensitivity 1 that is sampled
    with probability qb, given all rows before. At most ⌈T/b⌉ of them are composed, whatever the group of the example,
    and a mixture over groups costs no more than the worst. A noised count of an adaptive clip rule moves by ½ in one
    row of the block: over their noise both shifts together are 1/σ, as in independent steps.

    Args:
        bands: b. The last b − 1 noises are kept, in the dtype of the sum.

    Raises:
        ValueError: for less than two bands.
    """

    bands: int = 8

    def __post_init__(self) -> None:
        if self.bands < 2:
            raise ValueError(f"mechanism.bands={self.bands} correlates nothing: take 2 or more, or mechanism=gaussian")

    @property
    def kept(self) -> int:
        """How many vectors of noise are kept."""
        return self.bands - 1

    def groups(self, sample_rate: float) -> int:
        """Return the number of groups of the sampler."""
        return self.bands

    def check(self, sample_rate: float, steps: int) -> None:
        """Refuse a plan in which a group cannot fill a batch, or is never drawn.

        Raises:
            ValueError: naming the number of bands that fits.
        """
        if (most := min(_batches(sample_rate), steps)) < self.bands:
            fix = f"set mechanism.bands={most}, or a smaller batch_size" if most > 1 else "choose mechanism=gaussian"
            raise ValueError(
                f"mechanism.bands={self.bands} samples at so many times the rate {sample_rate:.4g}, at most at 1, and "
                f"wants as many of the {steps:,} steps: {fix}"
            )

    def recursion(self, steps: int) -> Recursion:
        """Return weights of draws and of earlier noises: n_t = (z_t − Σ c_j n_{t−j})/c_0."""
        first, *others = coefficients(self.bands, steps)
        return (1 / first,), tuple(c / first for c in others)

    def composition(self, sample_rate: float, steps: int) -> tuple[float, float, int]:
        """Return sensitivity, sample rate and number of the subsampled Gaussians that so many steps compose."""
        return 1.0, min(1.0, sample_rate * self.bands), -(-steps // self.bands)

    def to_dict(self, steps: int) -> dict[str, Any]:
        """Return what a plan records; coefficients that differ are another plan."""
        return {"name": "bandmf", "bands": self.bands, "coefficients": list(coefficients(self.bands, steps))}


@dataclass(frozen=True)
class LambdaCGD:
    """n_t = z_t − λz_{t−1} (2601.22334): noise that cancels over two steps, and nothing to keep; no amplification.

    C has the coefficients λ^k. The sampler has ⌊1/q⌋ groups, whose examples enter their batches whenever q divides 1
    (else with probability q⌊1/q⌋, which is not counted on). An example of group g moves Cx by Σ_k C_{·,g+k·groups}u_k
    with ‖u_k‖ ≤ 1. As C has no negative entry, that is longest where all u_k are equal, none is left out and g = 0.
    All rows together are one Gaussian of this sensitivity, although u_k may depend on earlier rows: Gaussians whose
    squared shifts add up to a bound on every path cost what one with that shift costs (Denisov et al., 2202.08312). The
    counts of an adaptive clip rule are paid as if each came with its own column, which is more than they cost.

    Args:
        lam: λ, in (0, 1).

    Raises:
        ValueError: for another λ.
    """

    lam: float = 0.9
    kept = 0

    def __post_init__(self) -> None:
        if not 0 < self.lam < 1:
            raise ValueError(f"mechanism.lam={self.lam} must lie between 0 and 1; 0 would be mechanism=gaussian")

    def groups(self, sample_rate: float) -> int:
        """Return the number of groups of the sampler."""
        return _batches(sample_rate)

    def check(self, sample_rate: float, steps: int) -> None:
        """Accept every plan."""

    def recursion(self, steps: int) -> Recursion:
        """Return weights of draws and of earlier noises."""
        return (1.0, -self.lam), ()

    def composition(self, sample_rate: float, steps: int) -> tuple[float, float, int]:
        """Return sensitivity, sample rate and number of the subsampled Gaussians that so many steps compose."""
        period = self.groups(sample_rate)
        starts = np.arange(0, steps, period)  # of the example's steps
        height = np.cumsum(self.lam**starts)  # of what it moves in that row, then times λ from row to row
        rows = np.minimum(period, steps - starts)
        squares = height**2 * (1 - self.lam ** (2 * rows)) / (1 - self.lam**2)
        return math.sqrt(squares.sum()), 1.0, 1

    def to_dict(self, steps: int) -> dict[str, Any]:
        """Return what a plan records."""
        return {"name": "lambda_cgd", "lambda": self.lam}


Mechanism = Gaussian | BandMF | LambdaCGD
INDEPENDENT = Gaussian()


@lru_cache(maxsize=64)
def coefficients(bands: int, steps: int) -> tuple[float, ...]:
    """Minimize the error of all prefix sums, ‖A·C⁻¹‖, over Toeplitz C of unit columns; return C's first column.

    A sums up; row t of A·C⁻¹ is the noise in the sum of the first t gradients. By L-BFGS from the coefficients of
    (1 − x)^(−½), the best without bands, up to lower terms. No data enters.
    """
    from scipy.optimize import minimize

    start = np.cumprod([1.0, *((2 * j - 1) / (2 * j) for j in range(1, bands))])
    found = minimize(_error, start[1:], args=(steps,), jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    column = np.round([1.0, *found.x], _DIGITS)
    if not _error(column[1:], steps)[0] <= _error(start[1:], steps)[0] + 1e-6:
        raise ArithmeticError(f"no coefficients found for {bands} bands and {steps:,} steps")
    return tuple((column / math.sqrt(math.fsum(column**2))).tolist())


def _error(others: NDArray, steps: int) -> tuple[float, NDArray]:
    """Return log(‖A·C⁻¹‖²·‖c‖²) for c = (1, others), and its gradient."""
    column = np.concatenate([[1.0], others])
    with np.errstate(all="ignore"):
        sums = np.cumsum(impulse((1.0,), tuple(others), steps))  # the first column of A·C⁻¹
        weighted = np.arange(steps, 0, -1) * sums  # a Toeplitz matrix has entry k in T − k rows
        total, norm = float(weighted @ sums), float(column @ column)
        slope = _filter(np.ones(1), column, sums)  # ∂(first column)/∂c_j is minus this, j later
        slopes = np.array([weighted[j:] @ slope[: steps - j] for j in range(1, len(column))])
        value = math.log(total) + math.log(norm) if 0 < total < math.inf else math.inf
        return value, 2 * others / norm - 2 * slopes / total


def _batches(sample_rate: float) -> int:
    """Count the whole batches in a dataset."""
    return math.floor(1 / sample_rate + 1e-9)  # N/batch_size misses a whole number by 1/batch_size, or by rounding


def impulse(draws: tuple[float, ...], feedback: tuple[float, ...], steps: int) -> NDArray:
    """Return the weights of z_t, z_{t−1}, … in n_t: the first column of C⁻¹, (steps,)."""
    return _filter(np.array(draws), np.array([1.0, *feedback]), np.eye(1, steps)[0])


def _filter(forward: NDArray, backward: NDArray, values: NDArray) -> NDArray:
    from scipy.signal import lfilter

    result: NDArray = lfilter(forward, backward, values)
    return result
