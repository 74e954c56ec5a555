"""Where the examples lie in a layer's tensors: masks, positions, windows, time first, rows by the data."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_exact, loop_oracle, make_plan, oracle
from torch import nn

from dpopt.grad_sample.engine import GradSampler
from dpopt.privacy.clipping import Flat
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.privacy.sampling import PoissonBatch

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop", "ignore:.*nested tensor.*", "ignore:.*lengths.*"
)


def tokens(lengths, size=8, views=1):
    """Token sequences, (B, K, size), of these lengths; 0 is padding."""
    x = torch.randint(1, 20, (len(lengths), views, size))
    for row, length in zip(x, lengths, strict=True):
        row[:, length:] = 0
    return x


# Attention, masks and keywords


class Masked(nn.Module):
    """An encoder with a padding mask, given by keyword."""

    def __init__(self, batch_first=True, norm_first=False, causal=False, layers=2):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=not norm_first and batch_first)
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.batch_first, self.causal = batch_first, causal

    def forward(self, x):
        h = self.embed(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=h.dtype) if self.causal else None
        h = h if self.batch_first else h.transpose(0, 1)
        padding = torch.zeros_like(x, dtype=h.dtype).masked_fill(x == 0, float("-inf"))
        h = self.encoder(h, mask=mask, src_key_padding_mask=padding)
        return self.head(h[:, 0] if self.batch_first else h[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("length", [7, 8])
@pytest.mark.parametrize("how", [{}, {"batch_first": False}, {"norm_first": True}, {"causal": True}])
def test_padding_masks(how, length, training):
    """In a batch whose first examples have no padding, and as long as it has examples."""
    x = tokens([length, length, 4, 6, 2, 4, length, length], length)
    plans = assert_exact(Masked(**how).train(training), x, torch.arange(8) % 3, policies=["auto", "recompute", "ghost"])
    assert plans["auto"][1] == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]


class Weighing(nn.Module):
    """A layer that no rule knows, with two tensors of the batch, a table that all share, and plain options."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x, *, mask, table, power=1):
        return ((x * mask[..., None]) @ self.weight) * table**power


class Keywords(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(4, 4), Weighing(), nn.Linear(6, 3)
        self.register_buffer("table", torch.randn(size, 6))

    def forward(self, x):
        h = self.layer(torch.tanh(self.first(x)), mask=(x[..., 0] > 0).to(x.dtype), table=self.table, power=2)
        return self.head(h.mean(1))


@pytest.mark.parametrize("size", [5, 6])
def test_keywords_of_own_layers(size):
    """The table has as many rows as there are examples, or not."""
    plans = assert_exact(Keywords(size), torch.randn(6, 1, size, 4), torch.arange(6) % 3)
    assert plans["auto"][1] == ["layer"]


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 3, 8))
        self.project, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        query = self.project(self.query)
        found, weights = self.attention(query.expand(len(x), -1, -1), x, x, key_padding_mask=x[..., 0] > 1)
        return self.head(found.mean(1)) + weights.mean(1)[:, :3]


@pytest.mark.parametrize("examples", [3, 5])
def test_a_learned_query_and_attention_weights_that_are_used(examples):
    torch.manual_seed(0)
    assert_exact(CrossAttention(), torch.randn(examples, 2, 5, 8), torch.arange(examples) % 3)


# Positions and tables that all examples share


class Gpt(nn.Module):
    def __init__(self, positions, tied=None):
        super().__init__()
        self.tokens, self.positions, self.kinds = nn.Embedding(20, 8), nn.Embedding(16, 8), nn.Embedding(2, 8)
        self.block, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.head, self.how, self.tied = nn.Linear(8, 20, bias=False), positions, tied
        if tied == "module":
            self.head.weight = self.tokens.weight

    def forward(self, x):
        positions = torch.arange(x.shape[1])
        if self.how == "lead":
            positions = positions[None]
        h = self.positions(positions)
        h = self.tokens(x) + (h[None] if self.how == "later" else h) + self.kinds(torch.zeros_like(x[:1]))
        h = self.norm(h + torch.tanh(self.block(h)))
        return (F.linear(h, self.tokens.weight) if self.tied == "functional" else self.head(h)).mean(1)[:, :3]


@pytest.mark.parametrize("length", [1, 7, 8])
@pytest.mark.parametrize("positions", ["plain", "lead", "later"])
def test_positions_that_all_examples_share(positions, length):
    plans = assert_exact(Gpt(positions), torch.randint(0, 20, (8, 1, length)), torch.arange(8) % 3)
    if positions != "later":
        assert plans["auto"][1] == []


@pytest.mark.parametrize("tied", ["module", "functional"])
def test_tied_weights(tied):
    model = Gpt("plain", tied)
    if tied == "functional":
        del model.head
    plans = assert_exact(model, torch.randint(0, 20, (4, 2, 8)), torch.arange(4) % 3)
    assert plans["auto"][1] == ([] if tied == "module" else ["the whole model"])


def test_positions_behind_a_head_of_zeros():
    """As long as nothing comes back there is nothing to compare, and so nothing to remember."""
    model = Gpt("plain").double()
    with torch.no_grad():
        model.head.weight.zero_()
    engine = GradSampler(model, F.cross_entropy)
    x, y = torch.randint(0, 20, (8, 1, 8)), torch.arange(8) % 3
    engine(x, y)
    with torch.no_grad():
        model.head.weight.normal_()
    expected = oracle(model, x, y)
    sums = {name: torch.zeros_like(g[0]) for name, g in expected.items()}
    engine(x, y).add_weighted_sum(sums, torch.arange(8, dtype=torch.float64))
    for name, g in expected.items():
        torch.testing.assert_close(sums[name], torch.einsum("b,b...->...", torch.arange(8).double(), g))


# Rows by the data


class Unpadded(nn.Module):
    """A layer that sees valid tokens only."""

    def __init__(self, how="mask"):
        super().__init__()
        self.embed, self.layer, self.head, self.how = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3), how

    def forward(self, x):
        h = self.embed(x)
        if self.how == "mask":
            out, keep = torch.zeros_like(h), x != 0
            out[keep] = torch.tanh(self.layer(h[keep]))
            return self.head(out.sum(1))
        if self.how == "sort":
            order = (x != 0).sum(1).argsort(descending=True, stable=True)
            return self.head(torch.tanh(self.layer(h[order]))[order.argsort()].sum(1))
        if self.how == "branch":
            lengths = (x != 0).sum(1)
            flip = bool(lengths[0] < lengths[-1])
            h = torch.tanh(self.layer(h.flip(0) if flip else h))
            return self.head((h.flip(0) if flip else h).sum(1))
        keep = torch.nonzero((x != 0).flatten()).flatten()
        out = torch.zeros_like(h).flatten(0, 1).index_add(0, keep, torch.tanh(self.layer(h.flatten(0, 1)[keep])))
        return self.head(out.view_as(h).sum(1))


BATCHES = [
    [6] * 8,  # 48 rows, in order
    [8, 8, 4, 6, 2, 4, 8, 8],  # 48 rows, not in order
    [8, 0, 0, 0, 0, 0, 0, 0],  # 8 rows
    [1] * 8,
    [1, 2, 3, 4, 5, 6, 7, 8],
]


@pytest.mark.parametrize("how", ["mask", "nonzero", "sort", "branch"])
def test_rows_by_the_data(how):
    """Validated on a batch where each example has as many rows as any other, then used on others."""
    torch.manual_seed(0)
    model = Unpadded(how).double()
    plan, clip = make_plan(sigma=0.0), Flat(0.5)
    private = PrivateGradient(model, F.cross_entropy, plan, clip)
    for step, lengths in enumerate(BATCHES):
        x, y = tokens(lengths), torch.arange(8) % 3
        mask = torch.ones(8, dtype=torch.bool)
        private.backward(PoissonBatch(plan, step, torch.arange(8), iter([(x, y, mask)])))
        expected = loop_oracle(model, F.cross_entropy, x, y, clip)
        for p, e in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, e / plan.batch_size, rtol=1e-9, atol=1e-11)


class Windows(nn.Module):
    """Windows of a map as a batch of their own, as Swin has them; or a map of patches as one row each."""

    def __init__(self, shifted=False):
        super().__init__()
        self.embed, self.norm, self.mix, self.head = (
            nn.Linear(3, 8),
            nn.LayerNorm(8),
            nn.Conv1d(4, 4, 1),
            nn.Linear(8, 3),
        )
        self.shifted = shifted

    def forward(self, x):
        h = self.embed(x.flatten(2).transpose(1, 2).flatten(0, 1)).view(len(x), 4, 4, 8)
        h = h.roll((1, 1), (1, 2)) if self.shifted else h
        h = h.view(-1, 2, 2, 2, 2, 8).transpose(2, 3).reshape(-1, 4, 8)
        return self.head(torch.tanh(self.mix(self.norm(h))).view(len(x), -1, 8).mean(1))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("examples", [2, 3, 4])
def test_windows(shifted, examples):
    plans = assert_exact(Windows(shifted), torch.randn(examples, 2, 3, 4, 4), torch.arange(examples) % 3)
    assert plans["auto"][1] == []


class TimeMajor(nn.Module):
    """Examples in the second dimension, for layers with rules; flattened with the time first, for the last."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.first, self.head = (
            nn.Embedding(20, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        h = torch.tanh(self.first(self.norm(self.embed(x.T))))
        return self.head(h.flatten(0, 1)).view(*h.shape[:2], 3).mean(0)


@pytest.mark.parametrize("length", [4, 6])
def test_time_first(length):
    plans = assert_exact(TimeMajor(), torch.randint(0, 20, (4, 1, length)), torch.arange(4) % 3)
    assert plans["auto"][1] == ["the whole model"]  # for the last layer
