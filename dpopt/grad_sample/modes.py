"""Evaluate a model without disturbing it: the mode of every submodule comes back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; restore the mode of each submodule afterwards.

    `model.train(was_training)` would put a frozen BatchNorm, which is in eval mode for good, into train mode.
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
