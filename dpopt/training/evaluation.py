"""A model's outputs on examples, and its metrics over all of them."""

from typing import Any

import torch
from torch import Tensor, nn

from dpopt.data.sources import Source
from dpopt.grad_sample.modes import autocast, eval_mode


def outputs_of(model: nn.Module, inputs: Tensor, precision: str) -> Tensor:
    """Return the outputs of a batch of inputs, in the model's dtype or under autocast."""
    reference = next(model.parameters())
    with autocast(model, precision):
        outputs: Tensor = model(inputs.to(reference.dtype) if inputs.is_floating_point() else inputs)
    return outputs


@torch.no_grad()
def evaluate(
    model: nn.Module, task: Any, source: Source, precision: str = "fp32", prefix: str = ""
) -> dict[str, float]:
    """Average the task's metrics over all examples, in eval mode.

    Args:
        model: what is evaluated.
        task: with `metric_sums`.
        source: the examples.
        precision: `bf16` for autocast.
        prefix: of the names of the metrics.

    Returns:
        `{prefix}accuracy` in [0, 1] and `{prefix}loss` in nats, for classification.
    """
    sums: dict[str, float] = {}
    count = 0
    with eval_mode(model):
        for inputs, targets in source.plain(task.at_once):
            outputs = outputs_of(model, inputs, precision)
            for name, value in task.metric_sums(outputs, targets).items():
                sums[name] = sums.get(name, 0.0) + value
            count += len(targets)
    means = {name: value / max(count, 1) for name, value in sums.items()}
    return {f"{prefix}{name}": value for name, value in (means | task.summary(means)).items()}
