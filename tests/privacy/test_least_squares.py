"""Private least squares: the normal equations, noise on each statistic once, what is refused, and a mistake."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_caught, batch_of
from torch import nn

from dpopt.privacy import least_squares
from dpopt.privacy.clipping import Adaptive, Flat, PerLayer
from dpopt.privacy.least_squares import LeastSquares
from dpopt.privacy.plan import PrivacyPlan
from dpopt.rng import RandomKey


def make(sigma, size=300, clip=None, model=None, seed=0, steps=1, batch=None, **options):
    plan = PrivacyPlan(sigma, size, batch or size, steps, 1e-4, key=RandomKey.from_seed(seed, "test"))
    torch.manual_seed(0)
    model = model or nn.Linear(6, 3).double()
    return LeastSquares(model, F.cross_entropy, plan, clip or Flat(1e6), **options)


def data(size=300):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    return x, (x[:, :3] + 0.5 * torch.randn(size, 3, generator=generator, dtype=torch.float64)).argmax(1)


def solution(private):
    """θ of the layer with its bias last, (classes, d + 1), after a step of SGD with learning rate 1."""
    layer = private.layer
    torch.optim.SGD(private.model.parameters(), lr=1.0).step()
    return torch.cat([layer.weight, layer.bias[:, None]], 1).detach()


@pytest.mark.parametrize("clip", [None, Flat(10.0)])
def test_without_noise_it_is_weighted_least_squares(clip):
    """Each example by its clip weight, one that is not finite not at all."""
    x, y = data()
    private = make(0.0, clip=clip)
    broken = x.clone()
    broken[5, 2] = float("nan")
    private.backward(batch_of(private.plan, broken, y))
    rows = torch.cat([x, torch.ones(300, 1, dtype=torch.float64)], 1)
    targets = F.one_hot(y, 3).double() - 1 / 3
    norms = torch.stack(
        [torch.cat([r.outer(r).flatten(), r.outer(t).flatten()]).norm() for r, t in zip(rows, targets, strict=True)]
    )
    weights = (10.0 / norms).clamp(max=1) if clip else torch.ones(300, dtype=torch.float64)
    weights[5] = 0
    root = weights.sqrt()[:, None]
    expected = torch.linalg.lstsq(rows * root, targets * root).solution.mT
    torch.testing.assert_close(solution(private), expected, rtol=1e-8, atol=1e-10)
    assert ((weights < 1).sum() > 50) == (clip is not None)


def check_noise():
    """What is solved: A with noise s on its diagonal and s/√2 next to it, symmetric; B with noise s."""
    x, y = data(40)
    seen = []
    kept = LeastSquares._solve
    LeastSquares._solve = lambda self, a, b, s: seen.append((a.clone(), b.clone()))
    try:
        for seed in range(300):
            private = make(2.0, size=40, clip=Flat(3.0), seed=seed)
            private.backward(batch_of(private.plan, x, y))
    finally:
        LeastSquares._solve = kept
    a, b = (torch.stack(parts) * 40 for parts in zip(*seen, strict=True))
    assert torch.equal(a, a.mT)
    above = torch.triu_indices(7, 7, 1)
    std = {"diagonal": a.diagonal(dim1=1, dim2=2), "above": a[:, above[0], above[1]] * math.sqrt(2), "cross": b}
    for name, values in std.items():
        assert float(values.std(0).square().mean().sqrt()) == pytest.approx(6.0, rel=0.03), name
    flat = torch.cat([part.flatten(1) for part in std.values()], 1)
    correlation = torch.corrcoef(flat.mT) - torch.eye(flat.shape[1], dtype=flat.dtype)
    assert float(correlation.abs().max()) < 0.3  # five standard deviations


def half_the_noise(patch):
    add_noise = LeastSquares._release
    patch.setattr(LeastSquares, "_release", lambda self, total, s: add_noise(self, total, s / 2))


@pytest.mark.slow
def test_noise(monkeypatch):
    check_noise()
    assert_caught(check_noise, half_the_noise, monkeypatch)


def contribution():
    """The longest that one example adds to what is released, of examples of all lengths."""
    longest = 0.0
    for scale in (0.01, 0.5, 1.0, 3.0, 1e3, 1e8):
        x, y = data(1)
        private = make(0.0, size=1, clip=Flat(2.0))
        kept = []
        private._release = lambda total, s, kept=kept: kept.append(total.clone())
        private._solve = lambda *arguments: None
        private.backward(batch_of(private.plan, scale * x, y))
        longest = max(longest, float(kept[0].norm()))
    return longest


def check_sensitivity():
    assert 2.0 * (1 - 1e-9) <= contribution() <= 2.0 * (1 + 1e-9)


def the_trace_forgotten(patch):
    """Weights by the norm of xyᵀ alone."""
    weights = least_squares.clip_weights
    patch.setattr(least_squares, "clip_weights", lambda clip, norms, *rest: weights(clip, norms.sqrt(), *rest))


def test_one_example_adds_no_more_than_the_sensitivity(monkeypatch):
    check_sensitivity()
    assert_caught(check_sensitivity, the_trace_forgotten, monkeypatch)


def test_noise_that_drowns_everything_gives_small_weights():
    """Eigenvalues are raised to the size of the noise, so that it is not magnified."""
    x, y = data()
    private = make(1e4, clip=Flat(3.0))
    private.backward(batch_of(private.plan, x, y))
    assert float(solution(private).abs().max()) < 1


def test_a_model_before_the_layer():
    """Frozen, as a feature extractor is."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Linear(6, 5), nn.Tanh()).double().requires_grad_(False)
    x, y = data()
    private = make(0.0, model=nn.Sequential(features, nn.Linear(5, 3).double()))
    private.backward(batch_of(private.plan, x, y))
    rows = torch.cat([features(x), torch.ones(300, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(rows, F.one_hot(y, 3).double() - 1 / 3).solution.mT
    torch.testing.assert_close(solution(private), expected, rtol=1e-8, atol=1e-10)


def frozen_bias():
    layer = nn.Linear(6, 3)
    layer.bias.requires_grad_(False)
    return layer


class Sorted(nn.Module):
    """Sorts its rows by a feature before the layer, and back behind it: outputs are independent, its rows are not."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3, bias=False).double()

    def forward(self, h):
        order = h[:, 0].argsort()
        return self.layer(h[order])[order.argsort()]


class Meeting(Sorted):
    """Shows the layer the mean of the batch, and does not use what comes of it."""

    def forward(self, h):
        self.layer(h.mean(0, keepdim=True).expand_as(h))
        return F.linear(h, self.layer.weight)


@pytest.mark.parametrize("make_model", [Sorted, Meeting])
def test_no_row_holds_anything_of_another_example(make_model):
    """One example more moves the statistics by no more than the sensitivity."""
    x = torch.zeros(65, 6, dtype=torch.float64)
    x[:64, 0] = -1e-3 + torch.arange(64) * 1e-6
    x[:64, 1] = torch.where(torch.arange(64) % 2 == 0, 0.5, -0.5)
    x[64, :2] = torch.tensor([-1.0, 0.01])
    y = torch.cat([torch.arange(64) % 2, torch.tensor([0])])
    seen = []
    for size in (65, 64):
        try:
            private = make(0.0, size=size, clip=Flat(0.1), model=make_model())
            private._release = lambda total, s: seen.append(total.clone())
            private._solve = lambda *arguments: None
            private.backward(batch_of(private.plan, x[:size], y[:size]))
        except ValueError:  # refused
            return
    assert float((seen[0] - seen[1]).norm()) <= 0.1 * (1 + 1e-9)


def test_a_target_that_is_no_class_counts_as_zero():
    x, y = data()
    wrong = y.clone()
    wrong[3], wrong[4] = -100, 7
    solutions = []
    for targets, rows in ((wrong, x), (y, x.clone())):
        rows[3:5] = float("nan") if targets is y else rows[3:5]
        private = make(0.0)
        private._validate = lambda *arguments: None
        private.backward(batch_of(private.plan, rows, targets))
        solutions.append(solution(private))
    torch.testing.assert_close(*solutions)


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(steps=2), "takes all 300 examples in one step"),
        (dict(batch=20), "set steps=1 epochs=null batch_size=300"),
        (dict(clip=PerLayer(1.0)), "without layers"),
        (dict(clip=Adaptive(1.0)), "without layers, a count"),
        (dict(model=nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))), "not Linear, Linear: freeze the others"),
        (dict(model=nn.Conv2d(1, 3, 1)), "not Conv2d"),
        (dict(eigenvalue_floor=-1.0), "must not be negative"),
        (dict(model=frozen_bias()), "no frozen bias"),
    ],
)
def test_what_is_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        make(**{"sigma": 0.0, **options})


def test_targets_that_are_no_classes_are_refused():
    x, _ = data()
    private = make(0.0)
    with pytest.raises(ValueError, match="one class per example"):
        private.backward(batch_of(private.plan, x, torch.rand(300)))
