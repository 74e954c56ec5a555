"""Norms and sums of per-example gradients on a CPU, and those of convolutions, in C."""

import ctypes
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from dpopt import native
from dpopt.grad_sample.c_library import available, library

_WORTH_A_THREAD = 1 << 18  # values
_ROOM = 1 << 24  # words of examples that are laid out at once
# w, (out, in, kh, kw), gain, how and counted, as of `standardized_square_norms`
Standardized = tuple[Tensor, Tensor | None, tuple[float, float, float], tuple[bool, bool]]


def weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """Σ weights[i]·rows[i], (n,), in float64; a row of weight zero is not read, so that it may hold NaN.

    Args:
        rows: (B, n) of float32 or bfloat16, contiguous in n.
        weights: (B,) float32.
    """
    rows, weights = _in_rows(rows), weights.contiguous()
    total = native.room(rows.shape[1], dtype=torch.float64)
    place = rows.stride(0), _narrow(rows), weights.data_ptr(), total.data_ptr()

    def work(begin: int, end: int) -> None:
        library().weighted_sum(rows.data_ptr(), len(rows), begin, end, *place)

    native.in_parts(work, len(total), _WORTH_A_THREAD // max(1, len(rows)))
    return total


def square_norms(rows: Tensor) -> Tensor:
    """‖·‖² of each row of (R, n) of float32 or bfloat16, in float64."""
    rows = _in_rows(rows)
    squares = native.room(len(rows), dtype=torch.float64)
    place = rows.shape[1], rows.stride(0), _narrow(rows), squares.data_ptr()
    native.in_parts(
        lambda begin, end: library().square_norms(rows.data_ptr(), begin, end, *place),
        len(rows),
        _WORTH_A_THREAD // max(1, rows.shape[1]),
    )
    return squares


def standardized_square_norms(
    parts: Tensor, weight: Tensor, gain: Tensor | None, how: tuple[float, float, float], counted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """‖∂/∂w‖² + ‖∂/∂gain‖² of every example, and what that is at most for such ‖G‖², (B,) float64.

    `standardized_conv` has the equations.

    Args:
        parts: G, (B, P, out, m): P pieces of every filter, each contiguous.
        weight: w, (P, out, m), contiguous.
        gain: (out,), or None for 1.
        how: floor, extra and factor: a filter is used as factor·gain·(w − mean(w))/τ, where
            τ² = max(‖w − mean(w)‖², floor) + extra.
        counted: whether ∂/∂w and ∂/∂gain are.
    """
    parts = _in_rows(parts)
    examples, pieces, out, length = parts.shape
    tables = standardize(weight, gain, how)
    constants = _addresses(tables)
    squares, lengths = native.room(2, examples, dtype=torch.float64)
    shape = pieces, out, length, *parts.stride()[:3], _narrow(parts)

    found = squares.data_ptr(), lengths.data_ptr()

    def work(begin: int, end: int) -> None:
        library().standardized_square_norms(parts.data_ptr(), begin, end, *shape, *constants, how[2], *counted, *found)

    native.in_parts(work, examples, _WORTH_A_THREAD // max(1, pieces * out * length))
    return squares, lengths


def standardize(weight: Tensor, gain: Tensor | None, how: tuple[float, float, float]) -> list[Tensor]:
    """Compute what norms need to know about filters: h, in float32, and scales, projects and twices, (out,) float64.

    Args:
        weight: w, (P, out, m), contiguous.
        gain: (out,), or None for 1.
        how: as of `standardized_square_norms`.
    """
    weight, (pieces, out, length) = _in_floats(weight), weight.shape
    tables = [native.room(out, pieces, length), *native.room(3, out, dtype=torch.float64)]
    known = None if gain is None else (gain := _in_floats(gain)).data_ptr(), pieces, out, length, *how

    def work(begin: int, end: int) -> None:
        library().standardize(weight.data_ptr(), begin, end, *known, *_addresses(tables))

    native.in_parts(work, out, _WORTH_A_THREAD // max(1, pieces * length))
    return tables


def standardized_gradients(
    gradient: Tensor, weight: Tensor, gain: Tensor | None, how: tuple[float, float, float]
) -> tuple[Tensor, Tensor]:
    """∂/∂w (out, n) and ∂/∂gain (out,), in float32, of G (out, n), of any type; w is (out, n)."""
    gradient, weight = gradient.double().contiguous(), _in_floats(weight)
    gain = None if gain is None else _in_floats(gain)
    of_weight, of_gain = torch.empty_like(weight), native.room(len(weight))
    known = None if gain is None else gain.data_ptr(), gradient.shape[1], *how, of_weight.data_ptr(), of_gain.data_ptr()

    def work(begin: int, end: int) -> None:
        library().standardized_gradients(gradient.data_ptr(), weight.data_ptr(), begin, end, *known)

    native.in_parts(work, len(gradient), _WORTH_A_THREAD // max(1, gradient.shape[1]))
    return of_weight, of_gain


def conv_weight_gradient(
    a: Tensor,
    g: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    corner: tuple[int, int],
    groups: int,
    filters: Standardized | None = None,
) -> Tensor:
    """∂/∂weight of every example, (B, out, in, kh, kw), in the type of `a`; its input is not unfolded.

    Its attribute `squares` is ‖·‖² of every example, (B,) float64, or, with standardized filters, `through` is what
    `standardized_square_norms` makes of it; what is made of it has neither.

    Args:
        a: input (B, K, in, h, w), of K views; what `convolves` takes.
        g: output gradient (B, K, out, h', w').
        kernel: (kh, kw).
        stride: (vertical, horizontal).
        dilation: (vertical, horizontal).
        corner: zeros (above, left of) the input.
        groups: 1.
        filters: what they are, if they are standardized.
    """
    form, words, narrow = _form(a, g, (kernel, stride, dilation, corner))
    through, tables = None, []
    if filters is not None:
        w, gain, how, counted = filters
        tables = standardize(w.permute(0, 2, 3, 1).flatten(1)[None], gain, how)
        through = ctypes.byref(_Through(*_addresses(tables), how[2], *counted))
    found = a.new_empty(len(a), g.shape[2], *kernel, a.shape[2])
    squares, lengths = native.room(2, len(a), dtype=torch.float64)

    def work(begin: int, end: int) -> None:
        room = native.room(words[0] + words[1], dtype=torch.int32)
        where = room.data_ptr(), found.data_ptr(), through, squares.data_ptr(), lengths.data_ptr()
        library().conv_weight_gradients(a.data_ptr(), g.data_ptr(), form, begin, end, narrow, *where)

    native.in_parts(work, len(a), 1)
    weight: Any = found.permute(0, 1, 4, 2, 3)
    if filters is None:
        weight.squares = squares
    else:
        weight.through = squares, lengths
    return weight


def conv_square_norms(
    a: Tensor, g: Tensor, *how: tuple[int, int], filters: Standardized | None = None
) -> tuple[Tensor, Tensor]:
    """‖∂/∂weight‖² of every example, (B,) float64, of a gradient in float32 that is not written to memory.

    Args:
        a: as of `conv_weight_gradient`.
        g: likewise.
        how: kernel, stride, dilation, corner.
        filters: what they are, if they are standardized.

    Returns:
        Squares and, of standardized filters, lengths, as of `standardized_square_norms`.
    """
    found = []
    for x, y in _batches(how, a, g):
        by_group = native.room(2, _form(x, y, how)[1][2], len(x), dtype=torch.float64).zero_()
        _recompute(library().conv_square_norms, x, y, how, filters, *by_group)
        found.append(by_group.sum(1))
    squares, lengths = torch.cat(found, 1)
    return squares, lengths


def conv_weighted_sum(
    a: Tensor, g: Tensor, *how: tuple[int, int], weights: Tensor, filters: Standardized | None = None
) -> tuple[Tensor, Tensor]:
    """Σ weights[i]·(∂/∂weight of example i), of the gradients of `conv_square_norms`, added up in float64.

    An example of weight zero may hold NaN. Where the examples take too much room, batches of them are rounded to
    float32.

    Args:
        a: as of `conv_weight_gradient`.
        g: likewise.
        how: kernel, stride, dilation, corner.
        weights: (B,).
        filters: what they are, if they are standardized.

    Returns:
        ∂/∂w (out, in, kh, kw) and, of standardized filters, ∂/∂gain (out,), in float32.
    """
    found = []
    for x, y, some in _batches(how, a, g, weights.double().contiguous()):
        found.append((native.room(g.shape[2], a.shape[2], *how[0]), native.room(g.shape[2]).zero_()))
        _recompute(library().conv_weighted_sum, x, y, how, filters, some, *found[-1])
    if len(found) > 1:
        weight, gain = (sum(x.double() for x in same).float() for same in zip(*found, strict=True))
        return weight, gain
    return found[0]


def _batches(how: tuple[tuple[int, int], ...], *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Split input, output gradient and more into examples that are laid out at once."""
    count = max(1, _ROOM // _form(tensors[0], tensors[1], how)[1][0])
    return zip(*(x.split(count) for x in tensors), strict=True)


def _recompute(function: Any, a: Tensor, g: Tensor, how: Any, filters: Standardized | None, *more: Tensor) -> None:
    """Lay out examples, and call a function of `conv_recompute.c` on all filters; `more` are its last arguments."""
    form, words, narrow = _form(a, g, how)
    room = native.room(len(a), words[0], dtype=torch.int32)
    standardized, kept = None, []  # in memory
    if filters is not None:
        kept = [_in_floats(x) for x in filters[:2] if x is not None]
        standardized = ctypes.byref(_Filters(*_addresses(kept), *[None] * (2 - len(kept)), *filters[2], *filters[3]))

    def lay_out(begin: int, end: int) -> None:
        library().conv_lay_out(a.data_ptr(), g.data_ptr(), form, begin, end, narrow, room.data_ptr())

    def work(begin: int, end: int) -> None:
        rows = native.room(4 * words[1])
        function(room.data_ptr(), form, len(a), begin, end, narrow, standardized, *_addresses([rows, *more]))

    native.in_parts(lay_out, len(a), 1)
    native.in_parts(work, words[2], 1)


def _addresses(tensors: Iterable[Tensor]) -> list[int]:
    return [x.data_ptr() for x in tensors]


class _Filters(ctypes.Structure):
    """`Filters` of `conv.h`."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("weights", "gains")),
        *((name, ctypes.c_double) for name in ("floor", "extra", "factor")),
        *((name, ctypes.c_int) for name in ("of_weight", "of_gain")),
    ]


class _Through(ctypes.Structure):
    """`Through` of `conv.h`."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("directions", "scales", "projects", "twices")),
        *(("factor", ctypes.c_double), ("of_weight", ctypes.c_int), ("of_gain", ctypes.c_int)),
    ]


def _form(a: Tensor, g: Tensor, how: tuple[tuple[int, int], ...]) -> tuple[Any, list[int], bool]:
    """`Form`; words of an example that is laid out and of a group of filters, how many groups; whether in 16 bits."""
    (kernel, stride, dilation, corner), narrow = how, _narrow(a)
    (views, channels, *size), (out, height, width) = a.shape[1:], g.shape[2:]
    pairs = 2 if narrow else 1  # rows that are done at once
    rows = (height - 1) // pairs * pairs * stride[0] + (kernel[0] - 1) * dilation[0] + 1
    columns = max((width - 1) * stride[1] + (kernel[1] - 1) * dilation[1] + 1, corner[1] + size[1])
    numbers = [views, out, height, width, channels, *size, *kernel, *stride, *dilation, *corner, rows, columns]
    numbers += [*a.stride(), *g.stride()]
    form, words = (ctypes.c_int64 * len(numbers))(*numbers), (ctypes.c_int64 * 3)()
    library().room_for(form, narrow, words)
    return form, list(words), narrow


def convolves(a: Tensor, g: Tensor, groups: int) -> bool:
    """Whether the convolutions here take these: bfloat16 only from a processor that multiplies it."""
    known = a.dtype == torch.float32 or bool(library().takes_bfloat16())
    return a.dtype == g.dtype and groups == 1 and known


def supports(x: Tensor) -> bool:
    """Whether the library can be had, and takes the type of a tensor."""
    return x.dtype in (torch.float32, torch.bfloat16) and available()


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _in_floats(x: Tensor) -> Tensor:
    """Contiguous float32, of a model in 16 bits, too."""
    return x.float().contiguous()


def _narrow(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16
