"""Invariants 7 to 10 of the design: what a run derives, keeps and says. For each check mutants that it must catch."""

import io
import math
import re
from contextlib import redirect_stdout
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import make_plan, rekeyed, released_noise, small_data, small_model, train
from torch import nn

import dpopt
from dpopt import rng
from dpopt.config.schema import Config
from dpopt.privacy import accounting, private_gradient, sampling
from dpopt.privacy.accounting import compute_epsilon
from dpopt.privacy.clipping import Flat
from dpopt.privacy.plan import PrivacyPlan
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.rng import RandomKey
from dpopt.runs import privacy_card as privacy_card_module
from dpopt.runs.identity import describe
from dpopt.runs.privacy_card import CardFacts, guarantee, privacy_card

REAL_SAMPLE = sampling.sample_indices


# 7. What is derived meets its target; nothing raw is recorded by default.


def check_derived_quantities_meet_their_target():
    common = dict(delta=1e-5, dataset_size=50_000, batch_size=4096)
    sigma = PrivacyPlan.calibrate(epsilon=3, steps=500, **common).noise_multiplier
    exact = accounting._one_step_pld.__wrapped__(sigma, 4096 / 50_000, 1e-4).self_compose(500)
    assert 3 * (1 - 1e-4) <= exact.get_epsilon_for_delta(1e-5) <= 3
    steps = PrivacyPlan.calibrate(epsilon=3, noise_multiplier=6.0, **common).steps
    one = accounting._one_step_pld.__wrapped__(6.0, 4096 / 50_000, 1e-4)
    after, beyond = (one.self_compose(t).get_epsilon_for_delta(1e-5) for t in (steps, steps + 1))
    assert after <= 3 < beyond


def calibrated_by_the_other_accountant(patch):
    real = accounting.calibrate_noise
    patch.setattr(accounting, "calibrate_noise", lambda e, q, t, d, a, first: real(e, q, t, d, "rdp", first))


def calibrated_a_little_low(patch):
    real = accounting.calibrate_noise
    patch.setattr(accounting, "calibrate_noise", lambda *arguments: 0.999 * real(*arguments))


def steps_one_too_many(patch):
    real = accounting.calibrate_steps
    patch.setattr(accounting, "calibrate_steps", lambda *arguments: real(*arguments) + 1)


def check_nothing_raw_without_diagnostics():
    model, plan = small_model(), make_plan()
    private = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0))
    private.backward(next(dpopt.poisson_batches(small_data(), plan)))
    assert private.statistics == {}


def diagnostics_always_on(patch):
    real = PrivateGradient.__init__

    def init(self, *arguments, **options):
        real(self, *arguments, **options)
        self.diagnostics = True

    patch.setattr(PrivateGradient, "__init__", init)


# 8. Keyed streams: replayable, and never shared between runs.


def check_streams_are_keyed():
    noise = [released_noise(rekeyed(make_plan(), seed), steps=2) for seed in (0, 0, 1)]
    assert torch.equal(noise[0], noise[1])
    for a, b in ((noise[0], noise[2]), (noise[0][:20_000], noise[0][20_000:])):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.03
    samples = [set(REAL_SAMPLE(rekeyed(make_plan(), seed), step).tolist()) for seed in (0, 1) for step in (0, 1)]
    assert len({frozenset(s) for s in samples}) == 4
    names = [RandomKey.from_seed(0, run, "data").normal(9, "noise", 0) for run in ("run-a", "run-b")]
    assert not torch.equal(*names)


def key_of_the_seed_alone(patch):
    real = RandomKey.from_seed
    patch.setattr(RandomKey, "from_seed", classmethod(lambda cls, seed, *context: real(seed)))


def the_same_noise_at_every_step(patch):
    real = rng.stream_key
    patch.setattr(rng, "stream_key", lambda key, *labels: real(key, labels[0]))


def unkeyed_noise(patch):
    patch.setattr(RandomKey, "gaussians", lambda self, count, *labels, **options: iter([torch.randn(count)]))


# 9. Nothing is silently left untrained or unclipped.


def check_uncovered_parameters_are_refused():
    norm = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with pytest.raises(ValueError, match=r"'1'.*1\.weight"):
        PrivateGradient(norm, F.cross_entropy, make_plan(), Flat(1.0))


def check_parameters_outside_the_loss_are_refused():
    model = small_model()
    model.orphan = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="orphan"):
        train(make_plan(), model, small_data(), torch.optim.SGD(model.parameters(), lr=0.1), stop=1)


def models_unchecked(patch):
    patch.setattr(private_gradient, "check_model", lambda model, private: None)


def unprobed(patch):
    patch.setattr(private_gradient, "validate", lambda *arguments: None)


# 10. The card says what ε means.


def check_the_card_says_it_all():
    config = Config(clipping={"_target_": "dpopt.clipping.Flat", "clip_norm": 0.5}, epsilon=8.0, steps=20)
    config = replace(config, randomness="research")
    plan = make_plan(sigma=1.3, delta=1e-3)
    going = privacy_card(describe(config), plan, 0.5, None, True)
    assert f"ε = {plan.epsilon:.4g}" in going and "the run is in progress" in going
    card = privacy_card(describe(config), plan, 0.5, 7, True)
    assert "in progress" not in card and "| method | `" in card
    for words in (
        f"ε = {compute_epsilon(1.3, 0.25, 7, 1e-3):.4g}, δ = 0.001",
        "one training example",
        "one example added or removed",
        "64, taken as public",
        "0.001 = 0.064 · 1/N",
        "Poisson, q = 0.25",
        "sensitivity 0.5",
        "1.3",
        f"by rdp {compute_epsilon(1.3, 0.25, 7, 1e-3, 'rdp'):.4g}",
        "after 7 of 20",
        "No claim: reproducible noise",
        "noise version 3",
        "choice of hyper-parameters",
        "use of the test set",
        "private/",
        "diagnostics=true",
    ):
        assert words in card, words
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    with redirect_stdout(io.StringIO()) as printed:  # by dp-accounting alone
        exec(code, {})
    assert float(printed.getvalue()) == pytest.approx(compute_epsilon(1.3, 0.25, 7, 1e-3), rel=1e-12)
    spent = compute_epsilon(1.3, 0.25, 7, 1e-3)
    (guesses,) = re.findall(r"right at most \*\*([\d.]+) times in 100", card)
    assert 0 <= float(guesses) - 100 * (math.exp(spent) + 1e-3) / (1 + math.exp(spent)) <= 0.01
    above = privacy_card(describe(config), replace(plan, delta=0.5, allow_large_delta=True), 0.5, 20, False)
    assert "not below 1/N" in above and "not below 1/N" not in card
    config = replace(config, randomness="secret")
    secret = privacy_card(describe(config), plan, 0.5, 20, False, CardFacts(public={"initial weights": "random"}))
    assert (
        "operating system" in secret and "No claim" not in secret and "| initial weights (public) | random |" in secret
    )
    assert guarantee(describe(config), plan, 20) == f"({plan.epsilon_at(20):.4g}, 0.001)-differential privacy"
    none = privacy_card(describe(Config(private=False, steps=20)), replace(plan, noise_multiplier=0.0), None, 20, False)
    clipped = privacy_card(describe(config), replace(plan, noise_multiplier=0.0), 0.5, 20, False)
    watched = privacy_card(describe(config), replace(plan, noise_multiplier=0.0), 0.5, 20, True)
    for text in (none, clipped, watched):
        assert "is not private" in text and "differential privacy for" not in text
        assert "Nothing is protected" in text and "ε protects" not in text and "Not accounted" not in text


def card_without_the_unaccounted(patch):
    patch.setattr("dpopt.runs.privacy_card._UNACCOUNTED", "")


def card_of_a_control_that_protects(patch):
    patch.setattr("dpopt.runs.privacy_card._UNPROTECTED", "Nothing is protected, but ε protects training examples.")


def card_that_claims_reproducible_noise(patch):
    patch.setattr("dpopt.runs.privacy_card.REPRODUCIBLE", "noise")


def card_of_the_planned_epsilon(patch):
    real = PrivacyPlan.epsilon_at
    patch.setattr(PrivacyPlan, "epsilon_at", lambda self, step, accountant=None: real(self, self.steps, accountant))


def card_that_recomputes_less_noise(patch):
    real = privacy_card_module.recipe
    patch.setattr(privacy_card_module, "recipe", lambda noise, *rest: real(noise * 1.01, *rest))


def card_that_flatters_the_guesser(patch):
    real = privacy_card_module.correct_guesses
    patch.setattr(privacy_card_module, "correct_guesses", lambda epsilon, delta: real(0.98 * epsilon, delta))


MUTANTS = {
    check_derived_quantities_meet_their_target: [
        calibrated_by_the_other_accountant,
        calibrated_a_little_low,
        steps_one_too_many,
    ],
    check_nothing_raw_without_diagnostics: [diagnostics_always_on],
    check_streams_are_keyed: [key_of_the_seed_alone, the_same_noise_at_every_step, unkeyed_noise],
    check_uncovered_parameters_are_refused: [models_unchecked],
    check_parameters_outside_the_loss_are_refused: [unprobed],
    check_the_card_says_it_all: [
        card_without_the_unaccounted,
        card_of_a_control_that_protects,
        card_of_the_planned_epsilon,
        card_that_recomputes_less_noise,
        card_that_flatters_the_guesser,
        card_that_claims_reproducible_noise,
    ],
}
