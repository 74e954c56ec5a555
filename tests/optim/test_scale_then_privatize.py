"""Scale-then-privatize: gradients are scaled before the clip and after the noise, by whatever engine; the mistakes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Bowl, Half, assert_caught, batch_of, clipped_sum, flat_loss, make_plan, small_data, small_model
from torch import nn

import dpopt
from dpopt.grad_sample.engine import POLICIES
from dpopt.privacy.bounded import join_scales
from dpopt.privacy.clipping import Flat
from dpopt.privacy.plan import PrivacyPlan
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.privacy.sampling import PoissonBatch


def scaled(plan, c, k, steps=1):
    """p.grad·qN of each step, clipped at c under a scale of k = (k₁, …, k₄)."""
    k = torch.tensor(k, dtype=torch.float64)

    def scale(p):
        return k[:2] if p is model.first.theta else k[2:]

    model = Bowl(1.0, -2.0, 0.5, 3.0)
    x = torch.tensor(np.random.default_rng(0).normal(size=(6, 4)))
    private = PrivateGradient(model, flat_loss, plan, Flat(c), pre_clip_scale=scale)
    out = []
    for step in range(steps):
        private.backward(batch_of(plan, x, torch.zeros(6), step))
        out.append(model.grad() * plan.batch_size)
    return np.array(out), np.array([1.0, -2.0, 0.5, 3.0]) - x.numpy()


def check_scaling():
    """Before the clip and undone after it; the noise is undone with it; a constant scale is one of the clip."""
    plan, k = make_plan(sigma=0.0), [0.5, 2.0, 10.0, 1.0]
    found, gradients = scaled(plan, 0.7, k)
    np.testing.assert_allclose(found[0], clipped_sum(gradients * k, 0.7) / k, rtol=1e-9)
    for sigma in (0.0, 1.0):
        plain, _ = scaled(make_plan(sigma=sigma), 0.7, [1.0] * 4)
        constant, _ = scaled(make_plan(sigma=sigma), 0.7 * 8, [8.0] * 4)
        np.testing.assert_allclose(constant, plain, rtol=1e-9)
    noisy, _ = scaled(make_plan(sigma=1.0, steps=300), 0.7, k, steps=300)
    np.testing.assert_allclose(noisy.std(0) * k, 0.7, rtol=0.2)


def scale_that_is_only_undone(patch):
    """What public code does: gradients are clipped as they are, and the result is divided by the scale."""
    real = join_scales

    def update_param_groups(self, batch, fill=PrivateGradient._fill):
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        flat = torch.cat([p.detach().flatten() for p in parameters.values()])
        scale = real(self.pre_clip_scale, parameters, flat)
        offered, self.pre_clip_scale = self.pre_clip_scale, None
        fill(self, batch)
        self.pre_clip_scale = offered
        parts = scale.split([p.numel() for p in self.model.parameters()])
        for p, part in zip(self.model.parameters(), parts, strict=True):
            p.grad.div_(part.view(p.shape))

    patch.setattr(PrivateGradient, "_fill", update_param_groups)


def scale_that_is_not_undone(patch):
    real = torch.Tensor.div_
    patch.setattr(torch.Tensor, "div_", lambda self, by: self if isinstance(by, torch.Tensor) else real(self, by))


def noise_that_is_not_scaled(patch):
    patch.setattr(PrivateGradient, "_std", lambda self, sensitivity: 0.1)


def test_scaling():
    check_scaling()


@pytest.mark.parametrize("mutant", [scale_that_is_only_undone, scale_that_is_not_undone, noise_that_is_not_scaled])
def test_scaling_mistakes_are_noticed(mutant, monkeypatch):
    assert_caught(check_scaling, mutant, monkeypatch)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_norms_of_scaled_gradients_under_every_policy(policy, views):
    """Layers whose norms have a closed form are scaled, too, and one with another closed form for one view."""
    torch.manual_seed(0)
    model = nn.Sequential(
        dpopt.models.layers.StandardizedConv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3)
    ).double()
    inputs, targets = torch.randn(5, views, 2, 4, 4, dtype=torch.float64), torch.arange(5) % 3
    scales = {p: torch.rand_like(p) + 0.1 for p in model.parameters()}
    plan = make_plan(sigma=0.0)
    private = PrivateGradient(model, F.cross_entropy, plan, Flat(0.3), engine=policy, pre_clip_scale=scales.get)
    private.backward(PoissonBatch(plan, 0, torch.arange(5), iter([(inputs, targets, torch.ones(5).bool())])))
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in zip(inputs, targets, strict=True):
        found = torch.autograd.grad(F.cross_entropy(model(x), y.expand(views)), list(model.parameters()))
        norm = torch.stack([(g * scales[p]).norm() for g, p in zip(found, model.parameters(), strict=True)]).norm()
        for e, g in zip(expected, found, strict=True):
            e += g * min(1.0, 0.3 / norm)
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad * plan.batch_size, e, rtol=1e-8, atol=1e-11)


def test_scale_then_privatize_by_hand():
    """θ = (0, 0), one example x = (−3, −4), C = 1, β₂ = .75, ε_s = .1, lr = 1, ε = 0, two steps without noise.

    Step 1: s = 1, g = (3, 4)/5 = (.6, .8), and Adam moves by lr in each coordinate: θ = (−1, −1). v = .25·(.36, .64),
    √v = (.3, .4), s = (1/.4, 1/.5) = (2.5, 2). Step 2: the gradient is (2, 3), scaled (5, 6), clipped by √61, undone:
    (2, 3)/√61.
    """
    plan = PrivacyPlan(0.0, 1, 1, 2, 1e-3)
    model = Half((0.0, 0.0))
    optimizer = dpopt.optim.AdamSTP(model.parameters(), lr=1.0, betas=(0.9, 0.75), eps=0.0, eps_scale=0.1)
    private = PrivateGradient(model, flat_loss, plan, Flat(1.0), pre_clip_scale=optimizer.pre_clip_scale)
    x = torch.tensor([[-3.0, -4.0]], dtype=torch.float64)
    assert optimizer.pre_clip_scale(model.theta) is None
    private.backward(batch_of(plan, x, torch.zeros(1)))
    assert model.theta.grad.tolist() == pytest.approx([0.6, 0.8])
    with pytest.raises(ValueError, match="not scaled before the clip"):
        optimizer.step()
    private.update_param_groups(optimizer)
    optimizer.step()
    assert optimizer.pre_clip_scale(model.theta).tolist() == pytest.approx([2.5, 2.0])
    private.backward(batch_of(plan, x, torch.zeros(1), 1))
    assert model.theta.grad.tolist() == pytest.approx([2 / math.sqrt(61), 3 / math.sqrt(61)])


@pytest.mark.parametrize("kind", ["adam", "micro_adam"])
def test_scale_then_privatize_equals_its_equations(kind):
    """20 steps on a bowl: the scale from the raw second moment of what was privatized before."""
    plan = PrivacyPlan(0.0, 6, 6, 20, 1e-3)
    model = Bowl(1.0, -2.0, 0.5, 3.0)
    x = torch.tensor(np.random.default_rng(0).normal(size=(6, 4)))
    if kind == "adam":
        optimizer = dpopt.optim.AdamSTP(model.parameters(), lr=0.1, eps_scale=0.01, eps_root=1e-6)
    else:
        options = dict(window=3, density=0.5, bits=32, scope="tensor", dense_size=0)
        optimizer = dpopt.optim.MicroAdamSTP(model.parameters(), lr=0.1, eps_scale=0.01, eps_root=1e-6, **options)
    private = PrivateGradient(model, flat_loss, plan, Flat(0.7), pre_clip_scale=optimizer.pre_clip_scale)
    theta, m, v, s, e, rows = model.theta(), np.zeros(4), np.zeros(4), np.ones(4), np.zeros(4), []
    for t in range(1, 21):
        private.backward(batch_of(plan, x, torch.zeros(6), t - 1))
        private.update_param_groups(optimizer)
        optimizer.step()
        g = clipped_sum((theta - x.numpy()) * s, 0.7) / s / 6
        if kind == "adam":
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        else:
            a, kept = g + e, np.zeros(4)
            for half in (slice(0, 2), slice(2, 4)):  # each tensor of two keeps its larger
                i = half.start + int(np.argmax(np.abs(a[half])))
                kept[i] = a[i]
            e, rows = a - kept, [kept, *rows][:3]
            m = 0.1 * sum(0.9**age * row for age, row in enumerate(rows))
            v = 0.001 * sum(0.999**age * row**2 for age, row in enumerate(rows))
        theta = theta - 0.1 * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        s = 1 / (np.sqrt(v + 1e-6) + 0.01)
        np.testing.assert_allclose(model.theta(), theta, rtol=1e-8)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_must_be_positive(bad):
    model = small_model()
    plan = make_plan()
    private = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0), pre_clip_scale=lambda p: torch.full_like(p, bad))
    with pytest.raises(ValueError, match=r"scale of 0\.weight must"):
        private.backward(next(iter(dpopt.poisson_batches(small_data(), plan))))
