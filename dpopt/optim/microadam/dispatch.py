"""What is worth a kernel: a plain PyTorch reference, in C for a CPU and in Triton for a GPU; all give the same bits."""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpopt.optim.microadam.packing import PackedState

_warned: set[str] = set()


def choose(packed: PackedState, kernels: str) -> str:
    """Choose `triton`, `c` or `torch` (the reference). Warns once if the expected backend is unavailable.

    Args:
        packed: parameters and their state.
        kernels: one of these, or `auto`.

    Raises:
        ValueError: when kernels are asked for by name and cannot run.
    """
    device = packed.layout.device.type
    wanted = {"cuda": "triton", "cpu": "c"}.get(device, "torch") if kernels == "auto" else kernels
    if wanted == "torch":
        return "torch"
    reason, expected = _without_triton(packed) if wanted == "triton" else _without_c(packed)
    if not reason:
        return wanted
    if kernels != "auto":
        raise ValueError(f"kernels={kernels} cannot be used: {reason}; use kernels=auto or torch")
    if expected:
        kind = re.sub(r"\d[\d,]*", "n", reason)  # once for blocks of all sizes
        if kind not in _warned:
            _warned.add(kind)
            warnings.warn(f"MicroAdam runs without its {wanted} kernels, several times slower: {reason}", stacklevel=2)
    return "torch"


def _without_triton(packed: PackedState) -> tuple[str, bool]:
    """Say why Triton cannot step this state, empty if it can; and whether a user would have expected it to."""
    device = packed.layout.device.type
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing (pip install triton)", True
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the parameters are on {device}; TRITON_INTERPRET=1 runs the kernels there, for tests", True
    from dpopt.optim.microadam.triton_kernels import supports

    reason = supports(packed)
    return reason and f"they do not take {reason}", True


def _without_c(packed: PackedState) -> tuple[str, bool]:
    """Say why C cannot step this state, as `_without_triton` does."""
    from dpopt.optim.microadam.cpu import library, supports

    if packed.layout.device.type != "cpu":
        return f"the parameters are on {packed.layout.device.type}", True
    reason = supports(packed)
    if reason:
        return f"they do not take {reason}", False
    try:
        library()
    except OSError as error:
        return str(error), True
    return "", True
