"""Per-sample gradients as one compiled graph: forward, backward and rules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from dpopt.grad_sample.norms import Gradients
from dpopt.grad_sample.per_sample import PerSampleGradients

Sample = Callable[[Gradients, Tensor, Tensor], PerSampleGradients]


def compile_sampler(sample: Sample, values: Gradients, inputs: Tensor, targets: Tensor) -> Sample:
    """Trace `sample` once through its backward and hooks, and compile it for these shapes.

    Args:
        sample: (parameters by name, inputs, targets) → per-sample gradients.
        values: parameters, by name.
        inputs: (B, K, …).
        targets: (B, …).
    """
    traced: list[Any] = []

    def flat(*tensors: Tensor) -> tuple[Any, ...]:
        per_sample = sample(dict(zip(values, tensors, strict=False)), tensors[-2], tensors[-1])
        leaves, structure = tree_flatten(per_sample.tensors())
        traced[:] = per_sample.form(), structure
        return tuple(leaves)

    example: list[Any] = [*values.values(), inputs, targets]
    compiled = torch._inductor.compile(make_fx(flat)(*example), example)  # what has been traced needs no Dynamo
    form, structure = traced

    def run(values: Gradients, inputs: Tensor, targets: Tensor) -> PerSampleGradients:
        return form.filled(tree_unflatten(list(compiled(*values.values(), inputs, targets)), structure))

    return run
