"""What is worth a kernel: a plain PyTorch reference and, for GPUs, a Triton kernel that must equal it."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpopt.optim.blocks import Table


def use_triton(table: Table, kernels: str) -> bool:
    """Whether the Triton kernels take this table; says once why not where they are expected.

    Raises:
        ValueError: when they are asked for by name and cannot run.
    """
    device = table.layout.device.type
    if kernels == "torch" or (kernels == "auto" and device != "cuda"):
        return False
    if importlib.util.find_spec("triton") is None:
        reason = "the package triton is missing (pip install triton)"
    elif device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        reason = f"the parameters are on {device}; TRITON_INTERPRET=1 runs the kernels there, for tests"
    else:
        from dpopt.kernels.microadam_triton import supports

        reason = supports(table)
        if not reason:
            return True
        reason = f"they do not take {reason}"
    if kernels == "triton":
        raise ValueError(f"kernels=triton cannot be used: {reason}; use kernels=auto or torch")
    _warn_once(reason)
    return False


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"MicroAdam runs without its Triton kernels, several times slower: {reason}", stacklevel=2)
