"""The audit: silent about the true code, and each wrong version of the library is caught by a check that names it.

The wrong versions are those of scripts/audit_mutants.py, here on a small problem.
"""

import functools
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, make_plan, small_data, small_model

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


def adapted(*mutants):
    """Wrong versions of the script, as monkeypatch puts them in place."""
    return [functools.wraps(mutant)(lambda patch, mutant=mutant: mutant(patch.setattr)) for mutant in mutants]


MUTANTS = {
    check_no_bound_exceeds_the_claim: adapted(
        audit_versions.half_the_noise,
        audit_versions.no_noise,
        audit_versions.no_clip,
        audit_versions.half_the_rate_accounted,
    ),
    check_the_key_replays_what_is_released: adapted(
        audit_versions.half_the_noise,
        audit_versions.no_clip,
        audit_versions.bf16_noise,
        audit_versions.realized_divisor,
        audit_versions.noise_per_micro_batch,
    ),
    check_small_problems: adapted(
        audit_versions.empty_step_skipped,
        audit_versions.noise_per_micro_batch,
        audit_versions.views_clipped_apart,
        audit_versions.realized_divisor,
    ),
    check_training_is_untouched: adapted(canaries_in_the_models_coordinates),
}
