"""ε and σ in milliseconds, for tables of many budgets; a run takes its own from `accounting`.

With L the privacy loss of a step, δ(ε) = E[(1 − exp(ε − ΣL))₊] is an integral of the moment generating function of L
along a vertical line of the complex plane (Alghamdi et al., 2208.09595):

    δ(ε) = 1/(2πi) ∫ exp(K(z) − zε) / (z(z + 1)) dz,   K(z) = T·log E exp(zL)

The line goes through the saddle point, where the integrand hardly oscillates. The expectation is a sum over a grid of
the mechanism's outputs, and both sums converge exponentially. The accountant's loss distributions lie on a grid, which
adds to its ε. Where that may be more than 2e-4 of ε, or where a sum has not converged, the accountant answers instead.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar

from dpopt.privacy import accounting

_NEGLIGIBLE = 2e-4  # of ε, or of δ, which moves ε by less
_OUTPUTS = 12_000  # more are not worth it: the accountant is as fast
_FREQUENCIES, _CHUNKS = 32, 64  # at most 64 times 32


class _NotConverged(ArithmeticError):
    """A sum does not tell δ well enough."""


def quick_epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Compute ε as `accounting.compute_epsilon` does by PLD, to within 1e-3 of it.

    Raises:
        ValueError: for a δ at which PLD cannot answer.
    """
    if noise_multiplier == 0:
        return math.inf
    _check_delta(delta)

    def log_delta(log_epsilon: float) -> float:
        return _log_delta(noise_multiplier, sample_rate, steps, math.exp(log_epsilon))

    try:
        epsilon = _solve(log_delta, delta, (1e-4, 1e5))
        _check(noise_multiplier, sample_rate, steps, epsilon)
        return epsilon
    except ArithmeticError:
        return accounting.compute_epsilon(noise_multiplier, sample_rate, steps, delta)


def quick_noise(epsilon: float, sample_rate: float, steps: int, delta: float) -> float:
    """Compute σ as `accounting.calibrate_noise` does by PLD, to within 1e-3 of it.

    Raises:
        ValueError: for a δ at which PLD cannot answer, or when no σ reaches ε.
    """
    _check_delta(delta)

    def log_delta(log_noise: float) -> float:
        return _log_delta(math.exp(log_noise), sample_rate, steps, epsilon)

    try:
        noise = _solve(log_delta, delta, accounting.NOISE_LIMITS)
        _check(noise, sample_rate, steps, epsilon)
        return noise
    except ArithmeticError:
        return accounting.calibrate_noise(epsilon, sample_rate, steps, delta)


def _check_delta(delta: float) -> None:
    if delta <= accounting.PLD_DELTA:
        raise ValueError(
            f"delta={delta:g} is too small for PLD, which is exact above {accounting.PLD_DELTA:g}: raise delta"
        )


def _solve(log_delta: Callable[[float], float], delta: float, limits: tuple[float, float]) -> float:
    """Find where δ, which falls between the limits, is reached.

    Raises:
        _NotConverged: when it is not.
    """
    at_low, at_high = map(math.log, limits)

    def excess(x: float) -> float:
        return log_delta(x) - math.log(delta)

    low = high = 0.0  # in logarithms; near the limits sums are long
    while excess(high) > 0 and high < at_high:
        low, high = high, min(high + 1, at_high)
    while excess(low) <= 0 and low > at_low:
        low, high = max(low - 1, at_low), low
    if not excess(low) > 0 >= excess(high):
        raise _NotConverged
    return math.exp(brentq(excess, low, high, xtol=1e-6))


def _check(noise: float, sample_rate: float, steps: int, epsilon: float) -> None:
    """Check that the sums have converged, and that the accountant's grid adds little to ε.

    Raises:
        _NotConverged: where they have not, or it may add more.
    """
    _log_delta(noise, sample_rate, steps, epsilon, strict=True)
    grid = accounting.pld_grid(noise)
    saddle, _ = _Line(noise, sample_rate, steps, epsilon, True).saddle()
    # Losses spread over a grid have up to h²/4 more variance, half of that more mean: (s + 1)/2 of it goes into ε.
    if (saddle + 1) * steps * grid**2 / 8 > _NEGLIGIBLE * epsilon:
        raise _NotConverged


def _log_delta(noise: float, sample_rate: float, steps: int, epsilon: float, strict: bool = False) -> float:
    """Compute log δ(ε), the larger of those of a removed and of an added example.

    On the way to a solution a bound serves where a sum does not converge; at the solution, `strict` raises.
    """
    largest = -math.inf
    for removed in (True, False):
        line = _Line(noise, sample_rate, steps, epsilon, removed)
        saddle, bound = line.saddle()
        if bound > largest:
            try:
                largest = max(largest, line.integral(saddle))
            except _NotConverged:
                if strict:
                    raise
                largest = bound
    return largest


@dataclass(frozen=True)
class _Line:
    """The integral of δ(ε) for P = (1 − q)·N(0, σ²) + q·N(1, σ²), with the example, and Q = N(0, σ²), without."""

    noise: float
    sample_rate: float
    steps: int
    epsilon: float
    removed: bool  # L = log P/Q under P, else log Q/P under Q

    def saddle(self) -> tuple[float, float]:
        """Find the saddle point s; return it and Chernoff's bound of log δ there."""

        def value(log_s: float) -> float:
            s = math.exp(log_s)
            return float(self._exponent(np.array([s]), self._outputs(s, 0.0))[0])

        furthest = math.log(_OUTPUTS / 4 * self._spacing(0.0))
        found = minimize_scalar(value, bounds=(math.log(1e-4), furthest), method="bounded", options={"xatol": 1e-3})
        s = math.exp(found.x)
        return s, float(found.fun) + (s + 1) * math.log(s / (s + 1)) + math.log(s + 1)

    def integral(self, s: float) -> float:
        """Integrate along s + it; return log δ.

        Raises:
            _NotConverged: where the integrand does not decay.
        """
        near = s * np.array([0.99, 1.0, 1.01])
        below, at, above = self._exponent(near, self._outputs(s, 0.0))
        width = math.sqrt(max(below - 2 * at + above, 1e-12)) / (0.01 * s)  # of exp(sε)·δ(ε)
        spacing = 2 * math.pi / (40 * width)
        total = 0.5
        for chunk in range(_CHUNKS):
            t = spacing * (np.arange(_FREQUENCIES) + 1 + chunk * _FREQUENCIES)
            values = np.exp(self._exponent(s + 1j * t, self._outputs(s, float(t[-1]))) - at)
            total += float(values.real.sum())
            # The integrand decays like 1/t² at least, so that what is left out is at most so much.
            left = float(np.abs(values[-4:]).max()) * t[-1] / spacing
            if left < _NEGLIGIBLE * total:
                return at + math.log(total * spacing / math.pi)
        raise _NotConverged

    def _exponent(self, z: NDArray, x: NDArray) -> NDArray:
        """Compute K(z) − zε − log z(z + 1) from outputs x."""
        with_example = math.log(self.sample_rate) + (2 * x - 1) / (2 * self.noise**2)
        loss = np.logaddexp(math.log1p(-self.sample_rate), with_example) if self.sample_rate < 1 else with_example
        terms = np.multiply.outer(z + 1 if self.removed else -z, loss) - x**2 / (2 * self.noise**2)
        top = terms.real.max(-1)
        weight = (x[1] - x[0]) / (self.noise * math.sqrt(2 * math.pi))
        moment = top + np.log(np.exp(terms - top[..., None]).sum(-1) * weight)
        return self.steps * moment - z * self.epsilon - np.log(z * (z + 1))

    def _outputs(self, s: float, frequency: float) -> NDArray:
        """Lay a grid over the outputs that matter at s + it.

        Raises:
            _NotConverged: where it has too many points.
        """
        reach = 10 * self.noise
        low, high = (-reach, s + 1 + reach) if self.removed else (-s - reach, reach)
        points = math.ceil((high - low) / self._spacing(frequency)) + 1
        if points > _OUTPUTS:
            raise _NotConverged
        return np.linspace(low, high, points)

    def _spacing(self, frequency: float) -> float:
        """Choose a spacing for a Gaussian, its oscillation, and the singularity πσ² off the axis."""
        return min(math.pi / (frequency / self.noise**2 + 6 / self.noise), 0.6 * self.noise**2)
