"""MADA's coefficients: against a NumPy transcription with derivatives by hand, and what they have to do."""

import numpy as np
import pytest
import torch
from torch import nn

import dpopt

START = dict(betas=(0.8, 0.95, 0.3), c=0.6, rho=0.4)
HYPER = 0.5


class Past:
    """What a tensor remembers: m̄, n, ṽ, its mean, v and the last gradient."""

    def __init__(self, g):
        self.m, self.n, self.v, self.mean, self.square = (np.zeros_like(g) for _ in range(5))
        self.last, self.t, self.w1, self.w2 = g, 0, 0.0, 0.0


def literal(past, g, q, eps=1e-8):
    """One step of the equations: u, and ∂u/∂q for q = (β₁, β₂, β₃, c, ρ) with the past held constant."""
    b1, b2, b3, c, rho = q
    past.t += 1
    t, d = past.t, g - past.last
    m, n, ahead = b1 * past.m + (1 - b1) * g, b3 * past.n + (1 - b3) * d, g + b3 * d
    sign = np.sign(ahead**2 - past.square)
    yogi = past.square + ahead**2 * sign
    new = c * ahead**2 + (1 - c) * yogi
    v = b2 * past.v + (1 - b2) * new
    mean = past.mean + (v - past.mean) / t
    square = rho * v + (1 - rho) * mean
    scale1, scale2 = b1 * past.w1 + 1 - b1, b2 * past.w2 + 1 - b2
    top, root = m / scale1 + b3 * n, np.sqrt(square / scale2)
    bottom = root + eps
    per_v = (rho + (1 - rho) / t) / scale2  # ∂(v/(1 − β₂ᵗ))/∂ṽ
    tops = [
        (past.m - g) / scale1 - m * (past.w1 - 1) / scale1**2,
        0,
        n + b3 * (past.n - d),
        0,
        0,
    ]
    squares = [
        0,
        per_v * (past.v - new) - square * (past.w2 - 1) / scale2**2,
        per_v * (1 - b2) * (c + (1 - c) * sign) * 2 * ahead * d,
        per_v * (1 - b2) * (ahead**2 - yogi),
        (v - mean) / scale2,
    ]
    slopes = [a / bottom - top / bottom**2 / (2 * root) * b for a, b in zip(tops, squares, strict=True)]
    past.m, past.n, past.v, past.mean, past.square, past.last = m, n, v, mean, square, g
    past.w1, past.w2 = scale1, scale2
    return top / bottom, slopes


def test_coefficients_equal_their_equations():
    """20 steps, float64, two tensors that share their coefficients; the learning rate changes."""
    rng = np.random.default_rng(0)
    xs = [rng.normal(size=(7, 5)), rng.normal(size=11)]
    parameters = [nn.Parameter(torch.tensor(x)) for x in xs]
    optimizer = dpopt.optim.MADA(parameters, lr=0.01, hyper_lr=HYPER, **START)
    q, low = np.array([*START["betas"], START["c"], START["rho"]]), np.array([0, 0.5, 0, 0, 0])
    high = np.array([0.98, 0.995, 0.93, 1, 1])  # 1 − β is a tenth of what it was
    pasts, slopes, seen = [], None, []
    for t in range(20):
        gradients, lr = [rng.normal(size=x.shape) + 0.3 for x in xs], 0.01 / (1 + t)
        if slopes is not None:
            inner = [sum((g * s[i]).sum() for g, s in zip(gradients, slopes, strict=True)) for i in range(5)]
            q = np.clip(q + HYPER * (0.01 / t) * np.array(inner), low, high)
        pasts = pasts or [Past(g) for g in gradients]
        steps = [literal(past, g, q) for past, g in zip(pasts, gradients, strict=True)]
        slopes = [step[1] for step in steps]
        xs = [x - lr * step[0] for x, step in zip(xs, steps, strict=True)]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = torch.tensor(g)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        group = optimizer.param_groups[0]
        np.testing.assert_allclose([*group["betas"], group["c"], group["rho"]], q, rtol=1e-8, atol=1e-8)
        seen.append(q)
    for p, x in zip(parameters, xs, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-8, atol=1e-8)
    assert (np.ptp(seen, axis=0) > 1e-4).all()  # every coefficient moved


def run(optimizer, p, count, steps=100):
    for t in range(steps):
        p.grad = torch.sin((t + 1) * torch.arange(count, dtype=p.dtype)) * 0.1 + p.detach()
        optimizer.step()
    return p.detach()


def test_it_is_adam_while_its_coefficients_are_adams():
    p, twin = (nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64)) for _ in range(2))
    mine = run(dpopt.optim.MADA([p], lr=0.01, hyper_lr=0.0, weight_decay=0.1), p, 9)
    torch.testing.assert_close(
        mine, run(torch.optim.AdamW([twin], lr=0.01, weight_decay=0.1), twin, 9), rtol=1e-9, atol=0
    )


def test_every_coefficient_stays_in_its_bounds():
    p = nn.Parameter(torch.ones(30))
    optimizer = dpopt.optim.MADA([p], lr=0.1, hyper_lr=100.0)
    run(optimizer, p, 30)
    group = optimizer.param_groups[0]
    bounds = zip(
        [*group["betas"], group["c"], group["rho"]], [0, 0.99, 0, 0, 0], [0.99, 0.9999, 0.9, 1, 1], strict=True
    )
    assert all(low - 1e-6 <= q <= high + 1e-6 for q, low, high in bounds) and p.isfinite().all()


def test_momentum_falls_where_gradients_grow_and_rises_where_they_alternate():
    found = {}
    for name, sign in {"grow": 1, "alternate": -1}.items():
        p = nn.Parameter(torch.zeros(5))
        optimizer = dpopt.optim.MADA([p], lr=0.01, betas=(0.5, 0.999, 0.0))
        for t in range(50):
            p.grad = torch.full((5,), 1.0 + 0.2 * t) * sign**t
            optimizer.step()
        found[name] = optimizer.param_groups[0]["betas"][0]
    assert found["grow"] < 0.5 < found["alternate"]


def test_a_coordinate_without_gradient_stays_and_disturbs_no_other():
    p = nn.Parameter(torch.ones(4))
    optimizer = dpopt.optim.MADA([p], lr=0.01)
    for t in range(10):
        p.grad = torch.tensor([0.0, 1.0, -1.0, 0.5 * t])
        optimizer.step()
    assert p[0] == 1 and p.isfinite().all() and optimizer.param_groups[0]["betas"][0] != 0.9


def test_a_step_without_gradient_teaches_nothing():
    p, other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = dpopt.optim.MADA([p, other], lr=0.01)
    for t in range(6):
        p.grad = torch.full((4,), 1.0 + t)
        other.grad = p.grad.clone() if t % 2 else None
        optimizer.step()
    assert optimizer.state[other]["step"] == 3 and other.isfinite().all()


@pytest.mark.parametrize("options", [dict(betas=(0.9, 0.999)), dict(c=1.5), dict(rho=-0.1), dict(hyper_lr=-1.0)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        dpopt.optim.MADA([nn.Parameter(torch.zeros(3))], **options)


def test_coefficients_are_reported():
    """Every option that is learned, under its name."""
    p = nn.Parameter(torch.randn(40, generator=torch.Generator().manual_seed(0)))
    optimizer = dpopt.optim.MADA([p], lr=0.1, hyper_lr=3.0, **START)
    for _ in range(3):
        p.grad = p.detach().clone()
        after = optimizer.step_metrics()
        optimizer.step()
    group, told = optimizer.param_groups[0], after()
    assert [told[f"optimizer/beta{i}"] for i in (1, 2, 3)] == list(group["betas"]) != list(START["betas"])
    assert (told["optimizer/c"], told["optimizer/rho"]) == (group["c"], group["rho"]) and group["rho"] != START["rho"]
