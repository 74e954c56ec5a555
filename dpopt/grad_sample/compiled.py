"""Per-sample gradients as one compiled graph: forward, backward and rules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from dpopt.grad_sample.choices import Choices
from dpopt.grad_sample.hooks import count_norms
from dpopt.grad_sample.norms import Gradients
from dpopt.grad_sample.per_sample import PerSampleGradients

Sample = Callable[[Gradients, Tensor, Tensor], PerSampleGradients]


class _Sampled(nn.Module):
    """A model whose forward takes its per-sample gradients, so that rules read the parameters of the graph."""

    def __init__(self, model: nn.Module, sample: Sample) -> None:
        super().__init__()
        self.model, self.sample = model, sample

    def forward(self, values: Gradients, inputs: Tensor, targets: Tensor) -> PerSampleGradients:
        return self.sample(values, inputs, targets)


def compile_sampler(
    sample: Sample, model: nn.Module, inputs: Tensor, targets: Tensor, choices: Choices | None
) -> Sample:
    """Trace `sample` once through its backward and hooks, and compile it for these shapes.

    Parameters and buffers are inputs of the graph, which hence sees those of the day. Norms are no part of it: a
    compiler would take them before it rounds to bfloat16 what it returns, and what is summed could be longer.

    Args:
        sample: (trainable parameters by name, inputs, targets) → per-sample gradients of the model.
        model: its parameters and buffers are read at every call.
        inputs: (B, K, …).
        targets: (B, …).
        choices: what is fastest, for rules that can do it in several ways.

    Raises:
        ValueError: for a model that cannot be compiled.
    """
    traced: list[Any] = []
    whole = _Sampled(model, sample)
    trained = {name: p.requires_grad for name, p in whole.named_parameters()}

    def state() -> Gradients:
        return {name: t.detach() for named in (whole.named_parameters(), whole.named_buffers()) for name, t in named}

    names = list(state())

    def flat(*tensors: Tensor) -> tuple[Any, ...]:
        values = dict(zip(names, tensors, strict=False))
        own = {name: t.detach().requires_grad_(trained.get(name, False)) for name, t in values.items()}
        wanted = {name.removeprefix("model."): values[name] for name, needed in trained.items() if needed}
        per_sample = functional_call(whole, own, (wanted, *tensors[len(names) :]))
        leaves, structure = tree_flatten(per_sample.tensors())
        traced[:] = per_sample.form(), structure
        return tuple(leaves)

    example: list[Any] = [*state().values(), inputs, targets]
    try:
        graph = make_fx(flat, tracing_mode="fake")(*example)  # types as the compiler sees them
        with torch.no_grad():
            compiled = torch._inductor.compile(graph, example)  # what has been traced needs no Dynamo
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ValueError(
            f"the gradients of {type(model).__name__} cannot be compiled ({type(error).__name__}: {reason}): "
            "train with compile=false"
        ) from error
    form, structure = traced

    def run(values: Gradients, inputs: Tensor, targets: Tensor) -> PerSampleGradients:
        own = {**state(), **{f"model.{name}": value for name, value in values.items()}}
        with torch.no_grad():
            found = compiled(*own.values(), inputs, targets)
        per_sample = form.filled(tree_unflatten(list(found), structure))
        count_norms(per_sample, choices)
        return per_sample.finish(per_sample.losses)

    return run
