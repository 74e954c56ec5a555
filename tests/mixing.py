"""Models whose layers mix the examples of a batch, and a private step of any model."""

import torch
import torch.nn.functional as F
from helpers import batch_of, make_plan
from torch import nn

from dpopt.privacy.clipping import Flat
from dpopt.privacy.private_gradient import PrivateGradient


class Layer(nn.Module):
    """A layer of one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Experts(nn.Module):
    """A switch layer: an expert that is full drops the tokens that come later."""

    def __init__(self, width=8, experts=4):
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, x):
        top, at = self.gate(x).softmax(-1).max(-1)
        capacity = max(4, int(1.25 * len(x) / len(self.experts)))
        out = x
        for number, expert in enumerate(self.experts):
            mine = at == number
            out = out + expert(x) * (top * (mine & (mine.cumsum(0) <= capacity)))[:, None]
        return out


class Recurrent(nn.Module):
    """A batch taken for a sequence."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(8, 8)

    def forward(self, x):
        return self.cell(x)[0]


class Places(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("places", torch.randn(64, 8))

    def forward(self, x):
        return x + self.places[: len(x)].to(x)


def quantized(x):
    scale = 127 / x.detach().abs().amax()
    return x + ((x * scale).round() / scale - x).detach()


def neighbors(x):
    near = (torch.cdist(x, x) < 0.1).to(x)
    return near @ x / near.sum(1, keepdim=True)


MIXING = {
    "hundredth of the batch mean": lambda: Layer(lambda x: x + 0.01 * x.mean(0, keepdim=True)),
    "standardized over the batch": lambda: Layer(lambda x: (x - x.mean(0)) / (x.std(0) + 1e-3)),
    "largest value, out of range only": lambda: Layer(lambda x: x / x.detach().abs().amax().clamp(min=8.0) * 8.0),
    "8 bits per tensor": lambda: Layer(quantized),
    "batch mean from 16 examples on": lambda: Layer(lambda x: x - x.mean(0) if len(x) >= 16 else x),
    "experts with a capacity": Experts,
    "attention over the batch": lambda: Layer(lambda x: x + torch.softmax(x @ x.T, -1) @ x),
    "mean of what is no NaN": lambda: Layer(lambda x: x - x.nanmean(0)),
    "median": lambda: Layer(lambda x: x - x.median(0).values),
    "rank": lambda: Layer(lambda x: x + x.argsort(0).argsort(0).to(x)),
    "cumulative sum": lambda: Layer(lambda x: x.cumsum(0)),
    "neighbor in the batch": lambda: Layer(lambda x: x + 0.1 * x.roll(1, 0)),
    "close neighbors only": lambda: Layer(neighbors),
    "functional batch norm": lambda: Layer(lambda x: F.batch_norm(x, None, None, training=True)),
    "norm of the whole batch": lambda: Layer(lambda x: x * (3.0 / x.norm()).clamp(max=1.0)),
    "guard against outliers": lambda: Layer(lambda x: x / x.abs().max() if float(x.abs().max()) > 1e3 else x),
    "guard against NaN": lambda: Layer(lambda x: 0 * x if bool(x.isnan().any()) else x),
    "guard against a negative mean": lambda: Layer(lambda x: x.tanh() if float(x.mean()) < -5 else x),
    "softmax over examples": lambda: Layer(lambda x: x.softmax(0)),
    "batch as a sequence": Recurrent,
    "place in the batch": Places,
    "size of the batch": lambda: Layer(lambda x: x / len(x)),
}


def network(layer):
    torch.manual_seed(0)
    return nn.Sequential(layer, nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def data(count=32):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 3


def step(model, inputs, targets, loss_fn=F.cross_entropy, kind=PrivateGradient, **options):
    """Take a first private step without noise."""
    plan = make_plan(sigma=0.0)
    private = kind(model, loss_fn, plan, Flat(1.0), **options)
    private.backward(batch_of(plan, inputs, targets))
    return private
