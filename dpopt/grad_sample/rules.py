"""Per-layer rules: how a layer's per-example gradients follow from what went in and what came back.

A rule is a function of the layer, its input and the gradient with respect to its output, both split into examples and
their views, (B, K, …), and returns the gradients of the layer's own parameters, (B, *shape), summed over views and
positions. Read with B = 1, a whole batch as the views of one example, it is the ordinary gradient: so one function
serves for storing per-example gradients and for summing scaled ones. docs/layer_rule.md adds one.

Layers without a rule are differentiated by `torch.func.vmap` or in a loop, one layer at a time
(`dpopt.grad_sample.fallback`).
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpopt.grad_sample.conv import conv, conv_ghost_norm, conv_norms_on_chip, conv_sum_on_chip, formed_on_chip
from dpopt.grad_sample.norms import Gradients, kernels, never_short, position_norms, sum_wide
from dpopt.grad_sample.standardized_conv import (
    standardized_conv,
    standardized_ghost_norm,
    standardized_norms,
    standardized_norms_on_chip,
    standardized_pull_back,
    standardized_sum_on_chip,
)
from dpopt.grad_sample.text_rules import (
    kind_of,
    root_mean_square_norm,
    shifted_positions,
    transposed_linear,
    transposed_linear_ghost_norm,
    without_padding,
)
from dpopt.models.layers import StandardizedConv2d


@dataclass(frozen=True)
class OnChip:
    """A kernel that forms a layer's gradients twice, for their norms and for their sum, and writes none to memory.

    Attributes:
        takes: (layer, output gradient) → whether there is one.
        square_norms: (layer, input, output gradient) → squared norms (B,) of what is trained, in float64.
        weighted_sum: (layer, input, output gradient, weights (B,)) → Σ weights[i]·gradient by parameter name, added up
            in float64; an example of weight zero may hold NaN.
    """

    takes: Callable[[Any, Tensor], bool]
    square_norms: Callable[[Any, Tensor, Tensor], Tensor]
    weighted_sum: Callable[[Any, Tensor, Tensor, Tensor], Gradients]


@dataclass(frozen=True)
class Rule:
    """What the engine knows about one kind of layer.

    Attributes:
        gradients: (layer, input (B, K, …), output gradient (B, K, …)) → the gradients (B, *shape) by parameter name,
            in any memory layout whose outermost dimension is B.
        ghost_norm: the same arguments → the squared norms (B,) of all gradients of the layer together, in float64,
            without the gradients; None where that is not worth it.
        square_norms: (layer, gradients, scale by parameter name or None) → squared norms (B,) of the (scaled) gradients
            of the parameters, in float64, where `gradients` has, as "weight", the gradient of a function of the
            parameters; then `pull_back` is the chain rule through that function.
        pull_back: (layer, these gradients, of every example or summed) → the gradients of the parameters themselves.
        scaled_ghost_norm: `ghost_norm` of scaled gradients: (layer, input, output gradient, scale by parameter name) →
            (B,), at one position of one view; None where the gradients have to be formed.
        on_chip: what recomputes gradients faster than `gradients`; None where nothing does.
        positionwise: whether the layer treats all dimensions before its features alike, so that examples may lie in
            any of them.
        reads: (layer, arguments, keywords) → the one tensor that the layer reads, where not all arguments matter; None
            where they do.
    """

    gradients: Callable[[Any, Any, Tensor], Gradients]
    ghost_norm: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    square_norms: Callable[[Any, Gradients, Gradients | None], Tensor] | None = None
    pull_back: Callable[[Any, Gradients], Gradients] | None = None
    scaled_ghost_norm: Callable[[Any, Tensor, Tensor, Gradients], Tensor] | None = None
    on_chip: OnChip | None = None
    positionwise: bool = False
    reads: Callable[[Any, Sequence[Any], Mapping[str, Any]], Tensor | None] | None = None


# Linear


def linear(module: nn.Linear, a: Tensor, g: Tensor) -> Gradients:
    """Any number of positions between example and feature."""
    a, g = a.flatten(1, -2), g.flatten(1, -2)
    found = {"bias": sum_wide(g, 1)}
    if module.weight.requires_grad:
        found["weight"] = torch.bmm(g.mT, a)
    return found


def linear_ghost_norm(module: nn.Linear, a: Tensor, g: Tensor) -> Tensor:
    """Σ (a_s·a_t + 1)(g_s·g_t) over pairs of positions; the 1 is the bias."""
    return position_norms(a.flatten(1, -2), g.flatten(1, -2), module.bias is not None)


def linear_scaled_ghost_norm(module: nn.Linear, a: Tensor, g: Tensor, scale: Gradients) -> Tensor:
    """Σ_o g_o²·(Σ_i s_oi²·a_i² + s_o²) of a weight's scale s_oi and a bias's s_o; squares in float64, as norms are."""
    a, g = (x.flatten(1).to(torch.float64, copy=True).square_() for x in (a, g))
    by_output = a @ scale["weight"].double().square().mT
    if module.bias is not None:
        by_output += scale["bias"].double().square()
    return (g * by_output).sum(1)


# Normalization


def group_norm(module: nn.GroupNorm, a: Tensor, g: Tensor) -> Gradients:
    """Every channel of every view as a channel of one big example: torch's own backward then keeps them apart."""
    examples, views, channels = a.shape[:3]
    if a.is_cuda and a.dtype != torch.float64 and (on_gpu := kernels(a)) is not None:
        x, y = (t.reshape(examples * views, channels, -1) for t in (a, g))
        found = on_gpu.group_norm_gradients(x, y, module.num_groups, module.eps)
        weight, bias = (t.view(examples, views, channels).sum(1) for t in found)
        return {"weight": weight, "bias": bias}
    a, g = a.reshape(1, examples * views * channels, -1), g.reshape(1, examples * views * channels, -1)
    numbers = (1, a.shape[1], a.shape[2], examples * views * module.num_groups)
    _, mean, rstd = torch.ops.aten.native_group_norm(a, None, None, *numbers, module.eps)
    ones = a.new_ones(a.shape[1])  # torch 2.11 wants a weight; without one the bits are the same
    found = torch.ops.aten.native_group_norm_backward(g, a, mean, rstd, ones, *numbers, [False, True, True])
    weight, bias = (x.view(examples, views, channels).sum(1) for x in found[1:])
    return {"weight": weight, "bias": bias}


def layer_norm(module: nn.LayerNorm, a: Tensor, g: Tensor) -> Gradients:
    """Over any number of positions."""
    shape = tuple(module.normalized_shape)
    return _affine(F.layer_norm(a, shape, None, None, module.eps), g, len(shape))


def rms_norm(module: nn.RMSNorm, a: Tensor, g: Tensor) -> Gradients:
    """Over any number of positions."""
    shape = tuple(module.normalized_shape)
    return _affine(F.rms_norm(a, shape, None, module.eps), g, len(shape))


def _affine(normalized: Tensor, g: Tensor, dims: int) -> Gradients:
    products, g = (x.flatten(1, -1 - dims) for x in (normalized * g, g))
    return {"weight": sum_wide(products, 1), "bias": sum_wide(g, 1)}


# Embedding


def embedding(module: nn.Embedding | nn.EmbeddingBag, a: Tensor, g: Tensor) -> Gradients:
    """Compute a dense gradient for every example; `embedding_ghost_norm` needs none."""
    examples, rows = len(a), module.num_embeddings
    places = (a.flatten(1) + rows * torch.arange(examples, device=a.device)[:, None]).flatten()
    found = g.new_zeros(examples * rows, g.shape[-1])
    found.index_add_(0, places, without_padding(module, a, g).flatten(0, -2))
    return {"weight": found.view(examples, rows, -1)}


def embedding_ghost_norm(module: nn.Embedding, a: Tensor, g: Tensor) -> Tensor:
    """Σ g_s·g_t over pairs of positions with the same token."""
    g, tokens, dtype = without_padding(module, a, g).flatten(1, -2).double(), a.flatten(1), g.dtype
    products = g @ g.mT
    square = (products * (tokens[:, :, None] == tokens[:, None])).flatten(1).sum(1)
    return never_short(square, products.diagonal(dim1=-2, dim2=-1).sqrt().sum(1), g.shape[1], dtype)


def embedding_bag(module: nn.EmbeddingBag, a: Tensor, g: Tensor) -> Gradients:
    """Bags of one length, (B, K, T): what comes back goes to every token, or its share where the mean is taken."""
    kept = torch.ones_like(a, dtype=g.dtype) if module.padding_idx is None else (a != module.padding_idx).to(g.dtype)
    if module.mode == "mean":
        kept = kept / kept.sum(-1, keepdim=True).clamp(min=1)
    return embedding(module, a, g[..., None, :] * kept[..., None])


# Anything else


def _none(module: nn.Module, a: Tensor, g: Tensor) -> Gradients:
    raise NotImplementedError("a layer without a rule is differentiated by dpopt.grad_sample.fallback")


BY_VMAP = Rule(_none)
_CONV = Rule(conv, conv_ghost_norm, on_chip=OnChip(formed_on_chip, conv_norms_on_chip, conv_sum_on_chip))
RULES: dict[type, Rule] = {
    nn.Linear: Rule(linear, linear_ghost_norm, scaled_ghost_norm=linear_scaled_ghost_norm, positionwise=True),
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    StandardizedConv2d: Rule(
        *(standardized_conv, standardized_ghost_norm, standardized_norms, standardized_pull_back),
        on_chip=OnChip(formed_on_chip, standardized_norms_on_chip, standardized_sum_on_chip),
    ),
    nn.GroupNorm: Rule(group_norm),
    nn.LayerNorm: Rule(layer_norm, positionwise=True),
    nn.RMSNorm: Rule(rms_norm, positionwise=True),
    nn.Embedding: Rule(embedding, embedding_ghost_norm, positionwise=True),
    nn.EmbeddingBag: Rule(embedding_bag),
}
_OF_TRANSFORMERS = {
    "transposed": Rule(transposed_linear, transposed_linear_ghost_norm, positionwise=True),
    "rms": Rule(root_mean_square_norm, positionwise=True),
    "positions": Rule(embedding, embedding_ghost_norm, positionwise=True, reads=shifted_positions),
}


def rule_for(module: nn.Module) -> Rule | None:
    """Find the rule of a layer, or None where there is none.

    The rule is its class's, or that of a class whose `forward` it inherits.
    A layer whose parameters are not where its class puts them (weight norm, parametrizations) has none.
    """
    moved = any(name.endswith(("_g", "_v", "_orig")) for name in module._parameters)
    if moved or nn.utils.parametrize.is_parametrized(module):
        return None
    if layer := kind_of(module):
        return _OF_TRANSFORMERS[layer]
    rules = {**RULES, **(_timm_rules() if "timm" in sys.modules else {})}
    for kind in type(module).__mro__:
        if kind in rules and type(module).forward is getattr(kind, "forward", None):
            odd = getattr(module, "scale_grad_by_freq", False) or getattr(module, "max_norm", None) is not None
            odd = odd or (kind is nn.EmbeddingBag and module.mode == "max")
            return None if odd or getattr(module, "_fast_norm", False) else rules[kind]
    return None


@functools.cache
def _timm_rules() -> dict[type, Rule]:
    from timm import layers

    standardized = RULES[StandardizedConv2d]
    return {
        layers.LayerNorm: RULES[nn.LayerNorm],
        layers.GroupNorm: RULES[nn.GroupNorm],
        layers.StdConv2d: standardized,
        layers.ScaledStdConv2d: standardized,
        layers.ScaledStdConv2dSame: standardized,
    }
