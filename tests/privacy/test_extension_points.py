"""Clips by layer, and what goes together to the left of `p.grad` and what does not."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import make_plan, small_model
from torch import nn

import dpopt
from dpopt.filters import Kalman
from dpopt.grad_sample.engine import POLICIES
from dpopt.privacy.clipping import PSAC, PSASC, Flat, PerLayer
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.privacy.sampling import PoissonBatch
from dpopt.privacy.zeroth_order import ZerothOrder


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


def test_noise_that_is_not_the_same_everywhere_is_not_subtracted():
    model, plan = small_model(), make_plan()
    optimizer = dpopt.optim.AdamBC(model.parameters())
    kalman = Kalman(model.parameters())
    for private in (
        PrivateGradient(model, F.cross_entropy, plan, Flat(1.0), query_points=kalman.query_points),
        PrivateGradient(model, F.cross_entropy, plan, Flat(1.0), pre_clip_scale=lambda p: None),
        ZerothOrder(model, F.cross_entropy, plan, Flat(1.0)),
    ):
        with pytest.raises(ValueError, match="AdamBC corrects for noise"):
            private.update_param_groups(optimizer)


def test_psasc_is_psac_with_other_constants():
    """PSASC(C, s, r) weighs as (C/s)/(‖g‖ + (r/s)/(‖g‖ + r)) does."""
    norm = torch.logspace(-4, 4, 50, dtype=torch.float64)
    by_hand = (0.7 / 0.4) / (norm + (0.1 / 0.4) / (norm + 0.1))
    torch.testing.assert_close(PSASC(0.7, s=0.4, r=0.1).weight(norm), by_hand)
    torch.testing.assert_close(PSASC(0.7, s=1.0, r=0.1).weight(norm), PSAC(0.7, r=0.1).weight(norm))
