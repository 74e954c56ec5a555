"""Mechanisms: their coefficients, their plans, what goes with them and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Flatland, configure, flat_loss, make_plan, released_noise, small_data, small_model
from scipy import optimize
from torch import nn

import dpopt
from dpopt.filters import Kalman
from dpopt.privacy import mechanisms
from dpopt.privacy.accounting import compute_epsilon
from dpopt.privacy.canaries import Canaries
from dpopt.privacy.clipping import Flat
from dpopt.privacy.correlated import CorrelatedNoise
from dpopt.privacy.least_squares import LeastSquares
from dpopt.privacy.mechanisms import BandMF, LambdaCGD
from dpopt.privacy.noise import _FINE, release_grid
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.privacy.zeroth_order import ZerothOrder
from dpopt.rng import RandomKey
from dpopt.runs.ledger import spending, total_epsilon
from dpopt.runs.privacy_card import _recipe
from dpopt.training.cost import estimate_cost

COMMON = dict(delta=1e-5, dataset_size=50_000, batch_size=512)


def banded(steps=12, bands=3, **options):
    return replace(make_plan(steps=steps, **options), mechanism=BandMF(bands))


def dense_error(column, steps):
    """‖A·C⁻¹‖·max‖column of C‖, with matrices."""
    c = sum(value * np.eye(steps, k=-j) for j, value in enumerate(column))
    return np.linalg.norm(np.tril(np.ones((steps, steps))) @ np.linalg.inv(c)) * np.linalg.norm(c, axis=0).max()


@pytest.mark.parametrize("bands, steps", [(2, 9), (4, 40), (16, 100)])
def test_coefficients_are_the_best(bands, steps):
    """By dense matrices, against every neighbor, a general search, and the lower terms of (1 − x)^(−½)."""
    column = np.array(mechanisms.coefficients(bands, steps))
    assert np.linalg.norm(column) == pytest.approx(1.0, abs=1e-14)
    best = dense_error(column, steps)
    start = np.cumprod([1.0, *((2 * j - 1) / (2 * j) for j in range(1, bands))])
    assert best < dense_error(start, steps)
    for j in range(1, bands):
        for change in (-0.01, 0.01):
            assert dense_error(column + change * np.eye(bands)[j], steps) > best
    if bands < 5:
        searched = optimize.minimize(lambda x: dense_error([1.0, *x], steps), start[1:], method="Nelder-Mead")
        assert best == pytest.approx(searched.fun, rel=1e-6)


def test_error_at_equal_epsilon():
    """RMSE of prefix sums at ε = 8, 5 epochs of 256 in 50,000: 40% of DP-SGD's, and less than at ε = 1."""

    def relative(epsilon, bands):
        plans = [
            dpopt.PrivacyPlan.calibrate(epsilon=epsilon, epochs=5, **COMMON | {"batch_size": 256}, mechanism=mechanism)
            for mechanism in (mechanisms.INDEPENDENT, BandMF(bands))
        ]
        noise, sums = CorrelatedNoise(plans[1]), np.ones(plans[1].steps)
        sums = np.cumsum(mechanisms.impulse(noise.draws, noise.feedback, plans[1].steps))
        weights = np.arange(plans[1].steps, 0, -1)
        rmse = math.sqrt(weights @ sums**2 / weights.sum())
        return rmse * plans[1].noise_multiplier / plans[0].noise_multiplier

    assert relative(8, 32) == pytest.approx(0.40, abs=0.01)


@pytest.mark.parametrize("mechanism", [BandMF(8), LambdaCGD(0.9)])
def test_plans_derive_what_is_missing(mechanism):
    plan = dpopt.PrivacyPlan.calibrate(epsilon=3, epochs=2, mechanism=mechanism, **COMMON)
    assert 3 * (1 - 1e-4) <= plan.epsilon <= 3
    steps = dpopt.PrivacyPlan.calibrate(
        epsilon=3, noise_multiplier=plan.noise_multiplier, mechanism=mechanism, **COMMON
    ).steps
    assert plan.epsilon_at(steps) <= 3 < plan.epsilon_at(steps + 1) and steps >= plan.steps
    assert plan.epsilon_by_others(plan.steps)["rdp"] > plan.epsilon
    again = dpopt.PrivacyPlan.calibrate(epsilon=3, epochs=2, mechanism=mechanism, **COMMON)
    assert again == plan and again.to_dict() == plan.to_dict()
    assert plan != replace(plan, mechanism=mechanisms.INDEPENDENT)


def test_a_plan_of_independent_noise_records_what_it_always_did():
    assert set(make_plan().to_dict()) == {
        *("noise_multiplier", "dataset_size", "batch_size", "steps", "delta", "accountant", "count_noise"),
        *("sample_rate", "relation", "sampler"),
    }
    assert make_plan().to_dict()["sampler"] == "poisson" and banded().to_dict()["sampler"] == "cyclic_poisson"


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: banded(bands=5), "set mechanism.bands=4, or a smaller batch_size"),  # q·b = 5/4
        (lambda: banded(steps=2, bands=3), "set mechanism.bands=2"),
        (lambda: banded(size=16, bands=2), "choose mechanism=gaussian"),
        (lambda: BandMF(1), "take 2 or more"),
        (lambda: LambdaCGD(1.0), "must lie between 0 and 1"),
        (lambda: replace(make_plan(), mechanism="bandmf"), "pass one of dpopt.mechanisms"),
        (
            lambda: PrivateGradient(small_model(), F.cross_entropy, banded(), Flat(1.0), canaries=Canaries(16)),
            "audit with mechanism=gaussian",
        ),
        (lambda: ZerothOrder(small_model(), F.cross_entropy, banded(), Flat(1.0)), "choose mechanism=gaussian"),
        (lambda: LeastSquares(nn.Linear(5, 3), F.cross_entropy, banded(size=16, steps=1), Flat(1.0)), "gaussian"),
        (lambda: configure("mechanism=bandmf", "audit=true"), "drop audit, or choose mechanism=gaussian"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_the_largest_number_of_bands_takes_each_example_once_per_round():
    for size, batch in ((49, 1), (60, 20), (50_000, 500), (61, 3), (93, 31)):
        plan = dpopt.PrivacyPlan(1.0, size, batch, 200, 1e-6, mechanism=BandMF(max(2, size // batch)))
        assert plan.group_rate <= 1 and plan.group_rate == pytest.approx(batch * plan.groups / size, rel=1e-12)
        with pytest.raises(ValueError, match="samples at so many times"):
            replace(plan, mechanism=BandMF(size // batch + 1))


@pytest.mark.parametrize("mechanism", [BandMF(3), LambdaCGD(0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_releases_lie_on_the_grid_of_new_noise(mechanism, dtype):
    """Also given all earlier noise: what is new in a step has the deviation that the grid is made for, or more."""
    plan = replace(make_plan(sigma=1.1, steps=12), mechanism=mechanism)
    assert CorrelatedNoise(plan).draws[0] >= 1
    model = Flatland(4000).to(dtype)
    private = PrivateGradient(model, flat_loss, plan, Flat(0.5))
    data = (torch.zeros(64, 2, dtype=dtype), torch.zeros(64))
    for batch in dpopt.poisson_batches(data, plan):
        private.backward(batch)
        cells = model.weight.grad.double() * 16 / release_grid(1.1 * 0.5)
        assert torch.equal(cells, cells.round())
        assert len(cells.unique()) > 2800  # of 4,000 draws


def test_adam_bc_subtracts_the_variance_of_each_step():
    plan, model = banded(), Flatland()
    private = PrivateGradient(model, flat_loss, plan, Flat(0.5))
    optimizer = dpopt.optim.AdamBC(model.parameters(), lr=0.1)
    told = []
    for batch in dpopt.poisson_batches((torch.zeros(64, 2), torch.zeros(64)), plan):
        private.backward(batch)
        private.update_param_groups(optimizer)
        told.append(optimizer.param_groups[0]["noise_std"])
        assert told[-1] == pytest.approx(float(model.weight.grad.std()), rel=0.03)
    assert told[0] < told[1] < told[-1]


def test_scales_and_filters_leave_the_noise_as_it_is():
    """The noise of the sum, before the scale is undone, is that of a plain step."""
    plan = banded()
    plain = released_noise(plan, Flat(0.5), steps=4, size=500)

    def noise(**options):
        model = Flatland(500)
        if options.pop("filtered", False):
            options["query_points"] = Kalman(model.parameters()).query_points
        private, seen = PrivateGradient(model, flat_loss, plan, Flat(0.5), **options), []
        for batch in dpopt.poisson_batches((torch.zeros(64, 2), torch.zeros(64)), plan):
            private.backward(batch)
            seen.append(model.weight.grad.clone() * 16)
        return torch.cat(seen[:4])

    torch.testing.assert_close(noise(pre_clip_scale=lambda p: torch.full_like(p, 4.0)) * 4, plain)
    torch.testing.assert_close(noise(filtered=True), plain)


def test_a_step_that_breaks_off_leaves_no_half_memory():
    plan = banded(steps=6)
    noise, whole, total = CorrelatedNoise(plan), CorrelatedNoise(plan), torch.zeros(300_000)
    for step in range(6):
        next(iter(noise.pieces(total, plan.key, step)))  # the first of three pieces
        pair = [[piece.clone() for piece in n.pieces(total, plan.key, step)] for n in (noise, whole)]
        assert torch.equal(torch.cat(pair[0]), torch.cat(pair[1]))


def test_the_ledger_composes_what_was_accounted():
    about = dict(run="r", name="n", dataset="d", data="x", key_id="k")
    for mechanism in (BandMF(8), LambdaCGD(0.9), mechanisms.INDEPENDENT):
        plan = dpopt.PrivacyPlan.calibrate(epsilon=2, steps=50, mechanism=mechanism, **COMMON)
        assert total_epsilon([spending(plan, 50, "finished", **about)], 1e-5) == pytest.approx(plan.epsilon, rel=1e-6)


def test_kept_noise_is_in_the_estimate():
    model = small_model(torch.float32)
    engine = PrivateGradient(model, F.cross_entropy, make_plan(), Flat(1.0)).engine
    count = sum(p.numel() for p in model.parameters())
    memory = [
        estimate_cost(engine, torch.optim.SGD, plan, (torch.zeros(1, 5), torch.tensor(0)), 4, False).memory_bytes
        for plan in (make_plan(steps=12), banded(bands=4))
    ]
    assert memory[1] - memory[0] == 3 * 4 * count
    private = PrivateGradient(model, F.cross_entropy, banded(bands=4), Flat(1.0))
    private.backward(next(dpopt.poisson_batches(small_data(dtype=torch.float32), private.plan)))
    assert private.noise._past.nbytes == 3 * 4 * count


def test_a_count_costs_no_more_than_the_plan_says():
    """A Gaussian of both shifts of an example: a column of norm 1 at σ_Δ, and ½ at σ_b."""
    plan = replace(banded(sigma=1.0), count_noise=2.0)
    together = (plan.gradient_noise_multiplier**-2 + (2 * 2.0) ** -2) ** -0.5
    assert plan.epsilon == pytest.approx(compute_epsilon(together, 0.75, 4, 1e-3), rel=1e-6)


def test_the_kernel_draws_what_the_processor_draws(monkeypatch):
    """Draws that a GPU makes by themselves, on a grid so fine that nothing is rounded away."""
    pytest.importorskip("triton")
    from dpopt.privacy import noise_triton

    if not torch.cuda.is_available():  # the interpreter pays by the program
        monkeypatch.setattr(noise_triton, "_LANES", 4096)
    total = torch.zeros(3000, device="cuda" if torch.cuda.is_available() else "cpu")
    key = RandomKey.from_seed(1)
    found = noise_triton.add_noise_kernel(total, 1.0, 1.0, _FINE, key, 5).cpu()
    torch.testing.assert_close(found, key.normal(3000, "noise", 5), rtol=1e-5, atol=1e-6)
    assert len(found.unique()) > 2995


@pytest.mark.parametrize("mechanism", [BandMF(8), LambdaCGD(0.9)])
def test_the_recipe_of_the_card_computes_the_same_epsilon(mechanism, capsys):
    plan = dpopt.PrivacyPlan.calibrate(epsilon=2, steps=50, mechanism=mechanism, **COMMON)
    for steps in (7, 50):
        lines = _recipe(plan, steps)
        exec(lines[3], {})
        assert float(capsys.readouterr().out) == pytest.approx(plan.epsilon_at(steps), rel=1e-6)
