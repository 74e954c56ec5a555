"""ε and σ of tables: the integral along the saddle point's line, held against the accountant."""

import math
import time

import pytest

from dpopt.privacy import accounting, quick
from dpopt.privacy.accounting import calibrate_noise, compute_epsilon
from dpopt.privacy.quick import quick_epsilon, quick_noise

CELLS = [  # N, batch size, epochs, σ, δ
    (50_000, 256, 5, 0.5, 1e-5),
    (50_000, 256, 100, 0.75, 1e-5),
    (50_000, 4096, 100, 1.9, 1e-5),
    (50_000, 4096, 20, 8.0, 1e-9),
    (50_000, 64, 100, 0.65, 1e-5),
    (50_000, 50_000, 10, 4.4, 1e-5),  # no subsampling
    (50_000, 25_000, 2, 0.7, 1e-6),  # four steps
    (50_000, 1024, 20, 0.35, 1e-5),  # ε = 80
    (1797, 128, 1, 6.9, 1e-4),  # ε = 0.1
    (1797, 1797, 1, 1.7, 1e-4),  # one step
    (1797, 1700, 3, 1.0, 1e-2),  # an added example may cost more than a removed one
]


@pytest.mark.slow
@pytest.mark.parametrize("size, batch, epochs, sigma, delta", CELLS)
def test_epsilon_is_the_accountants(size, batch, epochs, sigma, delta, monkeypatch):
    given = (batch / size, max(1, round(epochs * size / batch)), delta)
    exact = compute_epsilon(sigma, *given)
    monkeypatch.setattr(accounting, "compute_epsilon", None)  # not asked
    assert quick_epsilon(sigma, *given) == pytest.approx(exact, rel=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("batch, steps, epsilon", [(1024, 49, 8), (4096, 1221, 1), (64, 4000, 3)])
def test_sigma_is_the_accountants(batch, steps, epsilon, monkeypatch):
    given = (epsilon, batch / 50_000, steps, 1e-5)
    exact = calibrate_noise(*given)
    monkeypatch.setattr(accounting, "calibrate_noise", None)
    assert quick_noise(*given) == pytest.approx(exact, rel=3e-4)


def test_what_the_sums_cannot_tell_the_accountant_does(monkeypatch):
    """A grid of the accountant that adds to ε, and an ε of 0."""
    coarse = (2.0, 32 / 1e6, 3_000_000)
    with pytest.raises(quick._NotConverged):
        quick._check(*coarse, 0.5)
    assert quick_epsilon(30.0, 1e-3, 1, 1e-2) == 0 and quick_epsilon(0.0, 0.1, 10, 1e-5) == math.inf
    monkeypatch.setattr(accounting, "compute_epsilon", lambda *given: given)
    assert quick_epsilon(*coarse, 1e-7) == (*coarse, 1e-7)


def test_each_direction_is_the_accountants():
    sigma, rate, steps = 1.0, 0.2, 10
    composed = accounting._one_step_pld.__wrapped__(sigma, rate, 1e-3).self_compose(steps)
    for removed, distribution in ((True, composed._pmf_remove), (False, composed._pmf_add)):
        for epsilon in (0.5, 1.5):
            line = quick._Line(sigma, rate, steps, epsilon, removed)
            saddle, bound = line.saddle()
            exact = math.log(distribution.get_delta_for_epsilon(epsilon))
            assert line.integral(saddle) == pytest.approx(exact, abs=2e-3) and bound > exact


@pytest.mark.parametrize("larger", [True, False])
def test_the_larger_direction_counts(larger, monkeypatch):
    monkeypatch.setattr(quick._Line, "saddle", lambda line: (1.0, -1.0))
    monkeypatch.setattr(quick._Line, "integral", lambda line, s: -4.0 if line.removed is larger else -5.0)
    assert quick._log_delta(1.0, 0.1, 10, 1.0) == -4


def test_refusals():
    with pytest.raises(ValueError, match="delta=1e-11 is too small for PLD"):
        quick_noise(8, 0.01, 100, 1e-11)
    with pytest.raises(ValueError, match="no noise multiplier in"):
        quick_noise(1e-6, 1.0, 10**8, 1e-5)


@pytest.mark.slow
def test_a_hundred_cells_take_seconds():
    """Ten, of one core."""
    began = time.process_time()
    for batch in [64 * 2**k for k in range(10)]:
        for epochs in (1, 2, 5, 10, 20, 30, 50, 100, 200, 300):
            quick_noise(8, batch / 50_000, max(1, round(epochs * 50_000 / batch)), 1e-5)
    assert time.process_time() - began < 10
