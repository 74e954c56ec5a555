"""The ε of T Poisson-subsampled Gaussian mechanisms, neighbors differing by one added or removed example.

One more Gaussian of all examples may precede them: statistics, by which inputs are standardized.

Three accountants: `pld` (privacy loss distributions, dp-accounting: the tightest, and an upper bound), `rdp` (Rényi,
Opacus) and `prv` (privacy random variables, Opacus: its upper bound). The inverse problems, the smallest noise for a
target ε and the largest number of steps, are solved on top of any of them.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

ACCOUNTANTS = ("pld", "rdp", "prv")
_RDP_ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64)) + [2**k for k in range(6, 13)]
_PLD_GRID = 1e-4  # dp-accounting's discretization of the privacy loss: three digits of ε
NOISE_LIMITS = (0.05, 1e4)  # outside, a discretized loss distribution is meaningless or does not fit into memory
MAX_STEPS = 10**8
PLD_DELTA = 1e-10  # at and below, rounding in the Fourier transforms moves ε by half a percent, either way
_PRV_EPSILON = 100  # above, the grid of the discretized losses takes gigabytes


@lru_cache(maxsize=64)
def _one_step_pld(noise_multiplier: float, sample_rate: float, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, value_discretization_interval=interval, sampling_prob=sample_rate
    )


def _composed_pld(mechanisms: Sequence[tuple[float, float, int]], grid: float) -> Any:
    """Compose (noise multiplier, sample rate, steps) on one grid: the coarsest that any of them needs."""
    interval = max(_interval(noise_multiplier, grid) for noise_multiplier, _, _ in mechanisms)
    parts = [_one_step_pld(noise, rate, interval).self_compose(steps) for noise, rate, steps in mechanisms]
    return functools.reduce(lambda one, other: one.compose(other), parts)


def _interval(noise_multiplier: float, grid: float) -> float:
    """Widen a grid for little noise: losses spread like 1/σ², and below σ = 0.5 a fixed grid would need gigabytes."""
    return grid * max(1.0, 0.25 / noise_multiplier**2)


@lru_cache(maxsize=4096)
def compute_epsilon(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: str = "pld",
    statistics_noise: float = 0.0,
) -> float:
    """Return ε after `steps` steps at the given δ.

    Args:
        noise_multiplier: standard deviation of the noise over the sensitivity; 0 gives an infinite ε.
        sample_rate: the probability q with which an example enters a batch.
        steps: number of steps taken, empty batches included.
        delta: the δ of (ε, δ).
        accountant: `pld`, `rdp` or `prv`.
        statistics_noise: noise multiplier of one release of all examples before the steps; 0 for none.

    Raises:
        ValueError: for an unknown accountant, or one that cannot answer here.
    """
    if accountant not in ACCOUNTANTS:
        raise ValueError(f"unknown accountant {accountant!r}: use one of {', '.join(ACCOUNTANTS)}")
    if steps == 0 and not statistics_noise:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    if steps == 0:
        return compute_epsilon(statistics_noise, 1.0, 1, delta, accountant)
    if accountant == "pld":
        if delta <= PLD_DELTA:
            raise ValueError(
                f"accountant=pld is exact for delta above {PLD_DELTA:g} only, not for {delta:g}, where rounding "
                "decides: set accountant=rdp"
            )
        return _pld_epsilon(noise_multiplier, sample_rate, steps, delta, _PLD_GRID, statistics_noise)
    others = (delta, "rdp", statistics_noise)
    if accountant == "prv" and compute_epsilon(noise_multiplier, sample_rate, steps, *others) > _PRV_EPSILON:
        raise ValueError(
            f"accountant=prv takes gigabytes of memory for an epsilon above {_PRV_EPSILON}: set accountant=pld or rdp"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus warns at the edges of a search, where no answer is read off
        if accountant == "rdp":
            from opacus.accountants.analysis import rdp

            divergences = rdp.compute_rdp(
                q=sample_rate, noise_multiplier=noise_multiplier, steps=steps, orders=_RDP_ORDERS
            )
            if statistics_noise:
                divergences += rdp.compute_rdp(q=1.0, noise_multiplier=statistics_noise, steps=1, orders=_RDP_ORDERS)
            return max(0.0, float(rdp.get_privacy_spent(orders=_RDP_ORDERS, rdp=divergences, delta=delta)[0]))
        from opacus.accountants import PRVAccountant

        prv = PRVAccountant()
        prv.history = [(noise_multiplier, sample_rate, steps)] + [(statistics_noise, 1.0, 1)] * bool(statistics_noise)
        return float(prv.get_epsilon(delta=delta))


def _pld_epsilon(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, grid: float, statistics_noise: float
) -> float:
    mechanisms = [(noise_multiplier, sample_rate, steps)] + [(statistics_noise, 1.0, 1)] * bool(statistics_noise)
    return float(_composed_pld(mechanisms, grid).get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def distinguishing_advantage(mechanisms: tuple[tuple[float, float, int], ...]) -> float:
    """Bound T − F of whoever guesses whether a record was there, by the whole loss distribution: δ at ε = 0.

    Args:
        mechanisms: (noise multiplier, sample rate, steps) of all releases.
    """
    taken = [mechanism for mechanism in mechanisms if mechanism[2]]
    if not taken or any(noise_multiplier == 0 for noise_multiplier, _, _ in taken):
        return float(bool(taken))
    return min(1.0, float(_composed_pld(taken, _PLD_GRID).get_delta_for_epsilon(0.0)))


def recipe(
    noise_multiplier: float,
    batch_size: float,
    dataset_size: int,
    steps: int,
    delta: float,
    accountant: str,
    statistics_noise: float = 0.0,
) -> str:
    """Write Python that computes ε by the accountant's library alone."""
    rate, noise, before = f"{batch_size} / {dataset_size}", repr(noise_multiplier), repr(statistics_noise)
    if accountant == "pld":
        grid = pld_grid(noise_multiplier, statistics_noise)
        first = f"first = from_gaussian_mechanism({before}, value_discretization_interval={grid!r})\n"
        composed = f"step.self_compose({steps})" + ".compose(first)" * bool(statistics_noise)
        return (
            "from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism\n"
            f"step = from_gaussian_mechanism({noise}, value_discretization_interval={grid!r}, sampling_prob={rate})\n"
            f"{first if statistics_noise else ''}print({composed}.get_epsilon_for_delta({delta!r}))"
        )
    if accountant == "rdp":
        first = f"spent += rdp.compute_rdp(q=1, noise_multiplier={before}, steps=1, orders=orders)\n"
        return (
            "from opacus.accountants.analysis import rdp\n"
            "orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64)) + [2**k for k in range(6, 13)]\n"
            f"spent = rdp.compute_rdp(q={rate}, noise_multiplier={noise}, steps={steps}, orders=orders)\n"
            f"{first if statistics_noise else ''}"
            f"print(rdp.get_privacy_spent(orders=orders, rdp=spent, delta={delta!r})[0])"
        )
    first = f", ({before}, 1, 1)" if statistics_noise else ""
    return (
        "from opacus.accountants import PRVAccountant\n"
        f"accountant = PRVAccountant()\naccountant.history = [({noise}, {rate}, {steps}){first}]\n"
        f"print(accountant.get_epsilon(delta={delta!r}))"
    )


def compose_epsilon(mechanisms: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Return the ε of several trainings on one dataset together, by privacy loss distributions.

    Args:
        mechanisms: (noise multiplier, sample rate, steps) of each; a noise multiplier of 0 gives an infinite ε.
        delta: the δ of (ε, δ), of all of them together.

    Raises:
        ValueError: for a δ at which PLD cannot answer.
    """
    steps: dict[tuple[float, float], int] = {}
    for noise_multiplier, sample_rate, count in mechanisms:
        if count:
            steps[noise_multiplier, sample_rate] = steps.get((noise_multiplier, sample_rate), 0) + count
    if any(noise_multiplier == 0 for noise_multiplier, _ in steps):
        return math.inf
    if len(steps) < 2:
        return sum(compute_epsilon(*mechanism, count, delta) for mechanism, count in steps.items())
    if delta <= PLD_DELTA:
        raise ValueError(f"delta={delta:g} is too small to compose trainings by PLD: choose one above {PLD_DELTA:g}")
    composed = _composed_pld([(*mechanism, count) for mechanism, count in steps.items()], _PLD_GRID)
    return float(composed.get_epsilon_for_delta(delta))


def check_budget(
    epsilon: float | None, noise_multiplier: float | None, steps: int | None, epochs: float | None
) -> None:
    """Check that exactly two of ε, σ and the number of steps are given.

    Raises:
        ValueError: saying which to set or to null.
    """
    if steps is not None and epochs is not None:
        raise ValueError("steps and epochs say the same thing twice: set one of them to null")
    length = steps if steps is not None else epochs
    given = {"epsilon": epsilon, "noise_multiplier": noise_multiplier, "steps": length}
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        raise ValueError(
            "epsilon, noise_multiplier and steps are all set, and two of them decide the third: set one to null"
        )
    if len(missing) > 1:
        raise ValueError(
            f"{' and '.join(missing)} are null, but two of epsilon, noise_multiplier and steps (or epochs) are needed: "
            f"set {missing[0]} (for a run without privacy: privacy=none)"
        )


def calibrate_noise(
    epsilon: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: str = "pld",
    statistics_noise: float = 0.0,
) -> float:
    """Find the noise multiplier that spends `epsilon` in `steps` steps, after a release with `statistics_noise`.

    What it spends lies in [ε(1 − 1e-4), ε].

    Raises:
        ValueError: when no noise multiplier between 0.05 and 10,000 reaches the target.
    """

    compute_epsilon(1.0, sample_rate, 1, delta, accountant)  # or refused: the search below would hide why
    if statistics_noise and (first := compute_epsilon(statistics_noise, 1.0, 1, delta, accountant)) >= epsilon:
        raise ValueError(
            f"the statistics alone cost epsilon={first:.4g} of {epsilon:g}: raise their noise multiplier, "
            f"{statistics_noise:g}, or epsilon"
        )

    def solve(epsilon_of: Callable[[float], float], tolerance: float, guess: float | None = None) -> float:
        def excess(log_noise: float) -> float:
            value = epsilon_of(math.exp(log_noise))
            return math.log(max(value, 1e-12) / epsilon) + 0.5e-4  # aims at the middle of the accepted interval

        low, high = map(math.log, NOISE_LIMITS)
        return _root(excess, low, high, tolerance, guess)

    try:
        # Rényi accounting costs milliseconds and a coarse grid a tenth of a fine one: they say where to look.
        fixed, first = (sample_rate, steps, delta), statistics_noise
        # Without statistics, what Rényi accounting cannot reach nobody does; they may leave too little for it alone.
        guess = None
        with contextlib.suppress(*[ArithmeticError] * bool(statistics_noise)):
            guess = solve(lambda noise: compute_epsilon(noise, *fixed, "rdp", first), 1e-3)
            if accountant == "pld":
                guess = solve(lambda noise: _pld_epsilon(noise, *fixed, 10 * _PLD_GRID, first), 1e-5, guess)
        return math.exp(solve(lambda noise: compute_epsilon(noise, *fixed, accountant, first), 4e-5, guess))
    except ArithmeticError:
        raise ValueError(
            f"no noise multiplier in [{NOISE_LIMITS[0]:g}, {NOISE_LIMITS[1]:g}] gives epsilon={epsilon:g} at "
            f"delta={delta:g} over {steps:,} steps with sample rate {sample_rate:.3g}: "
            "choose a larger epsilon, fewer steps or a smaller batch_size"
        ) from None


def calibrate_steps(
    epsilon: float,
    noise_multiplier: float,
    sample_rate: float,
    delta: float,
    accountant: str = "pld",
    epsilon_at: Callable[[int], float] | None = None,
) -> int:
    """Find the largest T with ε(T) ≤ ε; `epsilon_at` is ε(T), by default that of T subsampled Gaussians.

    Raises:
        ValueError: when one step already costs more, or when more than 1e8 steps would fit.
    """

    def fits(steps: int) -> bool:
        if epsilon_at is not None:
            return epsilon_at(steps) <= epsilon
        return compute_epsilon(noise_multiplier, sample_rate, steps, delta, accountant) <= epsilon

    if not fits(0):
        raise ValueError(
            f"the statistics alone cost more than epsilon={epsilon:g}: raise their noise multiplier, or epsilon"
        )
    if not fits(1):
        raise ValueError(
            f"a single step with noise_multiplier={noise_multiplier:g} and sample rate {sample_rate:.3g} already costs "
            f"more than epsilon={epsilon:g}: raise noise_multiplier or epsilon, or lower batch_size"
        )
    low, high = 1, 2
    while fits(high):
        if high > MAX_STEPS:
            raise ValueError(
                f"more than {MAX_STEPS:,} steps fit into epsilon={epsilon:g} with noise_multiplier="
                f"{noise_multiplier:g}: set steps (or epochs) and set noise_multiplier=null"
            )
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def gdp_mu(noise_multiplier: float, sample_rate: float, steps: int, statistics_noise: float = 0.0) -> float:
    """μ of the central-limit approximation by Gaussian DP (Bu et al., 2020): for orientation, not a guarantee."""
    if noise_multiplier == 0:
        return math.inf
    if statistics_noise:
        return math.hypot(1 / statistics_noise, gdp_mu(noise_multiplier, sample_rate, steps))
    if sample_rate == 1:  # exact
        return math.sqrt(steps) / noise_multiplier
    return sample_rate * math.sqrt(steps * math.expm1(min(noise_multiplier**-2, 700)))


def _root(
    function: Callable[[float], float], low: float, high: float, tolerance: float, guess: float | None = None
) -> float:
    """Find where the decreasing `function` is within ±tolerance of 0.

    It takes secant steps, kept inside a bracket.

    Raises:
        ArithmeticError: when there is none between `low` and `high`.
    """
    points: list[tuple[float, float]] = []
    x = (low + high) / 2 if guess is None else min(max(guess, low), high)
    for _ in range(200):
        value = function(x)
        if abs(value) <= tolerance:
            return x
        low, high = (x, high) if value > 0 else (low, x)
        points = [*points[-1:], (x, value)]
        if len(points) == 1:
            x = x + 0.5 * value if math.isfinite(value) else (low + high) / 2  # ε falls at least like 1/σ
        else:
            (x0, y0), (x1, y1) = points
            x = x1 - y1 * (x1 - x0) / (y1 - y0) if y1 != y0 and math.isfinite(y0 - y1) else math.nan
        if not low < x < high:
            x = (low + high) / 2
        if high - low < 1e-12:
            break
    raise ArithmeticError("no root in the interval")


def pld_grid(noise_multiplier: float, statistics_noise: float = 0.0) -> float:
    """Return the spacing of the loss distributions that `compute_epsilon` composes."""
    return max(_interval(noise, _PLD_GRID) for noise in (noise_multiplier, statistics_noise or noise_multiplier))
