"""What (ε, δ) leaves to a guesser, against mechanisms that reach the bound and against ones that do not."""

import io
import math
from contextlib import redirect_stdout

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from dpopt.privacy.accounting import compute_epsilon, distinguishing_advantage, recipe
from dpopt.privacy.guessing import correct_guesses, found_members, meeting_point

BUDGETS = [(0.1, 1e-5), (1.0, 1e-5), (3.0, 0.01), (8.0, 1e-6), (0.0, 0.2)]


def leaking_response(epsilon, delta):
    """Chances of outcomes when the record is absent and present: with δ it is shown, else a coin of odds e^ε is."""
    low, high = (1 - delta) / (1 + math.exp(epsilon)), (1 - delta) * math.exp(epsilon) / (1 + math.exp(epsilon))
    return np.array([delta, high, low, 0.0]), np.array([0.0, low, high, delta])


@pytest.mark.parametrize("epsilon, delta", BUDGETS)
@pytest.mark.parametrize("prior", [0.5, 0.1, 0.001, 0.9])
def test_the_bound_is_reached_by_the_worst_mechanism(epsilon, delta, prior):
    """The best guess names the likelier state after each outcome; no formula of the module is used."""
    absent, present = leaking_response(epsilon, delta)
    best = np.maximum(prior * present, (1 - prior) * absent).sum()
    assert correct_guesses(epsilon, delta, prior) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("epsilon, delta", BUDGETS)
def test_the_share_of_members_is_that_of_the_worst_mechanism(epsilon, delta):
    absent, present = leaking_response(epsilon, delta)
    for rate in (0.0, 1e-4, 0.01, 0.3, 0.9, 1.0):
        found, left = 0.0, rate
        for false, true in sorted(zip(absent, present, strict=True), key=lambda pair: -pair[1] / (pair[0] or 1e-300)):
            share = 1.0 if false <= left else left / false
            found, left = found + share * true, left - share * false
        assert found_members(epsilon, delta, rate) == pytest.approx(found, abs=1e-12)


def test_known_numbers():
    assert correct_guesses(1.0, 0.0) == pytest.approx(0.7310586)
    assert correct_guesses(1.0, 1e-5) == pytest.approx((math.e + 1e-5) / (1 + math.e), rel=1e-12)
    assert correct_guesses(math.inf, 1e-5) == correct_guesses(2000.0, 1e-5) == 1 == found_members(2000.0, 0.0, 0.01)
    assert correct_guesses(0.0, 0.0) == 0.5 and meeting_point(0.0, 0.0) == (0.5, 0.5)
    assert correct_guesses(0.1, 0.0, prior=0.001) == 0.999  # too rare to be worth a guess


def test_no_gaussian_guesser_is_better():
    """The mechanism of one full-batch step with its own ε: power of the likelihood-ratio test, Φ(Φ⁻¹(F) + 1/σ)."""
    for sigma, delta in ((1.0, 1e-5), (4.0, 1e-3)):
        epsilon = compute_epsilon(sigma, 1.0, 1, delta)
        false = np.linspace(1e-6, 1 - 1e-6, 2001)
        true = ndtr(ndtri(false) + 1 / sigma)
        assert all(t <= found_members(epsilon, delta, f) + 1e-12 for f, t in zip(false, true, strict=True))
        advantage = distinguishing_advantage(((sigma, 1.0, 1),))
        assert (true - false).max() == pytest.approx(advantage, abs=2e-4)
        assert (1 + advantage) / 2 < correct_guesses(epsilon, delta)


@pytest.mark.parametrize("seed", [0, 1])
def test_odds_double_beyond_epsilon_rarely(seed):
    """A sampled Gaussian mechanism: the chance of L ≥ ε + ln 2 is at most 2δ."""
    sigma, rate, delta = 0.8, 0.1, 0.01
    epsilon = compute_epsilon(sigma, rate, 1, delta)
    generator = np.random.default_rng(seed)
    count = 400_000
    outcome = generator.normal(size=count) * sigma + (generator.random(count) < rate)
    loss = np.log(1 - rate + rate * np.exp((2 * outcome - 1) / (2 * sigma**2)))
    assert (loss >= epsilon).mean() > 0 and (loss >= epsilon + math.log(2)).mean() <= 2 * delta


@pytest.mark.parametrize("accountant", ["pld", "rdp", "prv"])
@pytest.mark.filterwarnings("ignore")  # Opacus warns at the edges of its search
def test_the_recipe_computes_the_same_epsilon(accountant):
    for sigma, batch, size, steps, delta in ((1.1, 64, 1437, 30, 1e-4), (0.4, 7, 100, 12, 1e-3)):
        with redirect_stdout(io.StringIO()) as printed:
            exec(recipe(sigma, batch, size, steps, delta, accountant), {})
        assert float(printed.getvalue()) == compute_epsilon(sigma, batch / size, steps, delta, accountant)
        assert "dpopt" not in recipe(sigma, batch, size, steps, delta, accountant)


def test_the_advantage_at_the_ends():
    assert distinguishing_advantage(((1.0, 0.1, 0),)) == 0 and distinguishing_advantage(((0.0, 0.1, 3),)) == 1
