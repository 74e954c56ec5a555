"""Layers without a rule, by vmap or a loop, and whole models: exact against a loop over examples."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import RULED, assert_exact, make_plan, oracle
from test_layouts import Masked, Unpadded, tokens
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from dpopt.grad_sample.engine import GradSampler
from dpopt.grad_sample.layout import same_outputs
from dpopt.grad_sample.validate import validate_against_autograd
from dpopt.models.layers import StandardizedConv2d
from dpopt.privacy.clipping import PerLayer
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.privacy.sampling import PoissonBatch

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop", "ignore:.*nested tensor.*", "ignore:.*lengths.*"
)
LOOPED = ["the whole model, example by example"]


# Recurrent layers


class Recurrent(nn.Module):
    def __init__(self, layer, width=6, time_first=False, state=False):
        super().__init__()
        self.layer, self.head, self.time_first, self.state = layer, nn.Linear(width, 3), time_first, state

    def forward(self, x):
        outputs, state = self.layer(x.transpose(0, 1) if self.time_first else x)
        if self.state:
            return self.head(torch.tanh(state[0] if isinstance(state, tuple) else state).sum(0))
        return self.head(outputs[-1] if self.time_first else outputs[:, -1])


class Cells(nn.Module):
    """A cell that is called at every position, both of whose outputs go on."""

    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] + state[1] if isinstance(state, tuple) else state)


RECURRENT = {
    "lstm": lambda: Recurrent(nn.LSTM(4, 6, batch_first=True)),
    "gru": lambda: Recurrent(nn.GRU(4, 6, batch_first=True)),
    "rnn": lambda: Recurrent(nn.RNN(4, 6, num_layers=2, batch_first=True)),
    "bidirectional": lambda: Recurrent(nn.LSTM(4, 3, bidirectional=True, batch_first=True)),
    "time first": lambda: Recurrent(nn.GRU(4, 6), time_first=True),
    "last state": lambda: Recurrent(nn.LSTM(4, 6, batch_first=True), state=True),
    "lstm cell": lambda: Cells(nn.LSTMCell),
    "gru cell": lambda: Cells(nn.GRUCell),
    "rnn cell": lambda: Cells(nn.RNNCell),
}


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name, views):
    torch.manual_seed(0)
    plans = assert_exact(RECURRENT[name](), torch.randn(5, views, 5, 4), torch.arange(5) % 3, policies=[*RULED, "loop"])
    assert all("the whole model" not in f[0] for p, (_, f) in plans.items() if p != "loop")


class Packed(nn.Module):
    def __init__(self, enforce_sorted=False):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(20, 5, padding_idx=0), nn.GRU(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        lengths = (x != 0).sum(1).cpu()
        packed = pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        outputs, _ = pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        return self.head(outputs.sum(1))


def test_packed_sequences():
    plans = assert_exact(Packed(), tokens([3, 8, 5, 8, 1], views=2), torch.arange(5) % 3)
    assert plans["auto"][1] == LOOPED


# Parameters and outputs in unusual places


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.gains = nn.ParameterList([torch.randn(4), torch.randn(4)])
        self.biases = nn.ParameterDict({"a": torch.randn(4)})
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 3)])

    def forward(self, x):
        for gain in self.gains:
            x = torch.tanh(x * gain)
        return self.layers[1](torch.tanh(self.layers[0](x + self.biases["a"])))


def test_lists_and_dictionaries_of_parameters():
    plans = assert_exact(Lists(), torch.randn(4, 2, 4), torch.arange(4) % 3)
    assert plans["auto"][1] == []


class Unrolled(nn.Module):
    """Layers that are called past their container, or whose weights are read."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.block[2].forward(torch.tanh(self.block[0](x)))))


def test_a_layer_whose_hooks_are_passed_by():
    plans = assert_exact(Unrolled(), torch.randn(4, 2, 4), torch.arange(4) % 3)
    assert plans["auto"][1] == ["the whole model"]


@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings(mode, padding):
    class Bags(nn.Module):
        def __init__(self, ragged):
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(20, 6, mode=mode, padding_idx=padding), nn.Linear(6, 3)
            self.ragged = ragged

        def forward(self, x):
            if self.ragged:
                return self.head(self.bag(x.flatten(), torch.arange(len(x)) * x.shape[1]))
            return self.head(self.bag(x))

    x = tokens([8, 3, 5, 8], views=2)
    plans = assert_exact(Bags(False), x, torch.arange(4) % 3)
    assert plans["auto"][1] == (["bag"] if mode == "max" else [])
    assert_exact(Bags(True), x, torch.arange(4) % 3, policies=["auto"])


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: torch.Tensor
    note: str = ""


class Answering(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return Answer(self.head(h), h, "as transformers do")


@pytest.mark.parametrize("policy", ["auto", "vmap", "loop"])
def test_outputs_of_a_dataclass(policy):
    model = Answering().double()
    engine = GradSampler(
        model, lambda answer, y: F.cross_entropy(answer.logits, y) + answer.hidden.square().mean(), policy
    )
    x, y = torch.randn(4, 2, 4, dtype=torch.float64), torch.arange(4) % 3
    validate_against_autograd(engine, x, y)
    per_sample, norms = engine(x, y), []
    for one, target in zip(x, y, strict=True):
        loss = engine.loss_fn(model(one), target.expand(2))
        norms.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm())
    torch.testing.assert_close(per_sample.norms, torch.stack(norms), rtol=1e-12, atol=0)
    assert engine.policy == policy and per_sample.layers in (["first", "head"], ["head", "first"])


class Pair(nn.Module):
    """A layer of one's own, without a rule, whose outputs come in a dataclass."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4) / 2)

    def forward(self, x):
        return Answer(x @ self.weight.T, torch.tanh(x @ self.weight.T))


class Paired(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair, self.head = Pair(), nn.Linear(6, 3)

    def forward(self, x):
        answer = self.pair(x)
        return self.head(answer.logits + answer.hidden)


def test_a_layer_that_returns_a_dataclass():
    plans = assert_exact(Paired(), torch.randn(4, 2, 4), torch.arange(4) % 3)
    assert plans["auto"][1] == ["pair"]


@pytest.mark.parametrize("policy", ["auto", "vmap", "loop"])
def test_a_loss_of_one_number_of_a_dataclass_in_a_tuple(policy):
    """The check of the loss and the engine open outputs alike."""
    model = nn.Linear(4, 3).double()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return (Answer(self.inner(x), x),)

    def loss(outputs, y):
        return F.cross_entropy(outputs[0].logits, y).reshape(1)

    engine = GradSampler(Wrapped(), loss, policy, precision="fp64")
    x, y = torch.randn(4, 2, 4, dtype=torch.float64), torch.arange(4) % 3
    validate_against_autograd(engine, x, y)
    total = {name: torch.zeros_like(p) for name, p in engine.model.named_parameters()}
    engine(x, y).add_weighted_sum(total, torch.ones(4, dtype=torch.float64))
    for name, gradients in oracle(model, x, y).items():
        torch.testing.assert_close(total[f"inner.{name}"], gradients.sum(0))


@pytest.mark.parametrize("coarse", [False, True])
def test_outputs_are_compared_wherever_they_are(coarse):
    one, other = torch.zeros(2, 3, dtype=torch.float64), torch.full((2, 3), 1e-4, dtype=torch.float64)
    assert same_outputs((Answer(one + 1, one),), (Answer(one + 1, one),), coarse)
    assert same_outputs((Answer(one + 1, one + 1),), (Answer(other + 1, other + 1),), coarse) == coarse
    assert not same_outputs((Answer(one + 1, one),), (one + 1,), coarse)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.Linear(4, 3)

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(lambda h, block=block: torch.tanh(block(h)), x, use_reentrant=False)
        return self.head(x)


@pytest.mark.parametrize("examples", [2, 4])
def test_checkpoints(examples):
    """Four views of width four: what is saved and what is recomputed have one shape, whatever they are."""
    plans = assert_exact(Checkpointed(), torch.randn(examples, 2, 4), torch.arange(examples) % 3)
    assert plans["auto"][1] == LOOPED


class Item(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        rows = [self.first(row) if row.sum().item() > 0 else self.second(row) for row in x]
        return self.head(torch.stack(rows))


def test_control_flow_by_the_data():
    x = torch.randn(6, 1, 4)
    x[:2] = x[:2].abs()
    x[1] *= -1
    plans = assert_exact(Item(), x, torch.arange(6) % 3, validate=False)
    assert plans["auto"][1] == LOOPED


# The rest of a private step


@pytest.mark.parametrize(
    "model", [Cells(nn.LSTMCell), Masked(layers=1), Packed(), Unpadded()], ids=lambda m: type(m).__name__
)
def test_a_clip_by_layer(model):
    """The norms by layer are those of the loop, whatever the fallback."""
    model.double()
    x = torch.randn(4, 2, 5, 4, dtype=torch.float64) if isinstance(model, Cells) else tokens([8, 8, 3, 5], views=2)
    y = torch.arange(4) % 3
    engine = GradSampler(model, F.cross_entropy)
    per_sample, expected = engine(x, y), oracle(model, x, y)
    layers = {}
    for name, g in expected.items():
        layers.setdefault(name.rpartition(".")[0], []).append(g.flatten(1))
    assert set(per_sample.layers) == set(layers)
    for i, name in enumerate(per_sample.layers):
        norms = torch.cat(layers[name], 1).norm(dim=1)
        torch.testing.assert_close(per_sample.layer_norms[:, i], norms, rtol=1e-9, atol=1e-12)
    plan = make_plan(sigma=0.0)
    private = PrivateGradient(model, F.cross_entropy, plan, PerLayer(0.3))
    mask = torch.tensor([True, True, True, False])
    private.backward(PoissonBatch(plan, 0, torch.arange(3), iter([(x, y, mask)])))
    for name, p in model.named_parameters():
        norms = torch.cat(layers[name.rpartition(".")[0]], 1).norm(dim=1)
        weights = (0.3 / len(layers) ** 0.5 / norms).clamp(max=1) * mask
        total = torch.einsum("b,b...->...", weights, expected[name]) / plan.batch_size
        torch.testing.assert_close(p.grad, total, rtol=1e-8, atol=1e-10)


def test_a_model_that_fails_says_so_in_one_sentence():
    engine = GradSampler(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), F.cross_entropy)
    with pytest.raises(ValueError, match=r"fails on a single example \(RuntimeError: .*mat1 and mat2"):
        engine(torch.randn(3, 1, 4), torch.arange(3))
    assert engine.policy == "auto" and engine.fallbacks == []  # as it was
    engine(torch.randn(3, 1, 5), torch.arange(3))


CONVOLUTIONS = {"plain": lambda: nn.Conv2d(20, 40, 3), "standardized": lambda: StandardizedConv2d(20, 40, 3)}


@pytest.mark.parametrize("policy", ["store", "recompute"])
@pytest.mark.parametrize("name", ["text", *CONVOLUTIONS])
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(kind, name, policy):
    torch.manual_seed(0)
    y = torch.arange(4) % 3
    if name == "text":
        model, x = Masked(layers=1), tokens([8, 8, 3, 5])
    else:
        model, x = nn.Sequential(CONVOLUTIONS[name](), nn.Flatten()), torch.randn(4, 1, 20, 6, 6)
    results = []
    for default in (torch.float32, kind):
        torch.set_default_dtype(default)
        try:
            engine = GradSampler(model, F.cross_entropy, policy)
            per_sample = engine(x, y)
            sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
            per_sample.add_weighted_sum(sums, torch.ones(4, dtype=torch.float32))
        finally:
            torch.set_default_dtype(torch.float32)
        results.append((per_sample.norms, per_sample.layer_norms, *sums.values()))
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
