"""Per-sample gradients of Hugging Face's transformers equal those of a loop over examples, in float64."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from dpopt.data.datasets import DataSpec
from dpopt.grad_sample.engine import GradSampler
from dpopt.grad_sample.validate import validate
from dpopt.models import transformer
from dpopt.tasks import LanguageModeling

ENCODER = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
    **{"max_position_embeddings": 40, "vocab_size": 50, "pad_token_id": 1},
}
DECODER = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 24, "max_position_embeddings": 40, "vocab_size": 50, "pad_token_id": 0},
}
CONFIGS = {
    "bert": {"model_type": "bert", **ENCODER},
    "roberta": {"model_type": "roberta", **ENCODER, "type_vocab_size": 1},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "vocab_size": 50},
    "opt": {
        **{"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24},
        **{"max_position_embeddings": 40, "word_embed_proj_dim": 16, "vocab_size": 50},
    },
    "llama": {"model_type": "llama", **DECODER},
    "qwen2": {"model_type": "qwen2", **DECODER},
    "bitnet": {"model_type": "bitnet", **DECODER},
}
DECODERS = ("gpt2", "opt", "llama", "qwen2", "bitnet")
LENGTHS = (9, 3, 6, 1, 8)
RULES = ("auto", "store", "recompute", "ghost")
POLICIES = (*RULES, "vmap", "loop")
WRITE = LanguageModeling(DataSpec("text", 5, 0, (9,), lambda *_: (None, None))).loss_fn


def make(kind, tied=True, **options):
    torch.manual_seed(0)
    return transformer(config={**CONFIGS[kind], "tie_word_embeddings": tied}, **options).double().eval()


def tokens(side="right"):
    torch.manual_seed(1)
    x = torch.randint(2, 50, (len(LENGTHS), 1, 9))
    for row, length in zip(x, LENGTHS, strict=True):
        row[:, length:] = -1
    return x if side == "right" else torch.stack([row.roll(9 - n, 1) for row, n in zip(x, LENGTHS, strict=True)])


def next_tokens(x):
    """The next token where there is one that is no prompt of two tokens; else ignored."""
    x = x[:, 0]
    following = torch.cat([x[:, 1:], torch.full_like(x[:, :1], -1)], 1)
    present = (x >= 0) & (following >= 0)
    targets = torch.where(present, following, -100)
    targets[:, 0] = torch.where(present[:, 0] & (torch.arange(len(x)) % 2 == 0), -100, targets[:, 0])
    return targets


def assert_exact(model, loss_fn, x, y, policies=POLICIES, tolerance=1e-10, fallbacks=0):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = torch.linspace(0.1, 0.5, len(x), dtype=torch.float64)
    norms, expected = [], {name: torch.zeros_like(p) for name, p in trained.items()}
    for views, target, weight in zip(x, y, weights, strict=True):
        loss = loss_fn(model(views), target[None])
        found = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
        norms.append(torch.cat([g.flatten() for g in found]).norm())
        for total, g in zip(expected.values(), found, strict=True):
            total += weight * g
    longest = torch.cat([total.flatten() for total in expected.values()]).norm()
    used = {}
    for policy in policies:
        engine = GradSampler(model, loss_fn, policy)
        per_sample = engine(x, y)
        sums = {name: torch.zeros_like(p) for name, p in trained.items()}
        per_sample.add_weighted_sum(sums, weights)
        torch.testing.assert_close(per_sample.norms, torch.stack(norms), rtol=tolerance, atol=0)
        for name, total in sums.items():
            assert float((total - expected[name]).abs().max()) <= tolerance * float(longest), (policy, name)
        assert policy in ("vmap", "loop") or len(engine.fallbacks) == fallbacks, policy
        used[policy] = engine.policies
    return used


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_classifiers(kind, side):
    x, y = tokens(side), torch.tensor([0, 2, 1, 1, 0])
    options = {} if kind in ("bert", "roberta") else {"pooling": "mean"}
    policies = POLICIES if side == "right" else RULES
    assert_exact(make(kind, num_classes=3, **options), F.cross_entropy, x, y, policies)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", DECODERS)
def test_language_models(kind, tied):
    for side in ("right", "left"):
        x = tokens(side)
        policies = POLICIES if side == "right" else RULES
        used = assert_exact(make(kind, tied), WRITE, x, next_tokens(x), policies)
        tables = [p for name, p in used["ghost"].items() if name.endswith(("embed_tokens", "wte"))]
        assert tables == ["ghost"]


@pytest.mark.parametrize("train", ["lora", "bitfit", "head"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_parts(kind, train):
    if kind == "llama" and train == "bitfit":
        with pytest.raises(ValueError, match=r"no biases for model.train=bitfit: set model.train=lora"):
            make(kind, train=train, num_classes=3, pooling="mean")
        return
    model = make(kind, train=train, num_classes=3, pooling=None if kind == "bert" else "mean")
    with torch.no_grad():  # adapters start at zero
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    if train == "lora":
        assert any("lora_A" in name for name, p in model.named_parameters() if p.requires_grad)
    assert (
        sum(p.numel() for p in model.parameters() if p.requires_grad) < sum(p.numel() for p in model.parameters()) / 2
    )
    assert_exact(model, F.cross_entropy, tokens(), torch.tensor([0, 2, 1, 1, 0]))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch.compile, by which transformers calls them
def test_ternary_layers_go_example_by_example():
    """BitNet's layers round weights and inputs with gradients of their own, which vmap does not know."""
    from transformers.integrations.bitnet import AutoBitLinear

    model = make("bitnet")
    for layer in model.network.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, torch.nn.Linear):
                    ternary = AutoBitLinear(
                        child.in_features, child.out_features, bias=False, online_quant=True
                    ).double()
                    ternary.weight.data.copy_(child.weight.data)
                    setattr(part, name, ternary)
    x = tokens()
    assert_exact(model, WRITE, x, next_tokens(x), policies=["auto"], fallbacks=14)


def test_validation_accepts_them():
    x = tokens()
    model = make("llama")
    engine = GradSampler(model, WRITE, "ghost")
    validate(engine, x, next_tokens(x))
    assert engine.validated and engine.fallbacks == []


@pytest.mark.parametrize("memory", [None, 10_000], ids=["ghost", "by size"])
def test_shared_norms_count_every_pair_of_calls(memory):
    """A tied weight whose norms ignore what its calls have in common is refused, also one shared for its size."""
    from dpopt.grad_sample import hooks

    true, x, model = hooks.shared_ghost_norm, tokens(), make("gpt2")
    hooks.shared_ghost_norm = lambda reads: sum(true([read]) for read in reads)
    try:
        engine = GradSampler(model, WRITE, "ghost" if memory is None else "auto", memory)
        with pytest.raises(ValueError, match="gradient"):
            validate(engine, x, next_tokens(x))
    finally:
        hooks.shared_ghost_norm = true


class Leaf(torch.nn.Module):
    """Holds a weight under another name."""

    def __init__(self, weight):
        super().__init__()
        self.matrix = weight

    def forward(self, x):
        return x @ self.matrix.T


class PartOfATie(torch.nn.Module):
    """A weight of two calls that a layer without a rule has, too; or two layers with one bias, one called twice."""

    def __init__(self, kind):
        super().__init__()
        self.table, self.one, self.two = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.norm = torch.nn.LayerNorm(8)
        if kind == "leaf":
            self.two = Leaf(self.one.weight)
        elif kind == "bias":
            self.two.bias = self.one.bias
        else:
            self.norm.bias = self.one.bias

    def forward(self, x):
        h = self.one(torch.tanh(self.one(self.table(x))))
        return self.norm(self.two(torch.tanh(h))).mean(1)


@pytest.mark.parametrize("kind", ["leaf", "bias", "norm"])
def test_a_part_of_a_tie_is_not_taken_alone(kind):
    """What a unit outside of a group does with one of its parameters belongs to the norm."""
    torch.manual_seed(0)
    model, x, y = PartOfATie(kind).double(), torch.randint(0, 50, (5, 1, 6)), torch.arange(5)
    norms = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(v), t[None]), list(model.parameters()))]
        )
        for v, t in zip(x, y, strict=True)
    ]
    for policy, memory in (("ghost", None), ("auto", 0)):
        per_sample = GradSampler(model, F.cross_entropy, policy, memory)(x, y)
        torch.testing.assert_close(per_sample.norms, torch.stack([n.norm() for n in norms]), rtol=1e-10, atol=0)


def test_a_layer_called_twice():
    """The norms of a weight that one module uses several times, with its bias."""

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 8)

        def forward(self, x):
            h = self.table(x) + self.table(x.flip(1)).square()
            return self.layer(torch.tanh(self.layer(h))).mean(1)

    torch.manual_seed(0)
    x = torch.randint(0, 50, (5, 1, 6))
    used = assert_exact(Twice().double(), F.cross_entropy, x, torch.arange(5))
    assert used["ghost"] == {"table": "ghost", "layer": "ghost"}


@pytest.mark.parametrize("kind", [kind for kind in DECODERS if kind != "bitnet"])  # which has no head
def test_a_decoder_classifies_the_last_token_not_a_pad(kind):
    """Its own head finds the last token by the network's padding, whatever that is."""
    torch.manual_seed(0)
    model = transformer(config={**CONFIGS[kind], "pad_token_id": 7, "eos_token_id": 7}, num_classes=3).double().eval()
    right = tokens()[:, 0]
    for i, length in enumerate(LENGTHS):
        torch.testing.assert_close(model(right[i : i + 1, :length])[0], model(right)[i], rtol=1e-9, atol=1e-12)


def test_adapters_that_begin_at_zero_are_not_examined_in_every_batch():
    """Half of their gradients are zero at first, which hides where examples lie; nothing is measured on a guess."""
    model, x, y = make("bert", train="lora", lora={"rank": 300}, num_classes=3), tokens(), torch.tensor([0, 2, 1, 1, 0])
    engine, forwards = GradSampler(model, F.cross_entropy), []
    engine(x, y)
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    engine(x, y)
    assert len(forwards) == 1


def test_what_reads_both_ways_cannot_write():
    with pytest.raises(ValueError, match=r"sees the tokens that it should write: choose a model that writes text"):
        make("bert")


def test_a_pad_changes_nothing():
    """A text has the same logits alone, before padding and behind it."""
    for kind in CONFIGS:
        model = make(kind, **({"num_classes": 3, "pooling": "mean"} if kind in ("bert", "roberta") else {}))
        right, left = tokens()[:, 0], tokens("left")[:, 0]
        for i, length in enumerate(LENGTHS):
            alone = model(right[i : i + 1, :length])
            found = [model(right)[i], model(left)[i]]
            if alone.ndim == 3:
                found = [found[0][:length], found[1][9 - length :]]
            for one, other in pairwise([alone[0], *found]):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
