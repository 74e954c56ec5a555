"""Parameters as rows of blocks, with their state in tensors that they share, so that one call serves many of them.

Every parameter fills whole blocks, its last one padded with zeros. The state of parameter p is a set of rows of the
shared tensors, and `optimizer.state[p]` holds views of them: it saves, loads and counts like any other state.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 4096  # values; a multiple of every sensible bucket, and small enough for 16-bit positions
_RUN = 1 << 20  # values per call: 4 MB of float32; fewer cost more in calls than they save in cache misses


class Layout(NamedTuple):
    """What parameters must share to lie in one packed state.

    Attributes:
        size: values per block.
        k: values selected per block.
        bits: of the error feedback; 32 leaves it and the window's values unquantized.
        bucket: values per quantization bucket.
        window: rows of the window; None for dense moments.
        feedback: whether what is not selected is kept.
        dtype: of the arithmetic.
        device: of parameter and state.
    """

    size: int
    k: int
    bits: int
    bucket: int
    window: int | None
    feedback: bool
    dtype: torch.dtype
    device: torch.device


def layout(parameter: Tensor, group: dict[str, Any]) -> Layout:
    """How a parameter is cut into blocks under a group's options."""
    count, bits, window = parameter.numel(), group["bits"], group["window"]
    dtype = torch.float64 if parameter.dtype == torch.float64 and bits == 32 else torch.float32
    if count <= group["dense_size"]:
        return Layout(1, 1, 32, 1, None, False, dtype, parameter.device)
    whole = -(-count // 8) * 8  # a bucket need not be longer than its tensor
    bucket = min(group["bucket"], whole if group["scope"] == "tensor" else max(BLOCK, whole)) if bits < 32 else 1
    if group["scope"] == "tensor":
        size, k = -(-count // bucket) * bucket, math.ceil(group["density"] * count)
    else:
        size = bucket * max(1, round(BLOCK / bucket))
        k = math.ceil(group["density"] * size)
    feedback = group["error_feedback"] and k < size
    return Layout(size, k, bits, bucket, window, feedback, dtype, parameter.device)


class Span(NamedTuple):
    """Rows [row, row + rows) of a packed state, which hold values [begin, end) of a parameter."""

    parameter: Tensor
    row: int
    rows: int
    begin: int
    end: int


@dataclass
class PackedState:
    """Parameters of one layout and their state.

    Attributes:
        layout: of all of them.
        first: the first row of each parameter.
        tensors: the state, each of shape (rows, …).
        launch: what a kernel keeps from one launch to the next.
    """

    layout: Layout
    first: dict[Tensor, int]
    tensors: dict[str, Tensor]
    launch: dict[Any, Any] = field(default_factory=dict)
    _scratch: Tensor | None = None

    @classmethod
    def of(cls, layout: Layout, parameters: list[Tensor]) -> "PackedState":
        """Make a state of zeros."""
        first, rows = {}, 0
        for parameter in parameters:
            first[parameter] = rows
            rows += -(-parameter.numel() // layout.size)
        size, window = layout.size, layout.window
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if window is None:
            shapes["exp_avg"] = shapes["exp_avg_sq"] = ((size,), layout.dtype)
        else:
            shapes["indices"] = ((window, layout.k), torch.int16 if size <= 1 << 15 else torch.int32)
            shapes["values"] = ((window, layout.k), torch.bfloat16 if layout.bits < 32 else layout.dtype)
        if layout.feedback and layout.bits < 32:
            shapes["feedback"] = ((size * layout.bits // 8,), torch.uint8)
            shapes["ranges"] = ((size // layout.bucket, 2), torch.bfloat16)
        elif layout.feedback:
            shapes["feedback"] = ((size,), layout.dtype)
        tensors = {
            name: torch.zeros(rows, *shape, dtype=dtype, device=layout.device)
            for name, (shape, dtype) in shapes.items()
        }
        return cls(layout, first, tensors)

    def rows(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state of one parameter, as views."""
        start, count = self.first[parameter], self.count(parameter)
        return {name: tensor[start : start + count] for name, tensor in self.tensors.items()}

    def count(self, parameter: Tensor) -> int:
        """Count the blocks of a parameter."""
        return -(-parameter.numel() // self.layout.size)

    @property
    def limit(self) -> int:
        """Blocks of a run at most."""
        return max(1, _RUN // self.layout.size)

    def scratch(self, rows: int) -> Tensor:
        """Room for a run, (2, rows, size), kept: fresh memory costs more than most operations."""
        form = self.layout
        if self._scratch is None:
            most = min(self.limit, len(next(iter(self.tensors.values()))))
            self._scratch = torch.empty(2 * most * form.size, dtype=form.dtype, device=form.device)
        return self._scratch[: 2 * rows * form.size].view(2, rows, form.size)

    def runs(self, active: dict[Tensor, int]) -> Iterator[tuple[int, list[Span]]]:
        """Consecutive rows of parameters at the same step, as (step, pieces), few enough rows to stay in the cache.

        Args:
            active: the step of each parameter that takes part.
        """
        size, limit = self.layout.size, self.limit
        spans: list[Span] = []
        step, room = 0, self.limit
        for parameter, row in self.first.items():
            if spans and active.get(parameter) != step:
                yield step, spans
                spans, room = [], limit
            if parameter not in active:
                continue
            step, begin = active[parameter], 0
            while begin < parameter.numel():
                rows = min(room, -(-(parameter.numel() - begin) // size))
                end = min(parameter.numel(), begin + rows * size)
                spans.append(Span(parameter, row, rows, begin, end))
                row, begin, room = row + rows, end, room - rows
                if room == 0:
                    yield step, spans
                    spans, room = [], limit
        if spans:
            yield step, spans
