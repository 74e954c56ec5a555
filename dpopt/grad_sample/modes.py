"""How a model runs: in eval mode, without disturbing it, and in which precision."""

import functools
import platform
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
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


def autocast(model: nn.Module, precision: str) -> AbstractContextManager[Any]:
    """Make the context of forward passes: autocast for `bf16`, otherwise none.

    Warns once of a processor on which bf16 is slower than fp32.
    """
    if precision != "bf16":
        return nullcontext()
    kind = next(model.parameters()).device.type
    if kind == "cpu" and emulates_bf16():
        _warn_once()
    return torch.autocast(kind, dtype=torch.bfloat16)


def emulates_bf16() -> bool:
    """Say whether this processor has no instructions for bf16, or is kept from using them."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return True
    return platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported()


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "bf16 is slower than fp32 on a processor without instructions for it: set precision=fp32", stacklevel=3
    )
