"""What a model returns for a batch: split by example for the loss, and compared with what it returns otherwise."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from dpopt.grad_sample.fallback import LossFn, output_tensors
from dpopt.grad_sample.layout import close, rounding_of_outputs


def example_losses(loss_fn: LossFn, outputs: Any, targets: Tensor, examples: int, views: int) -> Tensor:
    """Take the mean loss of each example over its views, (B,).

    Args:
        loss_fn: (outputs (K, …), targets (K, …)) → a scalar.
        outputs: of the model for B·K views: a tensor, a nest of them, or a dataclass of them.
        targets: (B, …).
        examples: B.
        views: K.
    """
    targets = targets[:, None].expand(examples, views, *targets.shape[1:])
    if isinstance(outputs, Tensor):
        return vmap(loss_fn)(outputs.unflatten(0, (examples, views)), targets)
    leaves, rebuild = _opened(outputs)
    divided = [isinstance(x, Tensor) and x.ndim > 0 and len(x) == examples * views for x in leaves]
    leaves = [x.unflatten(0, (examples, views)) if one else x for x, one in zip(leaves, divided, strict=True)]

    def loss(target: Tensor, *leaves: Any) -> Tensor:
        return loss_fn(rebuild(list(leaves)), target)

    return vmap(loss, in_dims=(0, *(0 if one else None for one in divided)))(targets, *leaves)


def _opened(outputs: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        kind = type(outputs)
        leaves, form = tree_flatten({field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)})
        return leaves, lambda leaves: kind(**tree_unflatten(leaves, form))
    leaves, form = tree_flatten(outputs)
    return leaves, lambda leaves: tree_unflatten(leaves, form)


def same_outputs(one: Any, other: Any, coarse: bool) -> bool:
    """Whether two forward passes returned the same, but for rounding.

    Args:
        one: returned by a model.
        other: returned by a model.
        coarse: whether they were computed in 16 bits somewhere.
    """
    lists = [output_tensors(_opened(x)[0]) for x in (one, other)]
    return len(lists[0]) == len(lists[1]) and all(
        close(x, y, rounding_of_outputs(y.dtype, coarse)) for x, y in zip(*lists, strict=True)
    )


def examples_are_independent(forward: Callable[[Tensor], Any], inputs: Tensor, coarse: bool) -> bool:
    """Whether a model does with views (N, …) what it does with each alone.

    Args:
        forward: the model.
        inputs: views (N, …).
        coarse: whether outputs are computed in 16 bits somewhere.
    """
    with torch.no_grad():
        together = output_tensors(_opened(forward(inputs))[0])
        alone = [output_tensors(_opened(forward(x[None]))[0]) for x in inputs]
    for i, rows in enumerate(together):
        expected = [one[i] for one in alone]
        if rows.ndim == 0 or len(rows) != len(inputs) or any(x.ndim == 0 or len(x) != 1 for x in expected):
            continue  # no rows: the loss sees what it sees
        if not close(rows, torch.cat(expected), rounding_of_outputs(rows.dtype, coarse)):
            return False
    return True
