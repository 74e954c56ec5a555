import math
from dataclasses import FrozenInstanceError, replace

import pytest

from dpopt import PrivacyPlan

COMMON = dict(delta=1e-5, dataset_size=50_000, batch_size=4096)


def test_any_two_give_the_third():
    by_noise = PrivacyPlan.calibrate(epsilon=8, steps=200, **COMMON)
    by_budget = PrivacyPlan.calibrate(noise_multiplier=by_noise.noise_multiplier, steps=200, **COMMON)
    by_steps = PrivacyPlan.calibrate(epsilon=8, noise_multiplier=by_noise.noise_multiplier, **COMMON)
    assert by_noise == by_budget
    assert 7.9992 <= by_noise.epsilon <= 8
    assert by_steps.steps in (200, 201)
    assert by_steps.epsilon_at(by_steps.steps) <= 8 < by_steps.epsilon_at(by_steps.steps + 1)


def test_epochs_become_steps():
    assert PrivacyPlan.calibrate(noise_multiplier=4, epochs=100, **COMMON).steps == round(100 * 50_000 / 4096)


def test_infinite_epsilon_has_no_noise():
    plan = PrivacyPlan.calibrate(epsilon=math.inf, steps=10, **COMMON)
    assert plan.noise_multiplier == 0 and plan.epsilon == math.inf


def test_frozen_and_without_the_key_in_what_is_shown():
    plan = PrivacyPlan.calibrate(noise_multiplier=4, steps=10, **COMMON)
    with pytest.raises(FrozenInstanceError):
        plan.noise_multiplier = 1.0
    assert "key" not in plan.to_dict() and plan.key.material.hex() not in repr(plan)
    assert repr(plan.key.material) not in repr(plan)
    assert plan.key.secure and replace(plan).key.material != PrivacyPlan(4, 10, 5, 1, 1e-3).key.material


def test_seed_makes_the_key():
    keys = [PrivacyPlan.calibrate(noise_multiplier=4, steps=10, seed=seed, **COMMON).key for seed in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2] and not keys[0].secure
    other = PrivacyPlan.calibrate(noise_multiplier=5, steps=10, seed=0, **COMMON)
    assert other.key != keys[0]  # two budgets of one seed share no noise


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(epsilon=8, steps=10, noise_multiplier=1.0), "set one to null"),
        (dict(epsilon=8), "set noise_multiplier"),
        (dict(steps=10), "set epsilon"),
        (dict(epsilon=-1, steps=10), "epsilon=-1 must be"),
        (dict(epsilon=math.nan, steps=10), "epsilon=nan must be"),
        (dict(epsilon=8, steps=10, epochs=1), "set one of them to null"),
        (dict(epsilon=8, steps=10, delta=2), "delta=2 must be"),
        (dict(epsilon=8, steps=10, batch_size=60_000), "lower batch_size"),
        (dict(epsilon=8, steps=10, batch_size=0), "batch_size=0 must lie"),
        (dict(epsilon=8, epochs=-1), "epochs=-1 must be"),
        (dict(noise_multiplier=-1.0, steps=10), "noise_multiplier=-1.0 must be"),
        (dict(noise_multiplier=1e-9, steps=10), "noise_multiplier=1e-09 must be"),
        (dict(epsilon=8, steps=10, accountant="x"), "must be one of pld, rdp, prv"),
        (dict(epsilon=math.inf, noise_multiplier=1.0), "set steps"),
        (dict(epsilon=1e-4, steps=100_000), "choose a larger epsilon"),
    ],
)
def test_bad_plans(bad, message):
    with pytest.raises(ValueError, match=message):
        PrivacyPlan.calibrate(**{**COMMON, **bad})
