"""Norms and sums of per-example gradients on a CPU, and those of convolutions: `cpu.c`, `conv.c`."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpopt import native

_FOLDER = Path(__file__).parent
_WORTH_A_THREAD = 1 << 18  # values


def weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """Σ weights[i]·rows[i], (n,), in float64; a row of weight zero is not read, so that it may hold NaN.

    Args:
        rows: (B, n) of float32 or bfloat16, contiguous in n.
        weights: (B,) float32.
    """
    rows, weights = _in_rows(rows), weights.contiguous()
    total = torch.empty(rows.shape[1], dtype=torch.float64)
    place = rows.stride(0), _narrow(rows), weights.data_ptr(), total.data_ptr()

    def work(begin: int, end: int) -> None:
        _library().weighted_sum(rows.data_ptr(), len(rows), begin, end, *place)

    native.in_parts(work, len(total), _WORTH_A_THREAD // max(1, len(rows)))
    return total


def square_norms(rows: Tensor) -> Tensor:
    """‖·‖² of each row of (R, n) of float32 or bfloat16, in float64."""
    rows = _in_rows(rows)
    squares = torch.empty(len(rows), dtype=torch.float64)
    place = rows.shape[1], rows.stride(0), _narrow(rows), squares.data_ptr()
    native.in_parts(
        lambda begin, end: _library().square_norms(rows.data_ptr(), begin, end, *place),
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
    parts, weight, gain = _in_rows(parts), _in_floats(weight), None if gain is None else _in_floats(gain)
    examples, pieces, out, length = parts.shape
    direction, numbers = torch.empty(out, pieces, length), torch.empty(3, out, dtype=torch.float64)
    constants = direction.data_ptr(), *(row.data_ptr() for row in numbers)
    known = None if gain is None else gain.data_ptr(), pieces, out, length
    _library().standardize(weight.data_ptr(), *known, *how, *constants)
    squares, lengths = torch.empty(2, examples, dtype=torch.float64)
    shape = pieces, out, length, *parts.stride()[:3], _narrow(parts)

    found = squares.data_ptr(), lengths.data_ptr()

    def work(begin: int, end: int) -> None:
        _library().standardized_square_norms(parts.data_ptr(), begin, end, *shape, *constants, how[2], *counted, *found)

    native.in_parts(work, examples, _WORTH_A_THREAD // max(1, pieces * out * length))
    return squares, lengths


def standardized_gradients(
    gradient: Tensor, weight: Tensor, gain: Tensor | None, how: tuple[float, float, float]
) -> tuple[Tensor, Tensor]:
    """∂/∂w (out, n) and ∂/∂gain (out,), in float32, of G (out, n), of any type; w is (out, n)."""
    gradient, weight = gradient.double().contiguous(), _in_floats(weight)
    gain = None if gain is None else _in_floats(gain)
    of_weight, of_gain = torch.empty_like(weight), torch.empty(len(weight))
    known = None if gain is None else gain.data_ptr(), gradient.shape[1], *how, of_weight.data_ptr(), of_gain.data_ptr()

    def work(begin: int, end: int) -> None:
        _library().standardized_gradients(gradient.data_ptr(), weight.data_ptr(), begin, end, *known)

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
) -> Tensor:
    """∂/∂weight of every example, (B, out, in, kh, kw), in the type of `a`; its input is not unfolded.

    Its attribute `squares` is ‖·‖² of every example, (B,) float64; what is made of it does not have it.

    Args:
        a: input (B, K, in, h, w), of K views; what `convolves` takes.
        g: output gradient (B, K, out, h', w').
        kernel: (kh, kw).
        stride: (vertical, horizontal).
        dilation: (vertical, horizontal).
        corner: zeros (above, left of) the input.
        groups: 1.
    """
    (examples, views, channels, *size), (out, height, width), narrow = a.shape, g.shape[2:], _narrow(a)
    pairs = 2 if narrow else 1  # rows that are done at once
    rows = (height - 1) // pairs * pairs * stride[0] + (kernel[0] - 1) * dilation[0] + 1
    columns = max((width - 1) * stride[1] + (kernel[1] - 1) * dilation[1] + 1, corner[1] + size[1])
    numbers = [views, out, height, width, channels, *size, *kernel, *stride, *dilation, *corner, rows, columns]
    numbers += [*a.stride(), *g.stride()]
    form, words = (ctypes.c_int64 * len(numbers))(*numbers), (ctypes.c_int64 * 3)()
    _convolutions().room_for(form, narrow, words)
    found, squares = a.new_empty(examples, out, *kernel, channels), torch.empty(examples, dtype=torch.float64)

    def work(begin: int, end: int) -> None:
        room = torch.zeros(sum(words), dtype=torch.int32)
        parts = begin, end, narrow, room.data_ptr(), found.data_ptr(), squares.data_ptr()
        _convolutions().conv_weight_gradients(a.data_ptr(), g.data_ptr(), form, *parts)

    native.in_parts(work, examples, 1)
    weight = found.permute(0, 1, 4, 2, 3)
    weight.squares = squares  # type: ignore[attr-defined]
    return weight


def convolves(a: Tensor, g: Tensor, groups: int) -> bool:
    """Whether `conv_weight_gradient` takes these: bfloat16 only from a processor that multiplies it."""
    known = a.dtype == torch.float32 or bool(_convolutions().takes_bfloat16())
    return a.dtype == g.dtype and groups == 1 and known


def supports(x: Tensor) -> bool:
    """Whether the libraries can be had, and take the type of a tensor."""
    return x.dtype in (torch.float32, torch.bfloat16) and available()


@functools.cache
def available() -> bool:
    """Whether there is a compiler that builds them."""
    try:
        _library(), _convolutions()
    except OSError:
        return False
    return True


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _in_floats(x: Tensor) -> Tensor:
    """Contiguous float32, of a model in 16 bits, too."""
    return x.float().contiguous()


def _narrow(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


@functools.cache
def _library() -> ctypes.CDLL:
    # Accumulators may be reordered, hence vectorized; NaN and infinity keep their meaning.
    loaded = native.library(_FOLDER / "cpu.c", "-fassociative-math -fno-signed-zeros -ffp-contract=fast")
    pointer, count, flag, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
    shape: list[Any] = [pointer, *[count] * 8, flag]
    loaded.square_norms.argtypes = [pointer, *[count] * 4, flag, pointer]
    loaded.weighted_sum.argtypes = [pointer, *[count] * 4, flag, pointer, pointer]
    loaded.standardized_square_norms.argtypes = [*shape, *[pointer] * 4, number, flag, flag, pointer, pointer]
    loaded.standardize.argtypes = [pointer, pointer, *[count] * 3, *[number] * 3, *[pointer] * 4]
    of_sums: list[Any] = [pointer, pointer, count, count, pointer, count, *[number] * 3, pointer, pointer]
    loaded.standardized_gradients.argtypes = of_sums
    for function in (
        loaded.square_norms,
        loaded.weighted_sum,
        loaded.standardize,
        loaded.standardized_square_norms,
        loaded.standardized_gradients,
    ):
        function.restype = None
    return loaded


@functools.cache
def _convolutions() -> ctypes.CDLL:
    loaded = native.library(_FOLDER / "conv.c", "-ffp-contract=fast")
    pointer, count, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.room_for.argtypes = [pointer, flag, pointer]
    loaded.conv_weight_gradients.argtypes = [*[pointer] * 3, count, count, flag, *[pointer] * 3]
    loaded.room_for.restype = loaded.conv_weight_gradients.restype = None
    return loaded
