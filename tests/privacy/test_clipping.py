"""Clip rules: what they promise, on gradients that try to break it."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import batch_of, make_plan
from torch import nn

from dpopt.grad_sample.engine import GradSampler
from dpopt.models.layers import StandardizedConv2d
from dpopt.privacy.bounded import clip_weights
from dpopt.privacy.clipping import PSAC, PSASC, Adaptive, Automatic, Flat, PerLayer, Slack
from dpopt.privacy.private_gradient import PrivateGradient

RULES = [
    *(Flat(1.0), Flat(0.37), Automatic(1.0), Automatic(2.5, gamma=0.1), PSAC(1.0), PSAC(0.3, r=0.01)),
    *(PSASC(1.0), PSASC(0.7, s=0.1, r=1e-3), PSASC(2.0, s=1.0), PerLayer(0.8), Adaptive(0.6), Slack(0.6)),
]


class Layers(nn.Module):
    """The gradient of the mean output with respect to the weights is the input: whatever one likes."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(n, 1, bias=False) for n in (1, 5, 10)])

    def forward(self, x):
        return sum(part(piece) for part, piece in zip(self.parts, x.split([1, 5, 10], 1), strict=True))


def adversarial(count: int) -> torch.Tensor:
    """Gradients (count, 16): of all lengths, one-hot, constant, tiny, huge, at the threshold, infinite and NaN."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, 16, generator=generator)
    rows *= 10 ** torch.empty(count, 1).uniform_(-18, 18, generator=generator)
    tenth = count // 10
    rows[:tenth] /= rows[:tenth].norm(dim=1, keepdim=True)
    rows[:tenth] *= torch.tensor([0.3, 0.37, 0.6, 0.8, 1.0])[torch.arange(tenth) % 5, None] * 1.0000001
    rows[tenth : 2 * tenth] *= torch.eye(16)[torch.arange(tenth) % 16]
    rows[2 * tenth : 3 * tenth] = rows[2 * tenth : 3 * tenth, :1]
    rows[3 * tenth : 3 * tenth + 6, 0] = torch.tensor([math.inf, -math.inf, math.nan, 3e38, 1e-45, 0.0])
    rows[3 * tenth + 6] = 0.0
    rows[3 * tenth + 7] = 3e38
    return rows


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__} {rule.sensitivity:g}")
@pytest.mark.parametrize("policy", ["store", "recompute", "vmap"])
def test_no_gradient_is_longer_than_the_sensitivity_once_weighted(rule, policy):
    """10,000 gradients through the engine: ‖w(g)·g‖ ≤ S·(1 + 1e-6), nothing where the gradient is not finite."""
    rows = adversarial(10_000)
    model = Layers()
    engine = GradSampler(model, lambda outputs, targets: outputs.mean(), policy)
    per_sample = engine(rows[:, None], torch.zeros(len(rows)))
    mask = torch.ones(len(rows), dtype=torch.bool)
    mask[-5:] = False
    norms = per_sample.layer_norms if getattr(rule, "by_layer", False) else per_sample.norms
    weights = clip_weights(rule, norms, mask & per_sample.norms.isfinite(), rule.sensitivity)
    assert weights.isfinite().all() and (weights >= 0).all() and (weights[-5:] == 0).all()
    finite = rows.isfinite().all(1)
    by_layer = getattr(rule, "by_layer", False)
    if by_layer:
        sizes = torch.tensor([1, 5, 10])
        weights = weights[:, [per_sample.layers.index(f"parts.{i}") for i in range(3)]].repeat_interleave(sizes, 1)
    lengths = (weights.double().view(len(rows), -1) * rows.double())[finite].norm(dim=1)
    assert (lengths <= rule.sensitivity * (1 + 1e-6)).all()
    assert (weights[~finite] == 0).all()
    assert lengths.max() > rule.sensitivity * 0.99  # and the bound is not an idle one


@pytest.mark.parametrize("policy", ["store", "recompute"])
@pytest.mark.parametrize("make", [nn.Conv2d, StandardizedConv2d])
def test_every_convolution_is_clipped_by_its_own_norm(make, policy):
    """Per layer, of one example alone, with parameters that are frozen, too."""
    torch.manual_seed(0)
    model = nn.Sequential(make(3, 20, 3), make(20, 20, 3), make(20, 20, 3), make(20, 20, 3), nn.Flatten(1))
    model[1].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    engine = GradSampler(model, nn.functional.cross_entropy, policy)
    for i in range(3):
        per_sample = engine(1e3 * torch.randn(3, 1, 3, 12, 12), torch.arange(3))
        sums = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
        weights = torch.zeros(3, 4)
        weights[i] = PerLayer(4.0).weight(per_sample.layer_norms)[i]
        per_sample.add_weighted_sum(sums, weights)
        for layer, norm in zip(per_sample.layers, per_sample.layer_norms[i], strict=True):
            found = torch.cat([total.flatten() for name, total in sums.items() if name.startswith(f"{layer}.")]).norm()
            assert float(found) == pytest.approx(min(2.0, float(norm)), rel=1e-5)


def test_weights_by_hand():
    assert Flat(1.0).weight(torch.tensor([0.5, 1.0, 4.0])).tolist() == [1, 1, 0.25]
    assert Automatic(2.0, gamma=0.5).weight(torch.tensor([0.5, 1.5])).tolist() == [2, 1]
    assert PSAC(3.0, r=0.5).weight(torch.tensor([0.5])).tolist() == [3.0]  # 3/(.5 + .5/1)
    assert PSASC(3.0, s=0.5, r=0.5).weight(torch.tensor([0.5])).tolist() == [4.0]  # 3/(.25 + .5)
    assert PSASC(3.0, s=0.5).sensitivity == 6.0
    assert PerLayer(2.0).weight(torch.tensor([[1.0, 2.0, 0.1, 4.0]])).tolist() == [[1.0, 0.5, 1.0, 0.25]]


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_bad_clip_norms(value):
    for rule in (Flat, Automatic, PSAC, PSASC, PerLayer, Adaptive, Slack):
        with pytest.raises(ValueError, match="positive number"):
            rule(value)
    with pytest.raises(ValueError, match="s=0 must be a positive number"):
        PSASC(1.0, s=0)


class Inverse:
    """A rule of a user's, that normalizes whatever is longer than 1e-30."""

    sensitivity = 1.0

    def weight(self, norms):
        return 1 / (norms + 1e-30)


@pytest.mark.parametrize("scale", [1e-40, 1e-28, 1e-24, 1e-20, 1e-10, 1.0])
def test_a_gradient_whose_squares_underflow_is_no_longer_than_the_sensitivity(scale):
    """Its norm is 0 in float32, and 0 times any weight is below the sensitivity."""
    torch.manual_seed(0)
    model, plan = nn.Linear(2000, 2, bias=False), make_plan(sigma=0.0)
    inputs = scale * torch.randn(1, 2000)
    private = PrivateGradient(model, F.cross_entropy, plan, Inverse())
    private.backward(batch_of(plan, inputs, torch.tensor([1])))
    assert float(model.weight.grad.double().norm()) * plan.batch_size <= 1 + 1e-5
