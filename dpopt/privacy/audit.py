"""Audit statistics: lower bounds on ε from the scores of canaries whose inclusion was decided by fair coins.

A bound holds with probability 1 − α if its assumption does. It is a lower bound: it can refute a claimed ε, and never
proves one. v of r guesses are right; a guess calls a high score included or a low one excluded.

| bound   | statement                                                                        | source     |
|---------|----------------------------------------------------------------------------------|------------|
| one run | P[V ≥ v] ≤ P[B ≥ v] + 2mδ·max_i P[v − i ≤ B < v]/i with B ~ Bin(r, 1/(1 + e^−ε)) | 2305.08846 |
| f-DP    | r_i ≤ f̄(h_{i−1}), from the tail at v down, leaves less than α for P[V ≥ v]       | 2410.22235 |
| GDP     | μ ≥ Φ⁻¹(1 − FPR⁺) − Φ⁻¹(FNR⁺), and ε(δ, μ)                                       | 2302.07956 |

The three differ in what they assume of the canaries, not in the scores: see `BOUNDS`.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import betaincinv, expit, log_ndtr, ndtr, ndtri
from scipy.stats import binom

from dpopt.privacy.plan import PrivacyPlan

ALPHA = 0.05
_MOST = 200.0  # no bound is searched above this ε
_GUESSED = [2.0**-k for k in range(1, 7)]  # fractions of the canaries that are guessed; fixed before any score is seen
_FEWEST = 8  # guesses
_SIMULATIONS = 20
_CELLS = 1 << 17  # of the tabulated law of a score


def gdp_epsilon(mu: float, delta: float) -> float:
    """Return the ε of μ-Gaussian differential privacy at δ (Dong et al., 1905.02383, corollary 2.13)."""
    if mu <= 0 or 2 * ndtr(mu / 2) - 1 <= delta:
        return 0.0

    def excess(epsilon: float) -> float:
        above, below = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
        return float(above + np.log(-np.expm1(min(below - above, -1e-300)))) - math.log(delta)

    return float(brentq(excess, 0.0, mu * mu / 2 - mu * ndtri(delta) + 1.0))


def gdp_mu_of(epsilon: float, delta: float) -> float:
    """Return the μ whose Gaussian differential privacy is (ε, δ); the inverse of `gdp_epsilon`."""
    if math.isinf(epsilon):
        return math.inf
    return float(brentq(lambda mu: gdp_epsilon(mu, delta) - epsilon, 1e-9, 10 * math.sqrt(epsilon + 1) + 10))


def count_right_guesses(scores: np.ndarray, included: np.ndarray, guesses: int) -> int:
    """Guess the highest half of `guesses` included and the lowest excluded; count the right ones."""
    order = np.argsort(scores, kind="stable")
    low, high = order[: guesses // 2], order[len(order) - (guesses - guesses // 2) :]
    return int(included[high].sum() + (~included[low]).sum())


def one_run_epsilon(canaries: int, guesses: int, right: int, delta: float, alpha: float = ALPHA) -> float:
    """Return the largest ε that `right` guesses refute (2305.08846, theorem 5.2).

    Args:
        canaries: m, each included by a fair coin.
        guesses: r, made without regard to the coins; the other canaries are abstained from.
        right: v.
        delta: the δ of the claim.
        alpha: probability of refuting a true claim.
    """
    i = np.arange(1, right + 1)

    def p_value(epsilon: float) -> float:
        rate = expit(epsilon)
        tail = binom.sf(right - 1, guesses, rate)
        near = (binom.sf(right - i - 1, guesses, rate) - tail) / i
        return float(tail + 2 * canaries * delta * near.max(initial=0.0))

    return _largest(lambda epsilon: p_value(epsilon) < alpha)


def f_dp_epsilon(
    canaries: int, guesses: int, right: int, delta: float, alpha: float = ALPHA, above: float = 0.0
) -> float:
    """Return the largest ε whose Gaussian trade-off curve `right` guesses refute (2410.22235).

    Let p_k be the probability of k right guesses, r_i = Σ_{k≥i} p_k·k/m that a given canary is guessed right and i or
    more are, and h_i = Σ_{k≥i} p_k·(r − k)/m that it is guessed wrong and i or more are right. Flipping one coin turns
    a right guess into a wrong one and lowers the count by one, so r_i ≤ f̄(h_{i−1}) with the concave f̄ = 1 − f of the
    trade-off curve, averaged over canaries. Starting from a mass of α at v, each h_i is made no larger than it must be;
    if more than all the mass is needed, P[V ≥ v] < α. Here f̄⁻¹(x) = Φ(Φ⁻¹(x) − μ).

    Args:
        canaries: m.
        guesses: r.
        right: v.
        delta: at which μ is turned into ε.
        alpha: probability of refuting a true claim.
        above: an ε that is known to be refuted; 0 is returned if no larger one is.
    """

    def refuted(epsilon: float) -> bool:
        mu = gdp_mu_of(epsilon, delta)
        r, h, all_mass = alpha * right / canaries, alpha * (guesses - right) / canaries, guesses / canaries
        for i in range(right - 1, -1, -1):
            needed = float(ndtr(ndtri(r) - mu))
            if needed <= h:
                return False  # neither r nor h moves from here on
            r, h = r + i / (guesses - i) * (needed - h), needed
            if r + h > all_mass:
                return True
        return False

    return _largest(refuted, max(above, 1e-3))


def _largest(refuted: Callable[[float], bool], low: float = 0.0) -> float:
    """Return the largest refuted ε, to 1e-3; 0 if not even `low` is refuted."""
    if not refuted(low):
        return 0.0
    high = max(2 * low, 1.0)
    while refuted(high):
        low, high = high, 2 * high
        if high > _MOST:
            return low
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def one_run_bound(scores: np.ndarray, included: np.ndarray, delta: float, alpha: float = ALPHA) -> float:
    """Bound ε from one run, whatever the canaries do to each other (2305.08846).

    The best of six numbers of guesses, each at α/6.
    """
    numbers = _numbers_of_guesses(len(scores))
    each = [(r, count_right_guesses(scores, included, r)) for r in numbers]
    return max((one_run_epsilon(len(scores), r, v, delta, alpha / len(numbers)) for r, v in each), default=0.0)


def f_dp_bound(scores: np.ndarray, included: np.ndarray, delta: float, alpha: float = ALPHA) -> float:
    """Bound ε from one run, if the trade-off curve is a Gaussian's (2410.22235).

    The best of six numbers of guesses, each at α/6.
    """
    numbers, best = _numbers_of_guesses(len(scores)), 0.0
    for r in numbers:
        v = count_right_guesses(scores, included, r)
        best = max(best, f_dp_epsilon(len(scores), r, v, delta, alpha / len(numbers), best))
    return best


def gaussian_dp_bound(scores: np.ndarray, included: np.ndarray, delta: float, alpha: float = ALPHA) -> float:
    """Bound ε if scores are independent given the coins, and the trade-off curve is a Gaussian's (2302.07956).

    The error rates at an order statistic follow a beta distribution exactly, so that Clopper–Pearson limits at
    α/2 over the number of scores hold at all thresholds at once, also at one that is chosen afterwards.
    """
    low, high = np.sort(scores[~included]), np.sort(scores[included])
    if not len(low) or not len(high):
        return 0.0
    thresholds = np.unique(scores)
    misses = np.searchsorted(high, thresholds, "left")
    alarms = len(low) - np.searchsorted(low, thresholds, "left")
    with np.errstate(invalid="ignore"):
        mu = ndtri(1 - _upper_limit(alarms, len(low), alpha / 2)) - ndtri(_upper_limit(misses, len(high), alpha / 2))
    return gdp_epsilon(float(np.nanmax(mu, initial=0.0)), delta)


def _upper_limit(events: np.ndarray, trials: int, alpha: float) -> np.ndarray:
    """Clopper–Pearson upper limits of a rate, at α over the number of trials each."""
    limit = betaincinv(events + 1, np.maximum(trials - events, 1), 1 - alpha / trials)
    return np.where(events < trials, limit, 1.0)


def _numbers_of_guesses(canaries: int) -> list[int]:
    return [r for fraction in _GUESSED if (r := int(fraction * canaries)) >= _FEWEST]


Bound = Callable[[np.ndarray, np.ndarray, float, float], float]
# By name: the bound, and what it assumes besides fair coins.
BOUNDS: dict[str, tuple[Bound, str]] = {
    "one run": (one_run_bound, "nothing more: canaries may influence each other in any way"),
    "f-DP": (f_dp_bound, "the trade-off curve is that of a Gaussian mechanism; canaries may influence each other"),
    "GDP": (
        gaussian_dp_bound,
        "the trade-off curve is that of a Gaussian mechanism, and scores are independent given the coins, which those "
        "of orthogonal canaries are",
    ),
}


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Attributes:
        canaries: m.
        included: how many of them the coins put into the data.
        epsilon: the claim.
        delta: the δ of claim and bounds.
        alpha: probability that a bound exceeds a true ε although its assumption holds.
        signal: length of a canary's clipped gradient over the clip rule's sensitivity.
        bounds: ε that is refuted up to here, by name of the bound.
        ceilings: the same for an ideal audit of the claimed mechanism with as many canaries.
        checks: exact checks of what was released, by name; False where one failed.
    """

    canaries: int
    included: int
    epsilon: float
    delta: float
    alpha: float
    signal: float
    bounds: dict[str, float]
    ceilings: dict[str, float]
    checks: dict[str, bool] = field(default_factory=dict)

    @property
    def refuted_by(self) -> list[str]:
        """The bounds that exceed the claim and the exact checks that failed."""
        above = [f"{name} bound" for name, bound in self.bounds.items() if bound > self.epsilon]
        return above + [name for name, held in self.checks.items() if not held]

    def to_json(self) -> dict[str, Any]:
        """Write as plain values, with the assumptions."""
        assumptions = {name: BOUNDS[name][1] for name in self.bounds}
        return asdict(self) | {"assumptions": assumptions, "refuted_by": self.refuted_by}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "AuditResult":
        """Read what `to_json` wrote."""
        return cls(**{name: value for name, value in values.items() if name not in ("assumptions", "refuted_by")})


def audit(
    scores: Any,
    included: Any,
    plan: PrivacyPlan,
    alpha: float = ALPHA,
    signal: float = 1.0,
    checks: dict[str, bool] | None = None,
) -> AuditResult:
    """Bound the ε of a run from the scores of its canaries.

    Args:
        scores: (m,), higher for a canary that is thought to be included.
        included: (m,), the coins.
        plan: states the claim, ε at δ.
        alpha: probability that a bound exceeds a true ε.
        signal: length of a canary's clipped gradient over the clip rule's sensitivity.
        checks: exact checks of the release, by name.

    Raises:
        ValueError: for scores and coins of different lengths, or scores that are not finite.
    """
    scores, included = np.asarray(scores, dtype=np.float64), np.asarray(included, dtype=bool)
    if scores.shape != included.shape or scores.ndim != 1:
        raise ValueError(f"scores of shape {scores.shape} and coins of shape {included.shape} must be (m,) both")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite: a canary's released coordinate is NaN or infinite")
    return AuditResult(
        canaries=len(scores),
        included=int(included.sum()),
        epsilon=plan.epsilon,
        delta=plan.delta,
        alpha=alpha,
        signal=signal,
        bounds={name: bound(scores, included, plan.delta, alpha) for name, (bound, _) in BOUNDS.items()},
        ceilings=ideal_ceiling(len(scores), plan, alpha, signal),
        checks=checks or {},
    )


def ideal_ceiling(canaries: int, plan: PrivacyPlan, alpha: float = ALPHA, signal: float = 1.0) -> dict[str, float]:
    """Simulate the bounds of an ideal white-box audit of a correct implementation.

    Its scores are the best there are for orthogonal canaries: log-likelihood ratios, summed over the steps. Means of
    twenty simulations with fixed seeds.

    Args:
        canaries: m.
        plan: σ, q, the number of steps and δ.
        alpha: probability that a bound exceeds a true ε.
        signal: length of a canary's clipped gradient over the clip rule's sensitivity.
    """
    noise = plan.gradient_noise_multiplier / signal
    excluded, inside = _score_laws(noise, plan.sample_rate, plan.steps) if noise else (np.zeros(1), np.ones(1))
    found: dict[str, list[float]] = {name: [] for name in BOUNDS}
    for seed in range(_SIMULATIONS):
        generator = np.random.default_rng(seed)
        included = generator.random(canaries) < 0.5
        draws = generator.random(canaries)
        scores = np.where(included, *(law[(draws * len(law)).astype(np.int64)] for law in (inside, excluded)))
        for name, (bound, _) in BOUNDS.items():
            found[name].append(bound(scores, included, plan.delta, alpha))
    return {name: float(np.mean(values)) for name, values in found.items()}


def log_likelihood_ratio(released: Any, noise: float, rate: float) -> np.ndarray:
    """Return log(1 − q + q·exp((x − ½)/σ²)): how much likelier x is for an included canary than for another.

    Args:
        released: x, of a canary that adds 1 when it is in the batch.
        noise: σ, the standard deviation of the noise on x; 0 returns x itself.
        rate: q, of the sampler.
    """
    released = np.asarray(released, dtype=np.float64)
    if noise == 0:
        return released
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log1p(-rate), np.log(rate) + (released - 0.5) / noise**2)


def _score_laws(noise: float, rate: float, steps: int) -> list[np.ndarray]:
    """Tabulate quantiles of the score of a canary that is not in the data, and of one that is.

    The law of one step's ratio on a grid, raised to the power of the steps by Fourier transform.
    """
    x = np.linspace(-9 * noise, 1 + 9 * noise, 40_001)
    ratio, excluded = log_likelihood_ratio(x, noise, rate), np.exp(-0.5 * (x / noise) ** 2)
    laws = []
    for density in (excluded, excluded * np.exp(ratio)):
        law = density / density.sum()
        mean = law @ ratio
        spread = math.sqrt(law @ (ratio - mean) ** 2)
        grid = max(24 * spread * math.sqrt(steps), 2 * np.ptp(ratio)) / _CELLS
        places = np.rint((ratio - mean) / grid).astype(np.int64)
        step = np.bincount(places % _CELLS, law, _CELLS)
        total = np.fft.fftshift(np.fft.irfft(np.fft.rfft(step) ** steps, _CELLS).clip(0))
        values = steps * (mean - law @ places * grid) + (np.arange(_CELLS) - _CELLS // 2) * grid
        laws.append(np.interp(np.linspace(0, 1, _CELLS), np.cumsum(total) / total.sum(), values))
    return laws
