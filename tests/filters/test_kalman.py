"""DiSK: gradients at two points, clipped as one release, and the filter, against a literal loop."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Bowl, batch_of, clipped_sum, flat_loss, make_plan, small_data, small_model
from torch import nn

import dpopt
from dpopt.filters import Kalman
from dpopt.privacy.clipping import Flat
from dpopt.privacy.plan import PrivacyPlan
from dpopt.privacy.private_gradient import PrivateGradient


@pytest.mark.parametrize("kappa, gamma", [(0.7, 0.5), (0.7, None), (0.5, 1.0), (1.0, 0.5)])
@pytest.mark.parametrize("private_run", [True, False])
def test_kalman_equals_its_equations(kappa, gamma, private_run):
    plan = PrivacyPlan(0.0, 6, 6, 20, 1e-3)
    model = Bowl(1.0, -2.0, 0.5, 3.0)
    x = torch.tensor(np.random.default_rng(0).normal(size=(6, 4)))
    kalman = Kalman(model.parameters(), kappa, gamma)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    clip = Flat(0.7) if private_run else None
    private = PrivateGradient(model, flat_loss, plan, clip, query_points=kalman.query_points)
    theta, before, filtered, buffer = model.theta(), model.theta(), None, 0.0
    gamma = (1 - kappa) / kappa if gamma is None else gamma
    c = (1 - kappa) / (kappa * gamma) if kappa < 1 else 1.0
    for t in range(20):
        private.backward(batch_of(plan, x, torch.zeros(6), t))
        kalman.apply()
        optimizer.step()
        ahead = theta + gamma * (theta - before) * (kappa < 1)
        rows = c * (ahead - x.numpy()) + (1 - c) * (theta - x.numpy())
        g = (clipped_sum(rows, 0.7) if private_run else rows.sum(0)) / 6
        filtered = g if filtered is None else (1 - kappa) * filtered + kappa * g
        buffer = 0.5 * buffer + filtered
        before, theta = theta, theta - 0.3 * buffer
        np.testing.assert_allclose(model.theta(), theta, rtol=1e-8)


def test_kalman_leaves_parameters_and_resumes():
    model, plan = small_model(), make_plan(sigma=0.5)

    def train(model, kalman, optimizer, start, stop):
        private = PrivateGradient(
            model, F.cross_entropy, plan, Flat(1.0), start=start, query_points=kalman.query_points
        )
        for batch in dpopt.poisson_batches(small_data(), plan, start=start):
            if batch.step == stop:
                return
            before = [p.detach().clone() for p in model.parameters()]
            private.backward(batch)
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
            kalman.apply()
            optimizer.step()

    kalman, optimizer = Kalman(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, kalman, optimizer, 0, 4)
    other = small_model(seed=1)
    other.load_state_dict(model.state_dict())
    again = Kalman(other.parameters())
    again.load_state_dict(kalman.state_dict())
    train(model, kalman, optimizer, 4, 8)
    train(other, again, torch.optim.SGD(other.parameters(), lr=0.1), 4, 8)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="kappa=0"):
        Kalman(model.parameters(), kappa=0)
    with pytest.raises(ValueError, match="gamma=-1"):
        Kalman(model.parameters(), gamma=-1)


def test_points_are_one_release():
    """The sum of two gradients of one example is clipped as one: no example moves the sum by more than C."""
    plan = make_plan(sigma=0.0)
    weight = nn.Linear(3, 1, bias=False).double()
    points = lambda: [(2.0, {weight.weight: torch.ones(1, 3).double()}), (-1.0, None)]  # noqa: E731
    private = PrivateGradient(weight, lambda out, y: out.square().mean(), plan, Flat(0.1), query_points=points)
    private.backward(batch_of(plan, 100 * torch.randn(1, 3, dtype=torch.float64), torch.zeros(1)))
    assert float(weight.weight.grad.norm()) * plan.batch_size == pytest.approx(0.1)
