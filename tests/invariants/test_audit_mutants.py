"""The audit: silent about the true code, and each wrong version of the library is caught by a check that names it.

The wrong versions are those of scripts/audit_mutants.py, here on a small problem.
"""

import functools
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, assert_caught, make_plan, small_data, small_model

import dpopt
from dpopt.privacy.canaries import CHECKS, Canaries
from dpopt.privacy.plan import PrivacyPlan
from dpopt.rng import RandomKey

sys.path.insert(0, str(ROOT / "scripts"))
import audit_versions

pytestmark = pytest.mark.slow


def audited(count=800, steps=60):
    """Audit a small training, of ε = 5.8 in 60 steps."""
    key = RandomKey.from_seed(1, "audit")
    plan = PrivacyPlan(1.39, 64, 16, steps, 1e-3, key=key)
    canaries, model = Canaries(count), small_model()
    private = dpopt.PrivateGradient(model, F.cross_entropy, plan, dpopt.clipping.Flat(1.0), canaries=canaries)
    for batch in dpopt.poisson_batches(small_data(), plan, micro_batch=16):
        private.backward(batch)
    return canaries.audit(plan)


def check_no_bound_exceeds_the_claim():
    result = audited()
    assert result.bounds["GDP"] > 0.4 * result.epsilon and all(b <= result.epsilon for b in result.bounds.values())


def check_the_key_replays_what_is_released():
    assert audited(1000, 8).checks == dict.fromkeys(CHECKS, True)


def check_small_problems():
    assert all(audit_versions.small_checks().values())


def check_training_is_untouched():
    def gradient(canaries):
        model, plan = small_model(), make_plan()
        private = dpopt.PrivateGradient(model, F.cross_entropy, plan, dpopt.clipping.Flat(1.0), canaries=canaries)
        private.backward(next(iter(dpopt.poisson_batches(small_data(), plan))))
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    assert torch.equal(gradient(None), gradient(Canaries(50)))


def canaries_in_the_models_coordinates(put):
    real = Canaries.add_to
    put(Canaries, "add_to", lambda self, total, *rest: (real(self, total, *rest), total.add_(1.0)))


def adapted(mutant):
    """A wrong version as the tests' monkeypatch takes it."""
    return functools.wraps(mutant)(lambda patch: mutant(patch.setattr))


VERSIONS = audit_versions
MUTANTS = {
    check_no_bound_exceeds_the_claim: [
        VERSIONS.half_the_noise,
        VERSIONS.no_noise,
        VERSIONS.no_clip,
        VERSIONS.half_the_rate_accounted,
    ],
    check_the_key_replays_what_is_released: [
        VERSIONS.half_the_noise,
        VERSIONS.no_clip,
        VERSIONS.bf16_noise,
        VERSIONS.realized_divisor,
        VERSIONS.noise_per_micro_batch,
    ],
    check_small_problems: [
        VERSIONS.empty_step_skipped,
        VERSIONS.noise_per_micro_batch,
        VERSIONS.views_clipped_apart,
        VERSIONS.realized_divisor,
    ],
    check_training_is_untouched: [canaries_in_the_models_coordinates],
}
PAIRS = [(check, adapted(mutant)) for check, mutants in MUTANTS.items() for mutant in mutants]


@pytest.mark.parametrize("check", MUTANTS, ids=lambda f: f.__name__)
def test_invariant(check):
    check()


@pytest.mark.parametrize("check, mutant", PAIRS, ids=lambda f: f.__name__)
def test_mutant_is_caught(check, mutant, monkeypatch):
    assert_caught(check, mutant, monkeypatch)


def test_all_checks_and_versions_are_listed():
    assert set(MUTANTS) == {f for name, f in globals().items() if name.startswith("check_")}
    assert set(VERSIONS.MUTANTS) <= {mutant for mutants in MUTANTS.values() for mutant in mutants}
