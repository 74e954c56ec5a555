"""Correlated noise: what is released, sampled, accounted and resumed is one mechanism. Each check has mutants."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Flatland, flat_loss, released_noise, small_data, small_model
from scipy import optimize, stats

import dpopt
from dpopt.privacy import mechanisms, sampling
from dpopt.privacy.clipping import Adaptive, Flat
from dpopt.privacy.correlated import CorrelatedNoise
from dpopt.privacy.mechanisms import BandMF, LambdaCGD
from dpopt.privacy.noise import standard_noise
from dpopt.privacy.plan import PrivacyPlan
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.rng import RandomKey

STEPS = 13
MECHANISMS = (BandMF(3), LambdaCGD(0.6))


def plan_of(mechanism, sigma=1.3, size=64, batch=16, steps=STEPS, **options):
    """A plan with a reproducible key."""
    key = RandomKey.from_seed(0, "test")
    return PrivacyPlan(sigma, size, batch, steps, 1e-3, key=key, mechanism=mechanism, **options)


def matrix(plan):
    """C, by hand."""
    about = plan.to_dict()["mechanism"]
    column = np.zeros(plan.steps)
    if about["name"] == "bandmf":
        column[: about["bands"]] = about["coefficients"]
    else:
        column = about["lambda"] ** np.arange(plan.steps)
    return sum(value * np.eye(plan.steps, k=-j) for j, value in enumerate(column))


# The noise is σS·C⁻¹z, for a C whose columns the accountant knows.


def check_noise_is_that_of_the_matrix():
    for mechanism in MECHANISMS:
        plan = plan_of(mechanism)
        noise = released_noise(plan, Flat(0.5), steps=STEPS).view(STEPS, -1).double() / (1.3 * 0.5)
        draws = torch.stack([plan.key.normal(20_000, "noise", step) for step in range(STEPS)]).double()
        c = matrix(plan)
        if isinstance(mechanism, BandMF):
            assert np.linalg.norm(c, axis=0).max() == pytest.approx(1.0, abs=1e-12)
        assert float((torch.from_numpy(c) @ noise - draws).abs().max()) < 2**-11 * np.abs(c).sum(1).max()  # the grid
        deviations = np.linalg.norm(np.linalg.inv(c), axis=1)
        np.testing.assert_allclose(noise.std(1).numpy(), deviations, rtol=0.03)


def check_a_moving_clip_norm_scales_noise_that_is_correlated():
    plan, model, clip = (
        plan_of(BandMF(3), count_noise=8.0),
        Flatland(5000),
        Adaptive(0.5, quantile=0.3, count_noise=8.0),
    )
    private, units, norms = PrivateGradient(model, flat_loss, plan, clip), [], []
    for batch in dpopt.poisson_batches((torch.zeros(64, 2), torch.zeros(64)), plan):
        norms.append(clip.sensitivity)
        private.backward(batch)
        units.append(model.weight.grad.double() * 16 / (norms[-1] * plan.gradient_noise_multiplier))
    assert max(norms) / min(norms) > 1.2
    draws = torch.stack([plan.key.normal(5000, "noise", step) for step in range(STEPS)]).double()
    assert float((torch.from_numpy(matrix(plan)) @ torch.stack(units) - draws).abs().max()) < 1e-3
    assert plan.gradient_noise_multiplier**-2 + 16.0**-2 == pytest.approx(1.3**-2)  # both shifts of an example


def noise_that_is_independent(patch):
    patch.setattr(CorrelatedNoise, "pieces", lambda self, total, key, step: standard_noise(total, key, step))


def columns_longer_than_one(patch, real=mechanisms.coefficients):
    patch.setattr(mechanisms, "coefficients", lambda *about: tuple(1.2 * c for c in real(*about)))


def a_noise_forgotten(patch, real=CorrelatedNoise._advance):
    def advance(self, total, key, step):
        self.feedback = self.feedback[:-1] if len(self.feedback) == 2 else self.feedback
        self.draws = self.draws[:1]
        return real(self, total, key, step)

    patch.setattr(CorrelatedNoise, "_advance", advance)


def scaled_before_it_is_correlated(patch, real=CorrelatedNoise._advance):
    """The memory holds noise of the size that was released, as if S had never moved."""

    def add(self, total, sensitivity, real_release=PrivateGradient._release):
        if self.noise is not None:
            before = getattr(self, "before", sensitivity)
            self.noise._past *= before / sensitivity
            self.before = sensitivity
        real_release(self, total, sensitivity)

    patch.setattr(PrivateGradient, "_release", add)


# ε is that of the sampler which is used.


def check_epsilon_is_that_of_the_sampler():
    from dp_accounting import ComposedDpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    steps, size = 205, 900
    plan = plan_of(BandMF(4), 0.9, size, 90, steps)
    member = torch.zeros(steps, size)
    for step in range(steps):
        member[step, sampling.sample_indices(plan, step)] = 1
    times = [np.flatnonzero(column) for column in member.T.numpy()]
    assert all((np.diff(t) % 4 == 0).all() for t in times)  # at most once in each block of C's rows
    groups = np.array([t[0] % 4 for t in times if len(t)])
    assert stats.chisquare(np.bincount(groups, minlength=4)).pvalue > 1e-4
    possible = np.array([len(range(group, steps, 4)) for group in groups])
    taken = np.array([len(t) for t in times if len(t)])
    rate = taken.sum() / possible.sum()
    assert rate == pytest.approx(0.4, abs=0.01)  # q·b
    assert member.sum(1).mean() == pytest.approx(90, abs=3)  # qN
    assert stats.kstest(taken[groups == 1], stats.binom(len(range(1, steps, 4)), 0.4).cdf).pvalue > 1e-4
    accountant = PLDAccountant()
    event = PoissonSampledDpEvent(0.4, GaussianDpEvent(0.9))  # over a column, whose norm is 1
    accountant.compose(ComposedDpEvent([SelfComposedDpEvent(event, int(possible.max()))]))
    assert plan.epsilon == pytest.approx(accountant.get_epsilon(1e-3), rel=2e-3)
    assert plan.epsilon_at(0) == 0 and plan.epsilon_at(9) == plan.epsilon_at(12) < plan.epsilon_at(13)


def check_epsilon_of_lambda_cgd_is_that_of_one_gaussian():
    plan = plan_of(LambdaCGD(0.6), 4.0)
    c, groups = matrix(plan), plan.groups
    assert groups == 4 and plan.group_rate == 1
    batches = [sampling.sample_indices(plan, step) for step in range(STEPS)]
    assert sorted(torch.cat(batches[:4]).tolist()) == list(range(64))
    assert all(torch.equal(batches[step], batches[step % 4]) for step in range(STEPS))

    def epsilon(shift):
        """Balle & Wang, 1805.06530: the exact δ of a Gaussian, solved for ε."""

        def excess(e):
            one, other = stats.norm.cdf(shift / 2 - e / shift), stats.norm.cdf(-shift / 2 - e / shift)
            return one - math.exp(e) * other - plan.delta

        return optimize.brentq(excess, 0, 100)

    for steps in (1, 4, 6, STEPS):
        moved = [c[:steps, group:steps:groups].sum(1) for group in range(groups)]
        shift = max(float(np.linalg.norm(m)) for m in moved) / 4.0
        assert plan.epsilon_at(steps) == pytest.approx(epsilon(shift), rel=2e-3)


def poisson_accounted(patch):
    patch.setattr(BandMF, "composition", lambda self, sample_rate, steps: (1.0, sample_rate, steps))
    patch.setattr(LambdaCGD, "composition", lambda self, sample_rate, steps: (1.0, sample_rate, steps))


def poisson_sampled(patch):
    patch.setattr(PrivacyPlan, "groups", property(lambda self: 1))


def groups_of_every_step(patch, real=RandomKey.uniform):
    """Sample at the rate within a group, from groups that are drawn in every step."""
    count = iter(range(10**6))
    patch.setattr(
        RandomKey,
        "uniform",
        lambda self, n, *labels: real(self, n, *labels, *([next(count)] if labels == ("group",) else [])),
    )


def rounded_down(patch):
    patch.setattr(
        BandMF,
        "composition",
        lambda self, sample_rate, steps: (1.0, min(1.0, sample_rate * self.bands), steps // self.bands),
    )


def participations_counted_as_orthogonal(patch):
    def composition(self, sample_rate, steps):
        squares = [
            self.lam ** (2 * np.arange(steps - t)).astype(float) for t in range(0, steps, self.groups(sample_rate))
        ]
        return math.sqrt(sum(s.sum() for s in squares)), 1.0, 1

    patch.setattr(LambdaCGD, "composition", composition)


# A run that resumes goes on with the noise that it would have had.


def check_a_resumed_run_adds_the_same_noise():
    for mechanism in MECHANISMS:
        plan, gradients = plan_of(mechanism), {}
        for start in (0, 1, 5):
            model = small_model(torch.float32)
            private = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0), start=start)
            for batch in dpopt.poisson_batches(small_data(dtype=torch.float32), plan, start=start):
                private.backward(batch)
                gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
                assert torch.equal(gradient, gradients.setdefault(batch.step, gradient))


def _without_replay(self, total, key, step, real=CorrelatedNoise._advance):
    if not len(self._past) and self.feedback:
        self._past = total.new_zeros(len(self.feedback), len(total))
    return real(self, total, key, step)


def replay_forgotten(patch):
    patch.setattr(CorrelatedNoise, "pieces", _without_replay)


def independent_after_a_resume(patch, real=CorrelatedNoise.pieces):
    def pieces(self, total, key, step):
        self.resumed = getattr(self, "resumed", step > self.reached)
        return standard_noise(total, key, step) if self.resumed else real(self, total, key, step)

    patch.setattr(CorrelatedNoise, "pieces", pieces)


MUTANTS = {
    check_noise_is_that_of_the_matrix: [noise_that_is_independent, columns_longer_than_one, a_noise_forgotten],
    check_a_moving_clip_norm_scales_noise_that_is_correlated: [
        noise_that_is_independent,
        scaled_before_it_is_correlated,
    ],
    check_epsilon_is_that_of_the_sampler: [poisson_accounted, poisson_sampled, groups_of_every_step, rounded_down],
    check_epsilon_of_lambda_cgd_is_that_of_one_gaussian: [
        poisson_accounted,
        poisson_sampled,
        participations_counted_as_orthogonal,
    ],
    check_a_resumed_run_adds_the_same_noise: [replay_forgotten, independent_after_a_resume],
}
