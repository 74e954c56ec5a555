"""DP-ZO: one slope per example and one noised number per step, against a literal loop; and a mistake."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Bowl, assert_caught, batch_of, flat_loss, make_plan, small_model
from torch import nn

from dpopt.privacy.clipping import Flat, PerLayer
from dpopt.privacy.plan import PrivacyPlan
from dpopt.privacy.sampling import PoissonBatch
from dpopt.privacy.zeroth_order import ZerothOrder


def test_zeroth_order_equals_its_equations():
    """On a bowl differences are exact: slope z·(θ − x); noise is one number per step, along z."""
    plan = PrivacyPlan(0.0, 6, 6, 5, 1e-3, key=make_plan().key)
    model = Bowl(1.0, -2.0, 0.5, 3.0)
    x = torch.tensor(np.random.default_rng(0).normal(size=(6, 4)))
    private = ZerothOrder(model, flat_loss, plan, Flat(0.7))
    for t in range(5):
        private.backward(batch_of(plan, x, torch.zeros(6), t))
        z = plan.key.normal(4, "direction", t).double().numpy()
        slopes = (model.theta() - x.numpy()) @ z
        expected = sum(np.sign(d) * min(abs(d), 0.7) for d in slopes) / 6 * z
        np.testing.assert_allclose(model.grad(), expected, rtol=1e-6)


def check_zeroth_order_noise():
    plan = make_plan(sigma=1.3, steps=400)
    model = Bowl(1.0, -2.0, 0.5, 3.0)
    private = ZerothOrder(model, flat_loss, plan, Flat(0.5))
    heights = []
    for t in range(400):
        batch = PoissonBatch(
            plan, t, torch.zeros(0), iter([(torch.zeros(1, 1, 4).double(), torch.zeros(1), torch.zeros(1).bool())])
        )
        private.backward(batch)
        z = plan.key.normal(4, "direction", t).double().numpy()
        heights.append(model.grad() @ z / (z @ z) * plan.batch_size)
    assert np.std(heights) == pytest.approx(1.3 * 0.5, rel=0.15)


def slope_noise_over_the_smoothing(patch):
    patch.setattr(ZerothOrder, "_std", lambda self, sensitivity: self.plan.noise_multiplier * self.smoothing)


def test_zeroth_order_noise(monkeypatch):
    check_zeroth_order_noise()
    assert_caught(check_zeroth_order_noise, slope_noise_over_the_smoothing, monkeypatch)


@pytest.mark.parametrize("engine", ["auto", "vmap"])
def test_one_example_moves_one_slope(engine):
    """Even in a model that mixes examples: one more of them moves the release by at most C."""

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.head = nn.Parameter(torch.tensor(1.0)), nn.Linear(5, 3)

        def forward(self, x):
            return self.gain * self.head(x - x.mean(0))

    torch.manual_seed(0)
    model, plan = Mixing().double(), make_plan(sigma=0.0)
    inputs, targets = 5 * torch.randn(16, 2, 5, dtype=torch.float64), torch.arange(16) % 3
    z = plan.key.normal(sum(p.numel() for p in model.parameters()), "direction", 0).double()
    released = []
    for count in (15, 16):
        private = ZerothOrder(model, F.cross_entropy, plan, Flat(0.01), engine=engine)
        mask = torch.arange(16) < count
        private.backward(PoissonBatch(plan, 0, torch.arange(count), iter([(inputs, targets, mask)])))
        grad = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert model.gain.grad.shape == ()
        released.append(float(grad @ z / (z @ z)) * plan.batch_size)
    assert 0 < abs(released[1] - released[0]) <= 0.01 * (1 + 1e-6)


def test_zeroth_order_refuses_what_it_has_not():
    model, plan = small_model(), make_plan()
    for options in (dict(pre_clip_scale=lambda p: None), dict(query_points=lambda: [(1.0, None)])):
        with pytest.raises(ValueError, match="one number per example"):
            ZerothOrder(model, F.cross_entropy, plan, Flat(1.0), **options)
    with pytest.raises(ValueError, match="one number per example"):
        ZerothOrder(model, F.cross_entropy, plan, PerLayer(1.0))
    with pytest.raises(ValueError, match="smoothing=0"):
        ZerothOrder(model, F.cross_entropy, plan, Flat(1.0), smoothing=0)
