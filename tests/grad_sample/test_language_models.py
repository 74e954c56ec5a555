"""Small models of text as libraries write them: exact against a loop over examples."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_exact
from test_layouts import tokens
from torch import nn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:enable_nested_tensor"),
]
FULL, RAGGED = [8] * 8, [8, 8, 8, 3, 5, 8, 8, 2]


class SelfAttention(nn.Module):
    """Takes its mask by keyword and returns a tuple, as in transformers."""

    def __init__(self, width=8):
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)

    def forward(self, h, attention_mask=None, **unused):
        query, key, value = (
            layer(h).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.mT / 2
        scores = scores if attention_mask is None else scores + attention_mask
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return (self.norm(h + self.output(mixed)),)


class Bert(nn.Module):
    """Positions and token types from buffers of batch size 1; `branch` looks into the mask as transformers do."""

    def __init__(self, branch=False):
        super().__init__()
        self.words, self.positions, self.types = (
            nn.Embedding(20, 8, padding_idx=0),
            nn.Embedding(32, 8),
            nn.Embedding(2, 8),
        )
        self.layers = nn.ModuleList([SelfAttention(), SelfAttention()])
        self.norm, self.pooler, self.head, self.branch = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3), branch
        self.register_buffer("position_ids", torch.arange(32)[None])
        self.register_buffer("type_ids", torch.zeros(1, 32, dtype=torch.long))

    def forward(self, x):
        types = self.type_ids[:, : x.shape[1]].expand(len(x), -1)
        h = self.norm(self.words(x) + self.positions(self.position_ids[:, : x.shape[1]]) + self.types(types))
        attended = x != 0
        mask = None if self.branch and bool(attended.all()) else (~attended).to(h.dtype)[:, None, None] * -1e4
        for layer in self.layers:
            h = layer(h, attention_mask=mask)[0]
        return self.head(torch.tanh(self.pooler(h[:, 0])))


class LastToken(nn.Module):
    """GPT-2 for classification: causal, positions without a batch dimension, logits at the last token."""

    def __init__(self):
        super().__init__()
        self.words, self.positions, self.layer = nn.Embedding(20, 8), nn.Embedding(32, 8), SelfAttention()
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        h = self.words(x) + self.positions(torch.arange(x.shape[1]))
        mask = torch.full((x.shape[1],) * 2, float("-inf"), dtype=h.dtype).triu(1)
        logits = self.head(torch.tanh(self.layer(h, attention_mask=mask)[0]))
        return logits[torch.arange(len(x)), ((x != 0).sum(1) - 1).clamp(min=0)]


class Experts(nn.Module):
    """Tokens are routed to one of two experts."""

    def __init__(self):
        super().__init__()
        self.words, self.router, self.head = nn.Embedding(20, 8), nn.Linear(8, 2), nn.Linear(8, 3)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        h = self.words(x).flatten(0, 1)
        share = self.router(h).softmax(-1)
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            chosen = (share.argmax(-1) == i).nonzero().flatten()
            out = out.index_add(0, chosen, expert(h[chosen]) * share[chosen, i][:, None])
        return self.head(out.view(*x.shape, -1).mean(1))


class Translation(nn.Module):
    """Encoder and decoder, time first, all masks by keyword."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, 0.0)

    def forward(self, x):
        h = self.words(x).transpose(0, 1)
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=h.dtype)
        padding = torch.zeros_like(x, dtype=h.dtype).masked_fill(x == 0, float("-inf"))
        h = self.transformer(h, h, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding)
        return self.head(h.mean(0))


class WordModel(nn.Module):
    """The classic: an LSTM, time first, and a decoder of the flattened output."""

    def __init__(self):
        super().__init__()
        self.words, self.recurrent, self.decoder = nn.Embedding(20, 8), nn.LSTM(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        outputs, _ = self.recurrent(self.words(x.t()))
        return self.decoder(outputs.view(-1, 6)).view(x.shape[1], len(x), 3).mean(0)


class OneTable(nn.Module):
    """One embedding for tokens and positions."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.table(x) + self.table(torch.arange(x.shape[1]))).mean(1))


MODELS = {
    "bert": (Bert, []),
    "bert that branches": (lambda: Bert(branch=True), []),
    "gpt 2": (LastToken, []),
    "experts": (Experts, ["the whole model, example by example"]),
    "translation": (Translation, None),  # attention, or the decoder around it where a mask could be split in two ways
    "word model": (WordModel, ["the whole model, example by example"]),
    "one table": (OneTable, ["the whole model"]),
}


@pytest.mark.parametrize("lengths", [FULL, RAGGED], ids=["full", "ragged"])
@pytest.mark.parametrize("size", [7, 8, 9])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_text(name, size, lengths):
    torch.manual_seed(0)
    make, fallbacks = MODELS[name]
    plans = assert_exact(make(), tokens(lengths, size), torch.arange(8) % 3, policies=["auto", "ghost"])
    found = plans["auto"][1]
    assert found == fallbacks or (fallbacks is None and all(name.startswith("transformer.") for name in found))


def test_frozen_embeddings():
    model = Bert()
    for layer in (model.words, model.positions, model.types):
        layer.requires_grad_(False)
    plans = assert_exact(model, tokens(RAGGED), torch.arange(8) % 3)
    assert plans["auto"][1] == []


def test_a_loss_by_token():
    """Next tokens, some of them ignored, as the loss of a language model."""

    class Language(LastToken):
        def forward(self, x):
            return self.head(torch.tanh(self.layer(self.words(x) + self.positions(torch.arange(x.shape[1])))[0])).mT

    from dpopt.grad_sample.engine import GradSampler

    model = Language().double()
    x, y = torch.randint(0, 20, (8, 1, 8)), torch.randint(0, 3, (8, 8))
    y[:, 5:] = -100
    per_sample = GradSampler(model, F.cross_entropy)(x, y)
    for one, target, norm in zip(x, y, per_sample.norms, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(one), target[None]), list(model.parameters()))
        torch.testing.assert_close(torch.cat([g.flatten() for g in gradients]).norm(), norm, rtol=1e-12, atol=0)
