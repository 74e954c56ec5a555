import math

import pytest

from dpopt.privacy.accounting import calibrate_noise, calibrate_steps, compute_epsilon, gdp_mu

# σ, q, T, δ → ε by RDP, PRV, PLD; the last row is exact (analytic Gaussian mechanism).
REFERENCE = [
    (1.5, 0.04, 1000, 1e-5, 4.6707, 4.2957, 4.2855),
    (1.5, 0.04, 2250, 1e-5, 7.3291, 6.7774, 6.7688),
    (1.1, 256 / 60000, 14100, 1e-5, 2.6003, 2.3953, 2.3852),
    (4, 0.01, 10000, 1e-5, 1.0355, 0.9569, 0.9470),
    (10, 4096 / 50000, 875, 1e-5, 0.9877, 0.9128, 0.9028),
    (3, 4096 / 50000, 2500, 1e-5, 7.0985, 6.5892, 6.5789),
    (4, 4096 / 45000, 2000, 1e-5, 4.9622, 4.5978, 4.5876),
    (2.5, 16384 / 1281167, 71589, 8e-7, 7.9273, 7.4504, 7.4404),
    (10, 1, 100, 1e-5, 4.7285, 4.3874, 4.3772),
]


@pytest.mark.parametrize("sigma, q, steps, delta, rdp, prv, pld", REFERENCE)
def test_reference_values(sigma, q, steps, delta, rdp, prv, pld):
    assert compute_epsilon(sigma, q, steps, delta, "rdp") == pytest.approx(rdp, rel=1e-2)
    assert compute_epsilon(sigma, q, steps, delta, "prv") == pytest.approx(prv, rel=1e-2)
    assert compute_epsilon(sigma, q, steps, delta, "pld") == pytest.approx(pld, rel=1e-3)


def test_exact_gaussian():
    """With q = 1 the mechanism is a Gaussian one of μ = √T/σ, whose (ε, δ) curve is known in closed form."""
    sigma, steps, delta = 10.0, 100, 1e-5
    mu = math.sqrt(steps) / sigma
    phi = lambda x: math.erfc(-x / math.sqrt(2)) / 2  # noqa: E731
    epsilon = compute_epsilon(sigma, 1.0, steps, delta)
    assert phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu) == pytest.approx(
        delta, rel=1e-2
    )


@pytest.mark.parametrize("accountant", ["pld", "rdp", "prv"])
@pytest.mark.parametrize("epsilon, q, steps", [(8, 0.0819, 1100), (1, 0.0819, 875), (3, 0.01, 2000), (0.5, 0.2, 50)])
def test_noise_reaches_the_target_from_below(accountant, epsilon, q, steps):
    sigma = calibrate_noise(epsilon, q, steps, 1e-5, accountant)
    assert epsilon * (1 - 1e-4) <= compute_epsilon(sigma, q, steps, 1e-5, accountant) <= epsilon


@pytest.mark.parametrize("epsilon, q", [(0.1, 0.178), (20, 0.01), (8, 1.0)])
def test_noise_at_the_edges(epsilon, q):
    sigma = calibrate_noise(epsilon, q, 300, 1e-4)
    assert epsilon * (1 - 1e-4) <= compute_epsilon(sigma, q, 300, 1e-4) <= epsilon


@pytest.mark.parametrize("accountant, expected", [("rdp", {1: 104, 3: 814, 8: 4555}), ("pld", {8: 5157})])
def test_steps_of_the_released_defaults(accountant, expected):
    for epsilon, steps in expected.items():
        found = calibrate_steps(epsilon, 4.0, 4096 / 45000, 1e-5, accountant)
        assert abs(found - steps) <= 1  # Rényi orders beyond Opacus's default ones add a step at ε = 8
        assert compute_epsilon(4.0, 4096 / 45000, found, 1e-5, accountant) <= epsilon
        assert compute_epsilon(4.0, 4096 / 45000, found + 1, 1e-5, accountant) > epsilon


@pytest.mark.parametrize("epsilon, steps, sigma", [(1, 1100, 12.28), (3, 1100, 4.61), (8, 1100, 2.08), (8, 2200, 2.84)])
def test_noise_of_the_released_defaults(epsilon, steps, sigma):
    assert calibrate_noise(epsilon, 4096 / 45000, steps, 1e-5, "rdp") == pytest.approx(sigma, abs=0.02)


def test_degenerate():
    assert compute_epsilon(0.0, 0.1, 10, 1e-5) == math.inf
    assert compute_epsilon(1.0, 0.1, 0, 1e-5) == 0
    assert gdp_mu(0.0, 0.1, 10) == math.inf


def test_errors_name_the_fix():
    with pytest.raises(ValueError, match="choose a larger epsilon, fewer steps"):
        calibrate_noise(1e-3, 0.1, 10**6, 1e-6)
    with pytest.raises(ValueError, match="raise noise_multiplier"):
        calibrate_steps(0.1, 0.5, 0.1, 1e-5)
    with pytest.raises(ValueError, match="unknown accountant"):
        compute_epsilon(1.0, 0.1, 10, 1e-5, "gdp")
