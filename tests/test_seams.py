"""What reaches left of `p.grad`: layers, counts, scale, points and slopes, against literal loops; and the mistakes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_caught, flat_loss, make_plan, released_noise, small_data, small_model
from torch import nn

import dpopt
from dpopt.filters import Kalman
from dpopt.plan import PrivacyPlan
from dpopt.privacy.accounting import compute_epsilon
from dpopt.privacy.clipping import PSAC, PSASC, Adaptive, Flat, PerLayer
from dpopt.privacy.engine import POLICIES
from dpopt.privacy.gradients import PrivateGradient
from dpopt.privacy.sampling import PoissonBatch
from dpopt.privacy.zeroth_order import ZerothOrder


def batch_of(plan, inputs, targets, step=0):
    mask = torch.ones(len(inputs), dtype=torch.bool)
    return PoissonBatch(plan, step, torch.arange(len(inputs)), iter([(inputs[:, None], targets, mask)]))


class Bowl(nn.Module):
    """Example x has the loss ½‖θ − x‖², hence the gradient θ − x; two layers of it."""

    def __init__(self, *start):
        super().__init__()
        self.first = Half(start[: len(start) // 2])
        self.second = Half(start[len(start) // 2 :])

    def forward(self, x):
        left, right = x.tensor_split(2, dim=1)
        return self.first(left) + self.second(right)

    def theta(self):
        return np.concatenate([self.first.theta.detach().numpy(), self.second.theta.detach().numpy()])

    def grad(self):
        return np.concatenate([self.first.theta.grad.numpy(), self.second.theta.grad.numpy()])


class Half(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, x):
        return 0.5 * (self.theta - x).square().sum(1, keepdim=True)


def bowl(plan, clip, steps, after=lambda private: None, **seams):
    """Train a bowl on fixed full batches; returns it, the data and p.grad·qN of every step."""
    model = Bowl(1.0, -2.0, 0.5, 3.0)
    x = torch.tensor(np.random.default_rng(0).normal(size=(6, 4)))
    private = PrivateGradient(model, flat_loss, plan, clip, **seams(model) if callable(seams) else seams)
    seen = []
    for step in range(steps):
        private.backward(batch_of(plan, x, torch.zeros(6), step))
        after(private)
        seen.append(model.grad() * plan.batch_size)
    return model, x.numpy(), seen, private


def clipped_sum(gradients, c):
    return sum(g * min(1.0, c / np.linalg.norm(g)) for g in gradients)


# Layers


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_layers_are_clipped_one_by_one(policy, views):
    """Against a loop; bare parameters, tied ones and modules under vmap belong to the module that holds them."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.gain = nn.Parameter(torch.randn(1, 5)), nn.Parameter(torch.randn(5))
            self.first, self.second, self.twin = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
            self.twin.weight = self.second.weight
            self.block = nn.TransformerEncoderLayer(5, 1, 7, dropout=0.0, batch_first=True)
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            x = self.gain * torch.tanh(self.first(x) + self.token)
            return self.head(self.block((self.twin(torch.tanh(self.second(x))))[:, None])[:, 0])

    torch.manual_seed(0)
    model = Model().double()
    inputs, targets = torch.randn(4, views, 5, dtype=torch.float64), torch.arange(4) % 3
    names = [name for name, _ in model.named_parameters()]
    layers = sorted({name.rpartition(".")[0] for name in names})
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in zip(inputs, targets, strict=True):
        found = torch.autograd.grad(F.cross_entropy(model(x), y.expand(views)), list(model.parameters()))
        for layer in layers:
            part = {n: g for n, g in zip(names, found, strict=True) if n.rpartition(".")[0] == layer}
            norm = torch.stack([g.norm() for g in part.values()]).norm()
            for n, g in part.items():
                expected[n] += g * min(1.0, 0.1 / math.sqrt(len(layers)) / norm)
    plan = make_plan(sigma=0.0)
    private = PrivateGradient(model, F.cross_entropy, plan, PerLayer(0.1), engine=policy)
    private.backward(PoissonBatch(plan, 0, torch.arange(4), iter([(inputs, targets, torch.ones(4).bool())])))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad * plan.batch_size, expected[name], rtol=1e-8, atol=1e-10, msg=name)


# Counts


def check_the_count_is_paid_for():
    """From what is released: noise of gradients over C, and of the count over ½, cost together what the plan says."""
    plan = PrivacyPlan(2.0, 6400, 32, 600, 1e-3, "rdp", count_noise=1.6, key=make_plan().key)
    gradients = released_noise(plan, Adaptive(0.5, lr=1e-9))
    moves, clip = [], Adaptive(1.0)
    clip.observe = lambda count, batch_size: moves.append(count)
    model = nn.Linear(1, 1)
    private = PrivateGradient(model, flat_loss, plan, clip)
    for step in range(600):
        private.backward(batch_of(plan, torch.zeros(1, 1), torch.zeros(1), step))
    noise, count = float(gradients.std()) / 0.5, float(np.std(moves)) / 0.5 + 1e-2
    together = (noise**-2 + count**-2) ** -0.5
    spent = compute_epsilon(together, plan.sample_rate, plan.steps, plan.delta, "rdp")
    assert spent == pytest.approx(plan.epsilon, rel=0.08)
    assert noise == pytest.approx(plan.gradient_noise_multiplier, rel=0.02) and noise > 2.2


def count_forgotten(patch):
    patch.setattr(PrivacyPlan, "gradient_noise_multiplier", property(lambda self: self.noise_multiplier))


def count_without_noise(patch):
    real = PrivateGradient._observe

    def observe(self, raw):
        key, self.plan = self.plan, type("Silent", (), {**vars(self.plan), "count_noise": 0.0})()
        self.plan.noise_multiplier = key.noise_multiplier
        real(self, raw)
        self.plan = key

    patch.setattr(PrivateGradient, "_observe", observe)


def test_the_count_is_in_epsilon():
    check_the_count_is_paid_for()


@pytest.mark.parametrize("mutant", [count_forgotten, count_without_noise])
def test_a_count_that_is_not_paid_for_is_noticed(mutant, monkeypatch):
    assert_caught(check_the_count_is_paid_for, mutant, monkeypatch)


def test_an_adaptive_clip_follows_its_quantile():
    """Without noise: C against a literal loop, and in the end at the quantile of the norms."""
    plan = PrivacyPlan(0.0, 6, 6, 400, 1e-3, count_noise=0.3)
    clip = Adaptive(0.1, quantile=0.5, lr=0.2)
    trace = []
    _, x, _, _ = bowl(plan, clip, 400, after=lambda private: trace.append(dict(private.facts)))
    norms = np.linalg.norm(np.array([1.0, -2.0, 0.5, 3.0]) - x, axis=1)
    c = 0.1
    for facts in trace:
        assert facts["clip_norm"] == pytest.approx(c, rel=1e-9)
        fraction = np.mean(norms <= c)
        assert facts["clip_rate"] == pytest.approx(1 - fraction, abs=1e-9)
        c *= math.exp(-0.2 * (fraction - 0.5))
    assert np.sort(norms)[2] * 0.8 < c < np.sort(norms)[3] * 1.25


def test_counts_and_plans_belong_together():
    plan = make_plan()
    with pytest.raises(ValueError, match=r"count_noise=0\.8"):
        PrivateGradient(small_model(), F.cross_entropy, plan, Adaptive(1.0))
    paid = PrivacyPlan(1.0, 64, 16, 20, 1e-3, count_noise=0.8)
    with pytest.raises(ValueError, match=r"count_noise=0$"):
        PrivateGradient(small_model(), F.cross_entropy, paid, Flat(1.0))
    with pytest.raises(ValueError, match=r"count_noise=0\.4 must be above half"):
        PrivacyPlan(1.0, 64, 16, 20, 1e-3, count_noise=0.4)
    with pytest.raises(ValueError, match=r"count_noise=5\.0 of the clip rule is 0\.8 in the plan"):
        PrivateGradient(small_model(), F.cross_entropy, paid, Adaptive(1.0, count_noise=5.0))
    for bad in (dict(clip_norm=0), dict(quantile=1), dict(lr=-1), dict(bounds=(2.0, 3.0)), dict(count_noise=0.0)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Adaptive(**{"clip_norm": 1.0, **bad})


def test_the_learning_rate_follows_the_clip_rate():
    """DP-Adam-AC without noise: clip norm, learning rate and Adam against a literal loop."""
    plan = PrivacyPlan(0.0, 6, 6, 30, 1e-3, count_noise=0.3)
    model = Bowl(1.0, -2.0, 0.5, 3.0)
    x = torch.tensor(np.random.default_rng(0).normal(size=(6, 4)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    schedule = dpopt.schedules.ClipRate(optimizer, target=0.2, rate=0.5, bounds=(0.5, 2.0))
    private = PrivateGradient(model, flat_loss, plan, Adaptive(1.0, quantile=0.8))
    theta, m, v, c, lr = model.theta(), np.zeros(4), np.zeros(4), 1.0, 0.1
    for t in range(1, 31):
        private.backward(batch_of(plan, x, torch.zeros(6), t - 1))
        private.inform(optimizer)
        optimizer.step()
        schedule.step()
        gradients = theta - x.numpy()
        g, fraction = clipped_sum(gradients, c) / 6, np.mean(np.linalg.norm(gradients, axis=1) <= c)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        theta = theta - lr * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        c *= math.exp(-0.2 * (fraction - 0.8))
        lr = min(max(lr * math.exp(0.5 * (0.2 - (1 - fraction))), 0.05), 0.2)
        np.testing.assert_allclose(model.theta(), theta, rtol=1e-8)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)


def test_a_clip_rate_that_is_not_there_moves_nothing():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    schedule = dpopt.schedules.ClipRate(optimizer)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.1
    with pytest.raises(ValueError, match="target=2"):
        dpopt.schedules.ClipRate(optimizer, target=2)


# Scale


def scaled(plan, c, k, steps=1):
    """p.grad·qN of each step, clipped at c under a scale of k = (k₁, …, k₄)."""
    k = torch.tensor(k, dtype=torch.float64)

    def scale(p):
        return k[:2] if p is model.first.theta else k[2:]

    model = Bowl(1.0, -2.0, 0.5, 3.0)
    x = torch.tensor(np.random.default_rng(0).normal(size=(6, 4)))
    private = PrivateGradient(model, flat_loss, plan, Flat(c), scale=scale)
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
    real = PrivateGradient._scale

    def forgetful(self, parameters, total):
        scale = real(self, parameters, total)
        self._divide = scale
        return None

    def inform(self, batch, fill=PrivateGradient._fill):
        fill(self, batch)
        parts = self._divide.split([p.numel() for p in self.model.parameters()])
        for p, part in zip(self.model.parameters(), parts, strict=True):
            p.grad.div_(part.view(p.shape))

    patch.setattr(PrivateGradient, "_scale", forgetful)
    patch.setattr(PrivateGradient, "_fill", inform)


def scale_that_is_not_undone(patch):
    real = torch.Tensor.div_
    patch.setattr(torch.Tensor, "div_", lambda self, by: self if isinstance(by, torch.Tensor) else real(self, by))


def noise_that_is_not_scaled(patch):
    patch.setattr(PrivateGradient, "_std", property(lambda self: 0.1))


def test_scaling():
    check_scaling()


@pytest.mark.parametrize("mutant", [scale_that_is_only_undone, scale_that_is_not_undone, noise_that_is_not_scaled])
def test_scaling_mistakes_are_noticed(mutant, monkeypatch):
    assert_caught(check_scaling, mutant, monkeypatch)


@pytest.mark.parametrize("policy", POLICIES)
def test_norms_of_scaled_gradients_under_every_policy(policy):
    """Layers whose norms have a closed form are scaled, too."""
    torch.manual_seed(0)
    model = nn.Sequential(
        dpopt.models.layers.StandardizedConv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3)
    ).double()
    inputs, targets = torch.randn(5, 2, 2, 4, 4, dtype=torch.float64), torch.arange(5) % 3
    scales = {p: torch.rand_like(p) + 0.1 for p in model.parameters()}
    plan = make_plan(sigma=0.0)
    private = PrivateGradient(model, F.cross_entropy, plan, Flat(0.3), engine=policy, scale=scales.get)
    private.backward(PoissonBatch(plan, 0, torch.arange(5), iter([(inputs, targets, torch.ones(5).bool())])))
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in zip(inputs, targets, strict=True):
        found = torch.autograd.grad(F.cross_entropy(model(x), y.expand(2)), list(model.parameters()))
        norm = torch.stack([(g * scales[p]).norm() for g, p in zip(found, model.parameters(), strict=True)]).norm()
        for e, g in zip(expected, found, strict=True):
            e += g * min(1.0, 0.3 / norm)
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad * plan.batch_size, e, rtol=1e-8, atol=1e-11)


def test_scale_then_privatise_by_hand():
    """θ = (0, 0), one example x = (−3, −4), C = 1, β₂ = .75, ε_s = .1, lr = 1, ε = 0, two steps without noise.

    Step 1: s = 1, g = (3, 4)/5 = (.6, .8), and Adam moves by lr in each coordinate: θ = (−1, −1). v = .25·(.36, .64),
    √v = (.3, .4), s = (1/.4, 1/.5) = (2.5, 2). Step 2: the gradient is (2, 3), scaled (5, 6), clipped by √61, undone:
    (2, 3)/√61.
    """
    plan = PrivacyPlan(0.0, 1, 1, 2, 1e-3)
    model = Half((0.0, 0.0))
    optimizer = dpopt.optim.AdamSTP(model.parameters(), lr=1.0, betas=(0.9, 0.75), eps=0.0, eps_scale=0.1)
    private = PrivateGradient(model, flat_loss, plan, Flat(1.0), scale=optimizer.scale)
    x = torch.tensor([[-3.0, -4.0]], dtype=torch.float64)
    assert optimizer.scale(model.theta) is None
    private.backward(batch_of(plan, x, torch.zeros(1)))
    assert model.theta.grad.tolist() == pytest.approx([0.6, 0.8])
    optimizer.step()
    assert optimizer.scale(model.theta).tolist() == pytest.approx([2.5, 2.0])
    private.backward(batch_of(plan, x, torch.zeros(1), 1))
    assert model.theta.grad.tolist() == pytest.approx([2 / math.sqrt(61), 3 / math.sqrt(61)])


@pytest.mark.parametrize("kind", ["adam", "micro_adam"])
def test_scale_then_privatise_equals_its_equations(kind):
    """20 steps on a bowl: the scale from the raw second moment of what was privatised before."""
    plan = PrivacyPlan(0.0, 6, 6, 20, 1e-3)
    model = Bowl(1.0, -2.0, 0.5, 3.0)
    x = torch.tensor(np.random.default_rng(0).normal(size=(6, 4)))
    if kind == "adam":
        optimizer = dpopt.optim.AdamSTP(model.parameters(), lr=0.1, eps_scale=0.01, eps_root=1e-6)
    else:
        options = dict(window=3, density=0.5, bits=32, scope="tensor", dense_size=0)
        optimizer = dpopt.optim.MicroAdamSTP(model.parameters(), lr=0.1, eps_scale=0.01, eps_root=1e-6, **options)
    private = PrivateGradient(model, flat_loss, plan, Flat(0.7), scale=optimizer.scale)
    theta, m, v, s, e, rows = model.theta(), np.zeros(4), np.zeros(4), np.ones(4), np.zeros(4), []
    for t in range(1, 21):
        private.backward(batch_of(plan, x, torch.zeros(6), t - 1))
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
    private = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0), scale=lambda p: torch.full_like(p, bad))
    with pytest.raises(ValueError, match=r"scale of 0\.weight must"):
        private.backward(next(iter(dpopt.poisson_batches(small_data(), plan))))


# Points


@pytest.mark.parametrize("kappa, gamma", [(0.7, 0.5), (0.7, None), (0.5, 1.0), (1.0, 0.5)])
@pytest.mark.parametrize("private_run", [True, False])
def test_kalman_equals_its_equations(kappa, gamma, private_run):
    plan = PrivacyPlan(0.0, 6, 6, 20, 1e-3)
    model = Bowl(1.0, -2.0, 0.5, 3.0)
    x = torch.tensor(np.random.default_rng(0).normal(size=(6, 4)))
    kalman = Kalman(model.parameters(), kappa, gamma)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    clip = Flat(0.7) if private_run else None
    private = PrivateGradient(model, flat_loss, plan, clip, points=kalman.points)
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
        private = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0), start=start, points=kalman.points)
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
    private = PrivateGradient(weight, lambda out, y: out.square().mean(), plan, Flat(0.1), points=points)
    private.backward(batch_of(plan, 100 * torch.randn(1, 3, dtype=torch.float64), torch.zeros(1)))
    assert float(weight.weight.grad.norm()) * plan.batch_size == pytest.approx(0.1)


# Slopes


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
    patch.setattr(ZerothOrder, "_std", property(lambda self: self.plan.noise_multiplier * self.smoothing))


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
    for options in (dict(scale=lambda p: None), dict(points=lambda: [(1.0, None)])):
        with pytest.raises(ValueError, match="one number per example"):
            ZerothOrder(model, F.cross_entropy, plan, Flat(1.0), **options)
    with pytest.raises(ValueError, match="one number per example"):
        ZerothOrder(model, F.cross_entropy, plan, PerLayer(1.0))
    with pytest.raises(ValueError, match="smoothing=0"):
        ZerothOrder(model, F.cross_entropy, plan, Flat(1.0), smoothing=0)


# Combinations


def test_noise_that_is_not_the_same_everywhere_is_not_subtracted():
    model, plan = small_model(), make_plan()
    optimizer = dpopt.optim.AdamBC(model.parameters())
    kalman = Kalman(model.parameters())
    for private in (
        PrivateGradient(model, F.cross_entropy, plan, Flat(1.0), points=kalman.points),
        PrivateGradient(model, F.cross_entropy, plan, Flat(1.0), scale=lambda p: None),
        ZerothOrder(model, F.cross_entropy, plan, Flat(1.0)),
    ):
        with pytest.raises(ValueError, match="AdamBC corrects for noise"):
            private.inform(optimizer)


def test_psasc_is_psac_with_other_constants():
    """PSASC(C, s, r) weighs as (C/s)/(‖g‖ + (r/s)/(‖g‖ + r)) does."""
    norm = torch.logspace(-4, 4, 50, dtype=torch.float64)
    by_hand = (0.7 / 0.4) / (norm + (0.1 / 0.4) / (norm + 0.1))
    torch.testing.assert_close(PSASC(0.7, s=0.4, r=0.1).weight(norm), by_hand)
    torch.testing.assert_close(PSASC(0.7, s=1.0, r=0.1).weight(norm), PSAC(0.7, r=0.1).weight(norm))
