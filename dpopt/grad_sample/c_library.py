"""The C code of per-example gradients, built for this processor."""

import ctypes
import functools
from pathlib import Path
from typing import Any

from dpopt import native

_FOLDER = Path(__file__).parent


@functools.cache
def available() -> bool:
    """Whether there is a compiler that builds it."""
    try:
        library()
    except OSError:
        return False
    return True


@functools.cache
def library() -> ctypes.CDLL:
    """Build and load what is in C."""
    # Accumulators may be reordered, hence vectorized; NaN and infinity keep their meaning.
    flags = "-fassociative-math -fno-signed-zeros -ffp-contract=fast"
    names = "cpu.c", "conv.c", "conv_recompute.c", "conv.h"
    loaded = native.library(*(_FOLDER / name for name in names), flags=flags)
    pointer, count, flag, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
    shape: list[Any] = [pointer, *[count] * 8, flag]
    loaded.square_norms.argtypes = [pointer, *[count] * 4, flag, pointer]
    loaded.weighted_sum.argtypes = [pointer, *[count] * 4, flag, pointer, pointer]
    loaded.standardized_square_norms.argtypes = [*shape, *[pointer] * 4, number, flag, flag, pointer, pointer]
    loaded.standardize.argtypes = [pointer, count, count, pointer, *[count] * 3, *[number] * 3, *[pointer] * 4]
    of_sums: list[Any] = [pointer, pointer, count, count, pointer, count, *[number] * 3, pointer, pointer]
    loaded.standardized_gradients.argtypes = of_sums
    loaded.room_for.argtypes = [pointer, flag, pointer]
    loaded.conv_weight_gradients.argtypes = [*[pointer] * 3, count, count, flag, *[pointer] * 5]
    loaded.conv_lay_out.argtypes = [*[pointer] * 3, count, count, flag, pointer]
    recomputed: list[Any] = [pointer, pointer, *[count] * 3, flag]
    loaded.conv_square_norms.argtypes = [*recomputed, *[pointer] * 4]
    loaded.conv_weighted_sum.argtypes = [*recomputed, *[pointer] * 5]
    for function in (
        *(loaded.square_norms, loaded.weighted_sum, loaded.standardize),
        *(loaded.standardized_square_norms, loaded.standardized_gradients),
        *(loaded.room_for, loaded.conv_weight_gradients, loaded.conv_lay_out),
        *(loaded.conv_square_norms, loaded.conv_weighted_sum),
    ):
        function.restype = None
    return loaded
