"""Forward passes that write what they see, or draw random numbers, are refused by name; the model stays as it was."""

import random
from collections import deque
from dataclasses import dataclass
from itertools import count

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import batch_of, make_plan
from torch import nn

from dpopt.grad_sample.snapshot import Snapshot
from dpopt.privacy.clipping import Flat
from dpopt.privacy.private_gradient import PrivateGradient

LAST: list = [torch.zeros(8)]  # a state that no attribute of a model shows


class Codebook(nn.Module):
    """VQ-VAE's codebook, moved by an average in the forward."""

    def __init__(self):
        super().__init__()
        self.code = nn.Parameter(torch.randn(4, 8), requires_grad=False)

    def forward(self, x):
        at = torch.cdist(x, self.code).argmin(1)
        with torch.no_grad():
            for k in at.unique():
                self.code.data[k].lerp_(x[at == k].mean(0), 0.01)
        return x + (self.code[at] - x).detach()


class Renormalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        with torch.no_grad():
            self.scale.clamp_(max=2.0)  # changes nothing today
        return x * self.scale


class Center(nn.Module):
    def __init__(self):
        super().__init__()
        self.center = torch.zeros(8)

    def forward(self, x):
        out = x - self.center.to(x)
        self.center = self.center.to(x).lerp(x.detach().mean(0), 0.01)
        return out


class Queue(nn.Module):
    def __init__(self):
        super().__init__()
        self.keys = {"queue": deque([torch.zeros(8)], maxlen=4)}

    def forward(self, x):
        self.keys["queue"].append(x[0].detach())
        return x


class Bank:
    def __init__(self):
        self.values = np.zeros(8)


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.bank = Bank()

    def forward(self, x):
        self.bank.values += x.detach().double().numpy().mean(0)
        return x


class Number(nn.Module):
    def __init__(self):
        super().__init__()
        self.size = 1.0

    def forward(self, x):
        self.size = 0.9 * self.size + 0.1 * float(x.abs().mean())
        return x


class Buffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0).to(self.mean), 0.1)
        return x


class Features(nn.Module):
    def forward(self, x):
        self.last = x
        return x


@dataclass(slots=True)
class Slots:
    calls: int = 0


class Warming(nn.Module):
    """Normalizes by the batch after a warm-up, which it counts in a place of `kind`."""

    def __init__(self, kind, after=40):
        super().__init__()
        self.kind, self.after, self.calls, self.state, self.slots = kind, after, 0, {"calls": 0}, Slots()
        self.register_buffer("count", torch.zeros(()))
        type(self).shared = 0

    def forward(self, x):
        if self.kind == "class":
            type(self).shared += 1
        elif self.kind == "attribute":
            self.calls += 1
        elif self.kind == "dict":
            self.state["calls"] += 1
        elif self.kind == "slots":
            self.slots.calls += 1
        else:
            self.count.data.add_(1)
        calls = max(self.shared, self.calls, self.state["calls"], self.slots.calls, int(self.count))
        return x - x.mean(0) if calls > self.after else x


COUNTERS = {"attribute": "0.calls", "dict": r"0.state\['calls'\]", "slots": "0.slots.calls"}
COUNTERS["class"] = "0.shared of the class"
WRITING = {
    Codebook: "layer '0' \\(Codebook\\) writes the parameter 0.code",
    Renormalized: "layer '0' \\(Renormalized\\) writes the parameter 0.scale",
    Center: "layer '0' \\(Center\\) writes what it sees of the data into the attribute 0.center",
    Queue: r"into the attribute 0.keys\['queue'\]",
    Hidden: "into the attribute 0.bank.values",
    Number: "into the attribute 0.size",
    Buffer: "into the buffer 0.mean",
    Features: "into the attribute 0.last",
}


class Noisy(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw, self.generator = draw, torch.Generator().manual_seed(0)

    def forward(self, x):
        return x + self.draw(self, x)


class Outside(nn.Module):
    def forward(self, x):
        out = x + LAST[0].to(x)
        LAST[0] = x.detach().mean(0)
        return out


UNREPEATABLE = {
    "dropout by hand": lambda: Noisy(lambda layer, x: x * (torch.rand_like(x) > 0.5)),
    "generator": lambda: Noisy(lambda layer, x: torch.randn(x.shape, generator=layer.generator).to(x)),
    "random": lambda: Noisy(lambda layer, x: random.random()),
    "numpy": lambda: Noisy(lambda layer, x: float(np.random.rand())),
    "global state": Outside,
}


def network(layer):
    torch.manual_seed(0)
    return nn.Sequential(layer, nn.Linear(8, 3))


def step(model, inputs=None, targets=None, **options):
    if inputs is None:
        inputs, targets = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
    plan = make_plan(sigma=0.0)
    private = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0), **options)
    private.backward(batch_of(plan, inputs, targets))


@pytest.mark.parametrize("engine", ["auto", "vmap"])
@pytest.mark.parametrize("kind", WRITING, ids=lambda kind: kind.__name__)
def test_a_forward_that_writes_is_refused(kind, engine):
    model = network(kind())
    before = Snapshot(model)
    with pytest.raises(ValueError, match=WRITING[kind]):
        step(model, engine=engine)
    assert not [path for path in before.differences() if path not in before.parameters]
    assert all(torch.equal(p, before._values[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("engine", ["auto", "vmap"])
@pytest.mark.parametrize("kind", COUNTERS)
def test_a_counter_is_refused(kind, engine):
    """A layer that mixes examples from its fortieth call on looks honest in the first."""
    with pytest.raises(ValueError, match=rf"'0' \(Warming\) changes {COUNTERS[kind]} with every call"):
        step(network(Warming(kind)), engine=engine)


ITERATORS = {"count": count, "range": lambda: iter(range(9)), "generator": lambda: (i for i in range(9))}


@pytest.mark.parametrize("kind", ITERATORS)
def test_an_iterator_is_refused(kind):
    """It could count, and shows nothing of it."""
    layer = nn.Identity()
    layer.numbers = [ITERATORS[kind]()]
    with pytest.raises(ValueError, match=r"layer '0' \(Identity\) holds the iterator 0\.numbers\[0\]"):
        step(network(layer))


def test_a_counter_in_a_buffer_counts_no_step_and_is_validated_once_others_count():
    model, plan = network(Warming("buffer")), make_plan(sigma=0.0, steps=60)
    inputs, targets = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
    private = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0), engine="vmap")
    for number in range(50):
        private.backward(batch_of(plan, inputs, targets, number))
    assert model[0].count == 0
    for _ in range(41):
        model(inputs)
    with pytest.raises(ValueError, match="mixes the examples"):
        private.backward(batch_of(plan, inputs, targets, 50))


def test_writing_in_train_mode_alone_is_fine_in_eval_mode():
    step(network(Buffer()).eval())
    with pytest.raises(ValueError, match=r"buffer 0\.mean"):
        step(network(Buffer()).train())


@pytest.mark.parametrize("engine", ["auto", "vmap"])
@pytest.mark.parametrize("name", UNREPEATABLE)
def test_a_forward_that_cannot_be_repeated_is_refused(name, engine):
    named = "the model" if name == "global state" else "layer '0'"
    with pytest.raises(ValueError, match=rf"{named} \(\w+\) gives different outputs for equal inputs"):
        step(network(UNREPEATABLE[name]()), engine=engine)


@pytest.mark.parametrize("trained", [True, False])
def test_embeddings_that_renormalize_are_refused(trained):
    class Words(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.table, self.head = nn.Embedding(20, 8, **options).requires_grad_(trained), nn.Linear(8, 3)

        def forward(self, tokens):
            return self.head(self.table(tokens).mean(1))

    tokens, targets = torch.randint(0, 20, (8, 4)), torch.arange(8) % 3
    step(Words(), tokens, targets)
    with pytest.raises(ValueError, match=r"'table' \(Embedding\) has max_norm=1.0"):
        step(Words(max_norm=1.0), tokens, targets)


def test_a_snapshot_restores_everything():
    model = nn.Sequential(Center(), Queue(), Hidden(), nn.BatchNorm1d(8), Noisy(lambda layer, x: 0))
    model[0].cache, model[0].nested = [torch.ones(2), {"a": 1}], {"b": [np.ones(3)]}
    model[0].slots = Slots(2)
    before = Snapshot(model)
    state = model[4].generator.get_state()
    assert not before.differences()
    model[0].center, model[0].extra = torch.ones(8), 3
    model[0].cache[0].mul_(2)
    model[0].slots.calls = 3
    model[0].cache.append(4)
    model[0].nested["b"][0][1] = 7.0
    model[1].keys["queue"].append(torch.ones(8))
    model[2].bank.values = model[2].bank.values + 1
    model[3](torch.randn(4, 8))
    torch.randn(3, generator=model[4].generator)
    with torch.no_grad():
        model[3].weight.mul_(2)
    changed = before.differences()
    assert {"0.center", "0.extra", "0.cache[0]", "0.nested['b'][0]", "2.bank.values", "3.weight"} <= changed.keys()
    before.restore()
    assert set(before.differences()) == {"3.weight"}  # written to, and the value that it had
    assert (
        not hasattr(model[0], "extra")
        and model[0].slots.calls == 2
        and len(model[0].cache) == 2
        and (model[3].weight == 1).all()
    )
    assert torch.equal(state, model[4].generator.get_state())
