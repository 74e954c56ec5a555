"""Tensors in what a model returns: a tensor, or tuples, lists, dicts and dataclasses of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def tensors_in(outputs: Any) -> list[Tensor]:
    """Return the tensors of a nested output, in order."""
    found: list[Tensor] = []
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif _opens(leaf):
            found += tensors_in([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
    return found


def output_tensors(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors of a nested output, in order: those that have gradients."""
    return [x for x in tensors_in(outputs) if x.is_floating_point()]


def map_tensors(function: Callable[[Tensor], Tensor], outputs: Any) -> Any:
    """Replace each tensor of a nested output by a function of it."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if not _opens(leaf):
            return leaf
        parts = {field.name: map_tensors(function, getattr(leaf, field.name)) for field in dataclasses.fields(leaf)}
        return type(leaf)(**parts)

    return tree_map(one, outputs)


def _opens(leaf: Any) -> bool:
    return dataclasses.is_dataclass(leaf) and not isinstance(leaf, type | Mapping)
