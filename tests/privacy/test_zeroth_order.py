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


@pytest.mark.slow
def test_zeroth_order_noise(monkeypatch):
    check_zeroth_order_noise()
    assert_caught(check_zeroth_order_noise, slope_noise_over_the_smoothing, monkeypatch)


@pytest.mark.parametrize("engine", ["auto", "vmap"])
def test_a_model_that_mixes_examples_is_refused(engine):
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return self.head(x - x.mean(0))

    inputs, targets = 5 * torch.randn(16, 5, dtype=torch.float64), torch.arange(16) % 3
    plan = make_plan(sigma=0.0)
    private = ZerothOrder(Mixing().double(), F.cross_entropy, plan, Flat(0.01), engine=engine)
    with pytest.raises(ValueError, match=r"the model \(Mixing\) mixes the examples of a batch"):
        private.backward(batch_of(plan, inputs, targets))


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(x) * torch.where(x.sum(1, keepdim=True) > 0, 1.0, 2.0)


class ByBranch(Product):
    """The same function, of branches that depend on the data, which vmap cannot follow."""

    def forward(self, x):
        return torch.stack([self.head(row) if row.sum() > 0 else 2 * self.head(row) for row in x])


def test_a_loop_takes_the_losses_that_vmap_cannot():
    inputs, targets = 5 * torch.randn(16, 5, dtype=torch.float64), torch.arange(16) % 3
    plan = make_plan(sigma=0.0)

    def gradient(model, engine):
        private = ZerothOrder(model.double(), F.cross_entropy, plan, Flat(1.0), engine=engine)
        private.backward(batch_of(plan, inputs, targets))
        return model.head.weight.grad

    torch.testing.assert_close(gradient(ByBranch(), "loop"), gradient(Product(), "vmap"))
    with pytest.raises(ValueError, match=r"ByBranch.*engine=loop"):
        gradient(ByBranch(), "vmap")


def test_zeroth_order_refuses_what_it_has_not():
    model, plan = small_model(), make_plan()
    for options in (dict(pre_clip_scale=lambda p: None), dict(query_points=lambda: [(1.0, None)])):
        with pytest.raises(ValueError, match="one number per example"):
            ZerothOrder(model, F.cross_entropy, plan, Flat(1.0), **options)
    with pytest.raises(ValueError, match="one number per example"):
        ZerothOrder(model, F.cross_entropy, plan, PerLayer(1.0))
    with pytest.raises(ValueError, match="smoothing=0"):
        ZerothOrder(model, F.cross_entropy, plan, Flat(1.0), smoothing=0)
