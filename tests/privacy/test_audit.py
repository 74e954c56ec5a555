"""Audit bounds are valid and find what is wrong; canaries leave training as it is."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import make_plan, small_data, small_model
from scipy import stats
from scipy.special import ndtr
from torch import nn

import dpopt
from dpopt.privacy import audit
from dpopt.privacy.audit import BOUNDS, f_dp_epsilon, gdp_epsilon, gdp_mu_of, one_run_epsilon
from dpopt.privacy.canaries import CHECKS, Canaries
from dpopt.privacy.plan import PrivacyPlan
from dpopt.privacy.sampling import sample_indices
from dpopt.privacy.zeroth_order import ZerothOrder

pytestmark = pytest.mark.slow

# FACTS of 2,500 steps at q = 4096/50000 and δ = 1e-5: by σ and m, the ideal GDP bound of another implementation, which
# has the same union over all thresholds. Its other bounds have a wider union over numbers of guesses than ours.
REFERENCE = {(2.576, 500): 5.51, (2.576, 2000): 5.79, (2.576, 10_000): 6.95, (1.288, 500): 15.0, (1.288, 2000): 17.4}
WEAKER = {
    (2.576, 500): (1.81, 2.56),
    (2.576, 2000): (2.23, 3.04),
    (2.576, 10_000): (1.68, 3.53),
    (1.288, 500): (3.56, 5.89),
}
SPREAD = {500: 0.5, 2000: 0.35, 10_000: 0.16}  # standard deviation of one simulation at σ = 2.576


def scores_of(mu, canaries, seed):
    generator = np.random.default_rng(seed)
    included = generator.random(canaries) < 0.5
    return generator.normal(size=canaries) + mu * included, included


def test_gaussian_dp_converts_both_ways():
    for mu in (0.3, 1.0, 1.666, 5.0, 40.0):
        epsilon = gdp_epsilon(mu, 1e-5)
        delta = ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon) * ndtr(-mu / 2 - epsilon / mu) if mu < 10 else 1e-5
        assert delta == pytest.approx(1e-5, rel=1e-3)
        assert gdp_mu_of(epsilon, 1e-5) == pytest.approx(mu, rel=1e-6)
    assert gdp_epsilon(0.0, 1e-5) == gdp_epsilon(1e-9, 1e-5) == 0.0
    assert gdp_epsilon(1.666, 1e-5) == pytest.approx(8.0, abs=0.01)


def test_one_run_without_delta_is_a_binomial_test():
    epsilon = one_run_epsilon(1000, 100, 90, 0.0)
    assert stats.binom.sf(89, 100, 1 / (1 + math.exp(-epsilon))) == pytest.approx(0.05, rel=0.01)
    assert one_run_epsilon(1000, 100, 55, 0.0) == 0.0


@pytest.mark.parametrize("bound", [one_run_epsilon, f_dp_epsilon], ids=lambda f: f.__name__)
def test_more_right_guesses_refute_more(bound):
    found = [bound(1000, 200, right, 1e-5) for right in range(100, 201, 10)]
    assert found == sorted(found) and found[0] == 0.0 and found[-1] > 3
    stricter = [bound(1000, 200, right, 1e-5, 0.001) for right in range(100, 201, 10)]
    assert all(b <= a for a, b in zip(found, stricter, strict=True))
    assert one_run_epsilon(1000, 200, 190, 1e-3) < one_run_epsilon(1000, 200, 190, 1e-5)


@pytest.mark.parametrize("mu, canaries", [(0.5, 300), (1.5, 64), (1.5, 300)])
def test_bounds_are_valid(mu, canaries):
    """Over 200 Gaussian mechanisms a bound exceeds the truth no more often than α, to three standard errors."""
    truth = gdp_epsilon(mu, 1e-3)
    for name, (bound, _) in BOUNDS.items():
        exceeded = [bound(*scores_of(mu, canaries, seed), 1e-3, 0.05) > truth for seed in range(200)]
        assert np.mean(exceeded) <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5, name


def test_f_dp_is_valid_for_a_chosen_number_of_guesses():
    """Without the union over six numbers: the recursion alone holds its α."""
    truth, exceeded = gdp_epsilon(1.0, 1e-3), []
    for seed in range(400):
        scores, included = scores_of(1.0, 300, seed)
        exceeded.append(f_dp_epsilon(300, 60, audit.count_right_guesses(scores, included, 60), 1e-3) > truth)
    assert np.mean(exceeded) <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


def test_the_first_bound_alone_needs_no_gaussian():
    """A mechanism that tells all with probability 0.3, else nothing, is (0, 0.3)-DP; canaries share that coin."""
    above = dict.fromkeys(BOUNDS, 0)
    for seed in range(40):
        generator = np.random.default_rng(seed)
        included = generator.random(400) < 0.5
        scores = included + 0.0 if generator.random() < 0.3 else generator.normal(size=400)
        for name, (bound, _) in BOUNDS.items():
            above[name] += bound(scores, included, 0.3, 0.05) > 0
    assert above["one run"] == 0 and min(above["f-DP"], above["GDP"]) > 5


@pytest.mark.parametrize("sigma, canaries", REFERENCE)
def test_ceilings_are_those_of_the_literature(sigma, canaries):
    plan = PrivacyPlan(sigma, 50_000, 4096, 2500, 1e-5)
    found = audit.ideal_ceiling(canaries, plan)
    spread = SPREAD[canaries] * (2 if sigma < 2 else 1)
    assert found["GDP"] == pytest.approx(REFERENCE[sigma, canaries], abs=2.5 * spread)
    for bound, reference in zip(("one run", "f-DP"), WEAKER.get((sigma, canaries), ()), strict=False):
        assert reference < found[bound] < found["GDP"] + 0.1
    if sigma > 2:
        assert max(found.values()) < 8.0


def test_ceiling_of_a_signal_is_that_of_more_noise():
    plan, noisier = PrivacyPlan(1.0, 1000, 100, 200, 1e-5), PrivacyPlan(2.0, 1000, 100, 200, 1e-5)
    assert audit.ideal_ceiling(500, plan, signal=0.5) == audit.ideal_ceiling(500, noisier)


def test_audit_refuses_what_is_no_score():
    plan = make_plan()
    with pytest.raises(ValueError, match="must be"):
        dpopt.audit(np.zeros(5), np.zeros(6, dtype=bool), plan)
    with pytest.raises(ValueError, match="finite"):
        dpopt.audit(np.full(20, np.nan), np.zeros(20, dtype=bool), plan)
    result = dpopt.audit(np.zeros(20), np.zeros(20, dtype=bool), plan)
    assert result.bounds == dict.fromkeys(BOUNDS, 0.0) and not result.refuted_by
    assert audit.AuditResult.from_json(result.to_json()) == result


# Canaries.


def adaptive(count_noise=4.0):
    return dpopt.clipping.Adaptive(0.5, count_noise=count_noise)


KINDS = {
    "flat": {},
    "adaptive": {"clip": adaptive},
    "layers": {"clip": lambda: dpopt.clipping.PerLayer(0.7)},
    "automatic": {"clip": lambda: dpopt.clipping.Automatic(0.7)},
    "scaled": {"pre_clip_scale": lambda p: torch.full_like(p, 2.0)},
    "zeroth": {"make": ZerothOrder},
}


def train_with(canaries, steps=12, start=0, model=None, clip=None, dtype=torch.float64, kind="flat", stop=None):
    """Train with canaries or without; returns the trajectory of `p.grad`, and the plan."""
    options = dict(KINDS[kind])
    make, rule = options.pop("make", dpopt.PrivateGradient), options.pop("clip", None)
    clip = clip or (rule() if rule else dpopt.clipping.Flat(0.5))
    plan = make_plan(steps=steps)
    if kind == "adaptive":
        plan = PrivacyPlan(1.0, 64, 16, steps, 1e-3, count_noise=4.0, key=plan.key)
    model = model or small_model(dtype)
    private = make(model, F.cross_entropy, plan, clip, start=start, canaries=canaries, **options)
    seen = []
    for batch in dpopt.poisson_batches(small_data(dtype=dtype), plan, start=start, micro_batch=16):
        if batch.step == stop:
            break
        private.backward(batch)
        seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    return torch.stack(seen), plan


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_untouched(kind):
    for dtype in (torch.float32, torch.float64):
        canaries = Canaries(200)
        audited, plan = train_with(canaries, kind=kind, dtype=dtype)
        assert torch.equal(audited, train_with(None, kind=kind, dtype=dtype)[0])
        assert canaries.audit(plan).checks == dict.fromkeys(CHECKS, True)
        assert canaries.signal == (2**-0.5 if kind == "layers" else 1.0)
        assert float(canaries.scores.std()) > 0


def test_canaries_enter_by_the_sampler():
    plan, canaries = make_plan(size=64, batch=16, steps=400), Canaries(100)
    included = canaries.included(plan)
    assert 30 < int(included.sum()) < 70
    drawn = torch.zeros(100)
    for step in range(400):
        both = sample_indices(plan, step, plan.dataset_size + 100)
        assert torch.equal(both[both < 64], sample_indices(plan, step))
        drawn[canaries.sample(plan, step)] += 1
    assert not drawn[~included].any()
    assert drawn[included].mean() == pytest.approx(100, rel=0.05) and drawn[included].min() > 65


def test_scores_continue_from_a_checkpoint():
    whole, first, second = Canaries(50), Canaries(50), Canaries(50)
    train_with(whole)
    model, clip = small_model(), dpopt.clipping.Flat(0.5)
    train_with(first, model=model, clip=clip, stop=5)
    second.load_state_dict(first.state_dict())
    _, plan = train_with(second, model=model, clip=clip, start=5)
    assert torch.equal(whole.scores, second.scores) and second.steps == 12
    assert second.audit(plan) == whole.audit(plan)
    with pytest.raises(ValueError, match="50 canaries, not 60"):
        Canaries(60).load_state_dict(first.state_dict())


def test_a_run_without_noise_is_seen_through():
    plan = PrivacyPlan(0.0, 64, 16, 40, 1e-3, key=make_plan().key)
    canaries, model = Canaries(400), nn.Linear(5, 3).double()
    private = dpopt.PrivateGradient(model, F.cross_entropy, plan, dpopt.clipping.Flat(1.0), canaries=canaries)
    for batch in dpopt.poisson_batches(small_data(), plan):
        private.backward(batch)
    result = canaries.audit(plan)
    assert math.isinf(result.epsilon) and result.bounds["GDP"] > 15 and not result.refuted_by
    assert result.bounds == pytest.approx(result.ceilings, rel=0.1)


def test_what_cannot_be_audited_is_refused():
    with pytest.raises(ValueError, match="at least 16"):
        Canaries(3)
    with pytest.raises(ValueError, match="nothing to audit"):
        dpopt.PrivateGradient(small_model(), F.cross_entropy, make_plan(0.0), None, canaries=Canaries(20))
