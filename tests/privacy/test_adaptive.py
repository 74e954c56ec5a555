"""Adaptive clipping: the count it releases is paid for, followed, and seen by the schedule; and the mistakes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Bowl, assert_caught, batch_of, bowl, clipped_sum, flat_loss, make_plan, released_noise, small_model
from torch import nn

import dpopt
from dpopt.privacy.accounting import compute_epsilon
from dpopt.privacy.clipping import Adaptive, Flat, Slack
from dpopt.privacy.plan import PrivacyPlan
from dpopt.privacy.private_gradient import PrivateGradient


def check_the_count_is_paid_for():
    """From what is released: noise of gradients over C, and of the count over ½, cost together what the plan says."""
    plan = PrivacyPlan(2.0, 6400, 32, 600, 1e-4, "rdp", count_noise=1.6, key=make_plan().key)
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

    def observe(self, raw, slack):
        key, self.plan = self.plan, type("Silent", (), {**vars(self.plan), "count_noise": 0.0})()
        self.plan.noise_multiplier = key.noise_multiplier
        real(self, raw, slack)
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
    _, x, _, _ = bowl(plan, clip, 400, after=lambda private: trace.append(dict(private.step_info)))
    norms = np.linalg.norm(np.array([1.0, -2.0, 0.5, 3.0]) - x, axis=1)
    c = 0.1
    for step_info in trace:
        assert step_info["clip_norm"] == pytest.approx(c, rel=1e-9)
        fraction = np.mean(norms <= c)
        assert step_info["clip_rate"] == pytest.approx(1 - fraction, abs=1e-9)
        c *= math.exp(-0.2 * (fraction - 0.5))
    assert np.sort(norms)[2] * 0.8 < c < np.sort(norms)[3] * 1.25


def test_slack_tells_the_distribution_of_norms():
    """Without noise: shares against a literal loop, and C in the end a little above the quantile of the norms."""
    plan = PrivacyPlan(0.0, 6, 6, 400, 1e-3)
    clip = Slack(0.1, quantile=0.5, lr=0.2, coordinates=4)
    trace = []
    _, x, _, _ = bowl(plan, clip, 400, after=lambda private: trace.append((dict(private.step_info), clip.shares)))
    norms = np.linalg.norm(np.array([1.0, -2.0, 0.5, 3.0]) - x, axis=1)
    c = 0.1
    for step_info, shares in trace:
        assert step_info["clip_norm"] == pytest.approx(c, rel=1e-6)
        expected = [np.mean(np.clip(4 * (1 - norms / c) - j, 0, 1)) for j in range(4)]
        np.testing.assert_allclose(shares, expected, atol=1e-6)
        assert step_info["clip_rate"] == pytest.approx(1 - expected[0], abs=1e-6)
        c *= math.exp(-0.2 * (expected[0] - 0.5))
    assert np.sort(norms)[2] < c < np.sort(norms)[3] * 4 / 3 * 1.1


def test_slack_costs_nothing_and_is_not_changed():
    """Its plan has no count, its noise is the plan's, and a subclass that could fill otherwise is refused."""
    plan = make_plan()
    noise = released_noise(plan, Slack(0.5, lr=1e-9))
    assert float(noise.std()) == pytest.approx(0.5 * plan.noise_multiplier, rel=0.01)
    with pytest.raises(ValueError, match=r"count_noise=0$"):
        paid = PrivacyPlan(1.0, 64, 16, 20, 1e-3, count_noise=0.8)
        PrivateGradient(small_model(), F.cross_entropy, paid, Slack(1.0))
    changed = Slack(1.0)
    changed.fill = lambda norm, present: torch.full((16,), 100.0)
    for clip in (type("Mine", (Slack,), {})(1.0), changed):
        with pytest.raises(ValueError, match=r"changes dpopt\.clipping\.Slack"):
            PrivateGradient(small_model(), F.cross_entropy, plan, clip)
    with pytest.raises(ValueError, match="coordinates=0"):
        Slack(1.0, coordinates=0)


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
        private.update_param_groups(optimizer)
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
