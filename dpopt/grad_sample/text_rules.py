"""Rules for the layers of Hugging Face's transformers that torch lacks, and norms of weights that several calls use.

Their classes are told by name, so that nothing is imported; `validate` compares what a rule gives with autograd.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpopt.grad_sample.norms import Gradients, at_once, gram, never_short, position_norms, sum_wide

Read = tuple[nn.Module, Tensor, Tensor]  # a layer, what it read (B, …) and the gradient of its output (B, …)


def transposed_linear(module: Any, a: Tensor, g: Tensor) -> Gradients:
    """Take gradients of GPT-2's `Conv1D`, a linear layer whose weight is (in, out)."""
    a, g = a.flatten(1, -2), g.flatten(1, -2)
    return {"weight": torch.bmm(a.mT, g), "bias": sum_wide(g, 1)}


def transposed_linear_ghost_norm(module: Any, a: Tensor, g: Tensor) -> Tensor:
    """Take squared norms (B,) as of a linear layer with a bias."""
    return position_norms(a.flatten(1, -2), g.flatten(1, -2), bias=True)


def root_mean_square_norm(module: Any, a: Tensor, g: Tensor) -> Gradients:
    """Take gradients of Llama's norm and its copies, which normalize in float32 in a model of any type."""
    wide = a.float()
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return {"weight": sum_wide((normalized.to(a.dtype) * g).flatten(1, -2), 1)}


def shifted_positions(module: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Tensor | None:
    """Return the rows that OPT's embedding of positions looks up; None where it derives them from a mask."""
    given = dict(zip(("attention_mask", "cache_length", "position_ids"), arguments, strict=False)) | dict(keywords)
    positions: Tensor | None = given.get("position_ids")
    return None if positions is None else positions + module.offset


def kind_of(module: nn.Module) -> str:
    """Name the rule of a layer of transformers; empty for none."""
    kind = type(module)
    if not kind.__module__.startswith("transformers."):
        return ""
    if kind.__name__ == "OPTLearnedPositionalEmbedding":
        return "positions"
    if kind.__name__ == "Conv1D":
        return "transposed"
    own = [name for name, _ in module.named_parameters()]
    return (
        "rms" if kind.__name__.endswith("RMSNorm") and own == ["weight"] and hasattr(module, "variance_epsilon") else ""
    )


def shared_ghost_norm(reads: Sequence[Read]) -> Tensor:
    """Take squared norms (B,), in float64, of the gradient of one weight (V, n) that several calls use.

    Read as sums of outer products over positions, gradients of calls have inner products that need no gradient:

        linear, linear        Σ (a_s·a_t + bias)(g_s·g_t)
        embedding, embedding  Σ [token_s = token_t] g_s·g_t
        linear, embedding     Σ (a_s·g_t) g_s[token_t]

    Args:
        reads: calls of linear layers, which share a bias too or have none, and of embeddings.
    """
    linear = [(a.flatten(1, -2), g.flatten(1, -2)) for module, a, g in reads if isinstance(module, nn.Linear)]
    looked_up = [
        (a.flatten(1), without_padding(m, a, g).flatten(1, -2)) for m, a, g in reads if isinstance(m, nn.Embedding)
    ]
    bias = any(getattr(module, "bias", None) is not None for module, _, _ in reads)
    a, g = (torch.cat(parts, 1) for parts in zip(*linear, strict=True)) if linear else (None, None)
    tokens, e = (torch.cat(parts, 1) for parts in zip(*looked_up, strict=True)) if looked_up else (None, None)
    like = e if g is None else g
    assert like is not None
    count = at_once(like, 2 * like[0].numel())
    squares, lengths = [], []
    for i in range(0, len(like), count):
        at = slice(i, i + count)
        square, length = torch.zeros(2, len(like[at]), dtype=torch.float64, device=like.device)
        if a is not None and g is not None:
            of_linear = gram(a[at], g[at], bias)
            square, length = square + of_linear[0], length + of_linear[1]
        if tokens is not None and e is not None:
            equal = tokens[at, :, None] == tokens[at, None]
            products = e[at].double() @ e[at].double().mT
            square += (products * equal).flatten(1).sum(1)
            length += products.diagonal(dim1=-2, dim2=-1).sqrt().sum(1)
        if a is not None and g is not None and tokens is not None and e is not None:
            chosen = g[at].gather(2, tokens[at, None].expand(-1, g.shape[1], -1))
            square += 2 * ((a[at].double() @ e[at].double().mT) * chosen).flatten(1).sum(1)
        squares.append(square)
        lengths.append(length)
    positions = sum(g.shape[1:-1].numel() for _, _, g in reads)
    return never_short(torch.cat(squares), torch.cat(lengths), positions, like.dtype)


def without_padding(module: nn.Embedding | nn.EmbeddingBag, a: Tensor, g: Tensor) -> Tensor:
    """Output gradients (…, n) of an embedding of tokens (…), zero for its padding."""
    return g if module.padding_idx is None else g.masked_fill((a == module.padding_idx)[..., None], 0.0)
