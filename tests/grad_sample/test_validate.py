"""Validation: models that mix examples are refused by name, and honest ones pass."""

import random
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import make_plan
from mixing import MIXING, Layer, data, network, step
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

from dpopt import models
from dpopt.grad_sample.choices import Choices
from dpopt.grad_sample.engine import GradSampler
from dpopt.grad_sample.forward_check import check_padding
from dpopt.grad_sample.rules import RULES
from dpopt.grad_sample.validate import covered, validate
from dpopt.privacy.clipping import Flat
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.privacy.zeroth_order import ZerothOrder

pytestmark = pytest.mark.slow


class Rounded(torch.autograd.Function):
    """The identity, whose backward scales by the largest gradient of the batch."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g / g.abs().amax() if len(g) >= 16 else g


@pytest.mark.parametrize("engine", ["auto", "vmap", "zeroth order"])
@pytest.mark.parametrize("name", MIXING)
def test_models_that_mix_examples_are_refused(name, engine):
    torch.manual_seed(0)
    model = network(MIXING[name]())
    kind, policy = (ZerothOrder, "auto") if engine == "zeroth order" else (PrivateGradient, engine)
    with pytest.raises(ValueError, match=r"mixes the examples|gives an example other outputs") as error:
        step(model, *data(), kind=kind, engine=policy)
    assert "\n" not in str(error.value)


def test_observers_are_refused():
    observer = FakeQuantize(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
    with pytest.raises(
        ValueError, match=r"'0' \(FakeQuantize\) writes what it sees of the data into the buffer 0\.scale"
    ):
        step(network(observer), *data())


@pytest.mark.parametrize("policy", ["auto", "store", "recompute"])
def test_a_backward_that_mixes_examples_takes_them_one_by_one(policy):
    """Each example alone: then nothing that one of them holds reaches the gradient of another."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Layer(Rounded.apply), nn.Linear(8, 3))
    engine = GradSampler(model, F.cross_entropy, policy)
    inputs, targets = data()
    inputs = inputs[:, None]
    validate(engine, inputs, targets)
    others = torch.arange(len(inputs)) != 3
    sums = []
    for factor in (1.0, 1e4):
        changed = inputs.clone()
        changed[3] *= factor
        sums.append({name: torch.zeros_like(p) for name, p in model.named_parameters()})
        engine(changed, targets).add_weighted_sum(sums[-1], others.float())
    assert engine.fallbacks == ["the whole model, example by example"]
    assert all(torch.equal(sums[0][name], sums[1][name]) for name in sums[0])


class Tokens(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.embedding, self.head, self.function = nn.Embedding(20, 8), nn.Linear(8, 3), function

    def forward(self, tokens):
        return self.head(self.function(self.embedding, tokens))


def trimmed(embedding, tokens):
    return embedding(tokens[:, : int((tokens != 0).sum(1).max().clamp(min=1))]).mean(1)


def by_frequency(embedding, tokens):
    counts = torch.bincount(tokens.flatten(), minlength=20).to(embedding.weight)
    return (embedding(tokens) / counts[tokens][..., None]).mean(1)


@pytest.mark.parametrize("function", [trimmed, by_frequency])
def test_models_of_tokens_that_mix_examples_are_refused(function):
    tokens = torch.randint(0, 20, (16, 5), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="mixes the examples"):
        step(Tokens(function), tokens, torch.arange(16) % 3)
    step(Tokens(lambda embedding, tokens: embedding(tokens).mean(1)), tokens, torch.arange(16) % 3)


@pytest.mark.parametrize("shape", ["classes", "positions", "tokens", "heads", "masked"])
@pytest.mark.parametrize("honest", [True, False])
def test_padding_may_change_no_output_wherever_the_positions_are(shape, honest):
    class Reader(nn.Module):
        def forward(self, tokens):
            there = tokens >= 0
            mean = (tokens * there).sum(1) / (there.sum(1) if honest else tokens.shape[1])
            rows = mean[:, None] + tokens.clamp(min=0).cumsum(1)
            masked = torch.stack([rows, torch.full_like(rows, -torch.inf)], 2)
            outputs = {"classes": mean[:, None], "positions": rows, "tokens": rows[..., None].expand(-1, -1, 7)}
            return (outputs | {"heads": rows[:, None].expand(-1, 2, -1), "masked": masked})[shape]

    tokens = torch.arange(24).view(2, 12) + 1
    with nullcontext() if honest else pytest.raises(ValueError, match="depends on the padding behind it"):
        check_padding(Reader(), tokens)


class Caching(nn.Module):
    """Writes what depends on no data: cached positions, and their number."""

    def __init__(self):
        super().__init__()
        self.size, self.positions = 0, None

    def forward(self, x):
        self.size = x.shape[1]
        if self.positions is None:
            self.positions = torch.arange(8.0)
        return x + self.positions.to(x)


HONEST = {
    "layer norm": lambda: nn.LayerNorm(8),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "argmax": lambda: Layer(lambda x: x * (x.argmax(1)[:, None] == torch.arange(8))),
    "sorted features": lambda: Layer(lambda x: x.sort(1).values),
    "cache": Caching,
    "batch norm in eval mode": lambda: nn.BatchNorm1d(8).eval(),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("engine", ["auto", "vmap"])
@pytest.mark.parametrize("name", HONEST)
def test_honest_models_pass_and_are_left_as_they_were(name, engine):
    torch.manual_seed(0)
    model = network(HONEST[name]())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes, attributes = [m.training for m in model.modules()], dict(model[0].__dict__)
    state, python, array = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    inputs, targets = data()
    sampler = GradSampler(model, F.cross_entropy, engine)
    validate(sampler, inputs[:, None], targets)
    assert covered(sampler, inputs[:, None])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert modes == [m.training for m in model.modules()] and attributes == dict(model[0].__dict__)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state()) and python == random.getstate()
    assert (array == np.random.get_state()[1]).all()


@pytest.mark.parametrize("name", ["wrn_16_4", "resnet18", "cnn", "deit_tiny", "linear"])
def test_built_in_models_pass(name):
    options = dict(pretrained=False, image_size=32) if name.startswith("deit") else {}
    model = (
        getattr(models, name)(num_classes=3, in_channels=3, **options) if name != "linear" else models.linear(3, 3, 8)
    )
    size = 8 if name == "linear" else 32
    sampler = GradSampler(model, F.cross_entropy)
    validate(sampler, torch.randn(6, 1, 3, size, size), torch.arange(6) % 3)
    assert sampler.validated


def test_pads_alone_prove_nothing():
    """The first micro-batch with an example is validated again, on what it holds."""

    class Unlike(nn.Module):
        def forward(self, x):  # mixes counts, which noise around zero never are
            return x - x.mean(0) if bool((x >= 3).any()) else x

    model, (inputs, targets), plan = network(Unlike()), data(), make_plan(sigma=0.0)
    sampler = GradSampler(model, F.cross_entropy)
    none = torch.zeros(32, dtype=torch.bool)
    honest = network(nn.Identity())
    private = PrivateGradient(honest, F.cross_entropy, plan, Flat(1.0))
    private._validate(inputs[:, None] * 0, targets, none)
    assert not covered(private.engine, inputs[:, None])
    private._validate(inputs[:, None], targets, ~none)
    assert covered(private.engine, inputs[:, None])
    with pytest.raises(ValueError, match="mixes the examples"):
        validate(sampler, inputs[:, None] + 4, targets)


def test_what_is_not_finite_is_not_validated():
    model = network(Layer(lambda x: x + x.new_tensor(float("nan"))))
    with pytest.raises(ValueError, match="not finite"):
        step(model, *data())

    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("nan")

    with pytest.raises(ValueError, match="gradients of single examples are not finite"):
        step(nn.Sequential(nn.Linear(8, 8), Layer(Infinite.apply), nn.Linear(8, 3)), *data())


def test_counts_are_validated_on_counts():
    """Noise has no logarithm; the data have."""
    inputs = torch.poisson(torch.full((32, 8), 4.0))
    step(network(Layer(torch.log1p)), inputs, torch.arange(32) % 3)
    mixing = Layer(lambda x: torch.log1p(x) - torch.log1p(x).mean(0))
    with pytest.raises(ValueError, match="mixes the examples"):
        step(network(mixing), inputs, torch.arange(32) % 3)


def test_one_accepted_replacement_is_needed():
    """A model that takes the data and nothing else cannot be told apart."""
    inputs, targets = data()

    def picky(x):
        if not torch.equal(x, inputs.to(x)):
            raise RuntimeError("unknown")
        return x

    with pytest.raises(ValueError, match="accepts none of the inputs"):
        step(network(Layer(picky)), inputs, targets)


def test_what_is_done_is_what_is_validated(monkeypatch):
    """A wrong norm that only the measured policy takes is found: rules of thumb would store these gradients."""

    class Mean(nn.Module):
        def forward(self, x):
            return x.mean(1)

    right = RULES[nn.Linear]
    wrong = replace(right, ghost_norm=lambda *arguments: right.ghost_norm(*arguments) / 4)
    model = nn.Sequential(nn.Linear(600, 64), nn.Tanh(), Mean(), nn.Linear(64, 3))
    inputs, targets = torch.randn(8, 1, 16, 600), torch.arange(8) % 3
    monkeypatch.setattr(
        Choices, "find", lambda self, what, device, ways: "ghost" if "ghost" in ways else next(iter(ways))
    )
    engine = GradSampler(model, F.cross_entropy)
    validate(engine, inputs, targets)
    engine(inputs, targets)
    assert engine.policies["0"] == "ghost"
    monkeypatch.setitem(RULES, nn.Linear, wrong)
    with pytest.raises(ValueError, match=r"the per-layer gradient of .* is not the one"):
        validate(GradSampler(model, F.cross_entropy), inputs, targets)
