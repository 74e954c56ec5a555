"""The privacy plan: the one frozen record from which sampler, noise and accountant all read.

A plan fixes the noise multiplier σ, the expected batch size qN, the number of steps T, N and δ before training starts.
Two of (ε, σ, T) give the third. Neighboring datasets differ by one example added or removed, N is taken to be public,
and batches are samples of the mechanism's sampler: Poisson, for independent noise.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, get_args

from dpopt import ranks
from dpopt.privacy import accounting
from dpopt.privacy.mechanisms import INDEPENDENT, Mechanism
from dpopt.rng import RandomKey


@dataclass(frozen=True)
class PrivacyPlan:
    """What a private run may do; make one with `calibrate`.

    Attributes:
        noise_multiplier: σ, the noise's standard deviation over the sensitivity of a step's release; 0 adds no noise
            (ε = ∞).
        dataset_size: N, the number of training examples, taken to be public.
        batch_size: qN, the *expected* number of examples in a batch.
        steps: T, the number of noisy releases.
        delta: the δ of (ε, δ).
        accountant: `pld`, `rdp` or `prv`.
        count_noise: σ_b, of the count that a clip rule releases with the gradients (`dpopt.clipping.Adaptive`); 0
            where there is none. Both together cost what σ says.
        key: the key of sampling, augmentation and noise; secret, from the operating system, unless a seed is given.
        allow_large_delta: accept a δ of 1/N or more, which permits publishing an example outright.
        mechanism: how noise is correlated over steps, and the sampler; one of `dpopt.mechanisms`.
        statistics_noise: noise multiplier of the channel statistics that are released before the first step
            (`dpopt.privacy.statistics`); 0 for none. They are in ε.
    """

    noise_multiplier: float
    dataset_size: int
    batch_size: int
    steps: int
    delta: float
    accountant: str = "pld"
    count_noise: float = 0.0
    key: RandomKey = field(default_factory=RandomKey.from_os, repr=False, compare=False)
    allow_large_delta: bool = field(default=False, compare=False)
    mechanism: Mechanism = INDEPENDENT
    statistics_noise: float = 0.0

    relation: ClassVar[str] = "add_or_remove_one"

    def __post_init__(self) -> None:
        _check("delta", self.delta, 0 < self.delta < 1, "a probability between 0 and 1, well below 1/dataset_size")
        _check("dataset_size", self.dataset_size, self.dataset_size >= 1, "at least 1")
        _check("steps", self.steps, self.steps >= 1, "at least 1")
        low, high = accounting.NOISE_LIMITS
        good = self.noise_multiplier == 0 or low <= self.noise_multiplier <= high
        _check("noise_multiplier", self.noise_multiplier, good, f"between {low:g} and {high:g}, or 0 for no noise")
        good = self.statistics_noise == 0 or low <= self.statistics_noise <= high
        _check("statistics_noise", self.statistics_noise, good, f"between {low:g} and {high:g}, or 0 for no statistics")
        if not 1 <= self.batch_size <= self.dataset_size:
            raise ValueError(
                f"batch_size={self.batch_size:,} must lie between 1 and the {self.dataset_size:,} training examples: "
                "lower batch_size"
            )
        if self.accountant not in accounting.ACCOUNTANTS:
            raise ValueError(f"accountant={self.accountant} must be one of {', '.join(accounting.ACCOUNTANTS)}")
        if self.noise_multiplier > 0:
            self._check_delta()
        if self.count_noise and not 2 * self.count_noise > self.noise_multiplier:
            raise ValueError(
                f"count_noise={self.count_noise:g} must be above half of the noise multiplier, "
                f"{self.noise_multiplier:.4g}, or the count alone would cost more than the plan: raise it"
            )
        if type(self.mechanism) not in get_args(Mechanism):
            raise TypeError(
                f"mechanism={self.mechanism!r} has no accountant: pass one of dpopt.mechanisms, BandMF(bands=8), say"
            )
        self.mechanism.check(self.sample_rate, self.steps)

    def _check_delta(self) -> None:
        if self.delta * self.dataset_size >= 1 and not self.allow_large_delta:
            raise ValueError(
                f"delta={self.delta:g} is not below 1/dataset_size = {1 / self.dataset_size:.3g}, so it permits "
                "publishing an example outright: lower delta, or set allow_large_delta=true to reproduce a paper"
            )

    @classmethod
    def calibrate(
        cls,
        *,
        delta: float,
        dataset_size: int,
        batch_size: int,
        epsilon: float | None = None,
        steps: int | None = None,
        epochs: float | None = None,
        noise_multiplier: float | None = None,
        accountant: str = "pld",
        count_noise: float = 0.0,
        seed: int | None = None,
        allow_large_delta: bool = False,
        mechanism: Mechanism = INDEPENDENT,
        statistics_noise: float = 0.0,
    ) -> "PrivacyPlan":
        """Make the plan from two of (ε, σ, T) and derive the third.

        Args:
            delta: the δ of (ε, δ).
            dataset_size: N.
            batch_size: the expected batch size qN.
            epsilon: the target ε; infinity gives σ = 0 (clipping without noise).
            steps: T.
            epochs: T in passes over the data: T = round(epochs · N / batch_size). Instead of `steps`.
            noise_multiplier: σ.
            accountant: `pld` (tightest), `rdp` or `prv`.
            count_noise: σ_b of the count that an adaptive clip rule releases, batch_size/20, say.
            seed: makes all draws reproducible, and known to whoever knows the seed. Two trainings under equal plans and
                seeds share their noise: take a seed per training. Without one the plan serves one training.
            allow_large_delta: accept a δ of 1/N or more.
            mechanism: `dpopt.mechanisms.BandMF(bands=8)`, say.
            statistics_noise: noise multiplier of one release of all examples before the first step.

        Returns:
            A plan with target·(1 − 1e-4) ≤ ε ≤ target when σ was derived, and ε(T) ≤ target < ε(T + 1) when T was.

        Raises:
            ValueError: when not exactly two of the three are given, or the target cannot be met.
        """
        accounting.check_budget(epsilon, noise_multiplier, steps, epochs)
        if epsilon is not None:
            _check("epsilon", epsilon, epsilon > 0, "a positive number (inf clips without noise)")
        if epochs is not None:
            _check("epochs", epochs, 0 < epochs < math.inf, "a positive number")
            steps = max(1, round(epochs * dataset_size / batch_size)) if batch_size > 0 else 1
        # Built first with what is known, so that a bad value is reported before any time goes into calibration.
        length = accounting.MAX_STEPS if steps is None else steps
        record = (dataset_size, batch_size, length, delta, accountant, count_noise)
        plan = cls(noise_multiplier or 0.0, *record, allow_large_delta=allow_large_delta, mechanism=mechanism)
        plan = replace(plan, statistics_noise=statistics_noise)
        if epsilon is not None:
            plan = plan._calibrated(epsilon, noise_multiplier, steps)
        if seed is not None:
            return replace(plan, key=RandomKey.from_seed(seed, str(plan.to_dict())))
        return replace(plan, key=ranks.key_of_first(lambda: plan.key))

    def _calibrated(self, epsilon: float, noise_multiplier: float | None, steps: int | None) -> "PrivacyPlan":
        """Derive σ or T, whichever is None, for a target ε."""
        if math.isfinite(epsilon):
            self._check_delta()
        if noise_multiplier is None and math.isfinite(epsilon):
            sensitivity, rate, count = self.mechanism.composition(self.sample_rate, self.steps)
            others = (self.delta, self.accountant, self.statistics_noise)
            found = accounting.calibrate_noise(epsilon, rate, count, *others)
            return replace(self, noise_multiplier=sensitivity * found)
        if steps is None:
            if not noise_multiplier or math.isinf(epsilon):
                raise ValueError("with no noise, or an infinite epsilon, the number of steps must be given: set steps")
            mechanism = (noise_multiplier, self.sample_rate, self.delta, self.accountant, self.epsilon_at)
            return replace(self, steps=accounting.calibrate_steps(epsilon, *mechanism))
        return self

    @property
    def sample_rate(self) -> float:
        """q, the probability with which each example enters a batch."""
        return self.batch_size / self.dataset_size

    @property
    def groups(self) -> int:
        """The number of groups of examples; step t draws from group t mod `groups`."""
        return self.mechanism.groups(self.sample_rate)

    @property
    def group_rate(self) -> float:
        """The probability with which each example of the step's group enters its batch: q·groups."""
        return min(1.0, self.sample_rate * self.groups)

    @property
    def sampler(self) -> str:
        """The name of the sampler."""
        return "poisson" if self.mechanism == INDEPENDENT else "cyclic_poisson"

    @property
    def sampling(self) -> str:
        """Describe the sampler for panel and card."""
        if self.mechanism == INDEPENDENT:
            return f"Poisson, q = {self.sample_rate:.6g}"
        return (
            f"cyclic Poisson, {self.groups} groups in turn, q = {self.sample_rate:.6g} ({self.group_rate:.6g} within "
            "the step's group)"
        )

    @property
    def gradient_noise_multiplier(self) -> float:
        """The noise's standard deviation over the sensitivity of the sum of gradients: σ, or more with a count."""
        if not self.count_noise or not self.noise_multiplier:
            return self.noise_multiplier
        return (self.noise_multiplier**-2 - (2 * self.count_noise) ** -2) ** -0.5

    def epsilon_at(self, step: int, accountant: str | None = None) -> float:
        """Compute the ε spent after `step` steps.

        The plan's accountant does it unless another one is named.
        """
        others = (self.delta, accountant or self.accountant, self.statistics_noise)
        return accounting.compute_epsilon(*self.composed(step), *others)

    def composed(self, step: int) -> tuple[float, float, int]:
        """Return noise multiplier, sample rate and number of the Gaussians that `step` steps compose."""
        if step == 0:
            return self.noise_multiplier, self.sample_rate, 0
        sensitivity, rate, count = self.mechanism.composition(self.sample_rate, step)
        return self.noise_multiplier / sensitivity, rate, count

    def releases(self, step: int) -> tuple[tuple[float, float, int], ...]:
        """Return (noise multiplier, sample rate, number) of all Gaussians up to a step, statistics included."""
        return (self.composed(step), *[(self.statistics_noise, 1.0, 1)] * bool(self.statistics_noise))

    def epsilon_by_others(self, step: int) -> dict[str, float]:
        """Return the ε by the accountants, PLD and Rényi, that are not the plan's and can answer at its δ."""
        others = [name for name in ("pld", "rdp") if name != self.accountant]
        able = [name for name in others if name != "pld" or self.delta > accounting.PLD_DELTA]
        return {name: self.epsilon_at(step, name) for name in able}

    @cached_property
    def epsilon(self) -> float:
        """The ε of the whole plan."""
        return self.epsilon_at(self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values, without the key."""
        values = asdict(replace(self, key=RandomKey(b"")))
        del values["key"], values["mechanism"]
        if self.mechanism != INDEPENDENT:
            values["mechanism"] = self.mechanism.to_dict(self.steps)
        for name in ("allow_large_delta", "statistics_noise"):  # results of earlier versions do not have them
            if not values[name]:
                del values[name]
        return values | {"sample_rate": self.sample_rate, "relation": self.relation, "sampler": self.sampler}


def _check(name: str, value: float, good: bool, meaning: str) -> None:
    if not good or math.isnan(value):
        raise ValueError(f"{name}={value} must be {meaning}")
