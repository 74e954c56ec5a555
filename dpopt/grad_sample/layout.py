"""Find where the examples of a batch lie in the tensors of a layer, and verify it.

A shape alone does not tell: 8 rows may be 8 examples, 8 positions or the 8 valid tokens of 3 examples. The backward
pass does: a row of an output gradient belongs to example i if it scales with loss i and with no other loss. So a second
backward pass takes every loss times a power of two, which is exact in floating point, and compares. One pass tells 32
examples apart, two passes 1024.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpopt.grad_sample.nested import output_tensors

# How far two gradients of one graph may differ where the order of additions is not fixed (atomics on a GPU): relative
# to themselves, and to the largest of the example. A row of another example differs by half of itself at least.
_ROUNDING = {torch.float64: (1e-6, 1e-12), torch.float32: (1e-3, 1e-5)}
_DIGITS = 32  # losses are scaled by 2^-16 … 2^15, far from the limits of float32 and bfloat16


@dataclass(frozen=True)
class Layout:
    """Where the examples lie in a call of a layer.

    Attributes:
        output: the dimension of the output that runs over examples, then over rows of an example.
        inputs: that dimension of each argument; None for an argument that all examples share.
        looped: whether the layer is differentiated example by example, because `torch.func.vmap` cannot.
        sure: whether the gradients that were compared had values in enough examples. Zeros fit any layout.
    """

    output: int = 0
    inputs: tuple[int | None, ...] = (0,)
    looped: bool = False
    sure: bool = True


class UnsureLayoutError(Exception):
    """A gradient that used to be zero is not: its layout has to be checked."""


def split(x: Tensor, dim: int, examples: int) -> Tensor:
    """Move examples to the front, (B, …): a dimension of B·n values becomes one of n values."""
    return x.unflatten(dim, (examples, -1)).movedim(dim, 0)


def with_views(x: Tensor, dim: int, examples: int) -> Tensor:
    """(B, K, …), the examples along any dimension."""
    return (
        x.unflatten(0, (examples, -1)) if dim == 0 else x.unflatten(dim, (examples, -1)).movedim((dim, dim + 1), (0, 1))
    )


def possible_dims(x: Tensor, views: int, last: int) -> list[int]:
    """List the dimensions, up to a last one, that may run over examples: the first in blocks, others view by view."""
    first = [0] if x.ndim and len(x) and len(x) % views == 0 else []
    return first + [d for d in range(1, min(x.ndim, last + 1)) if x.shape[d] == views]


class RowProbe:
    """Tells whether rows of gradients belong to examples, by their answer to scaled losses.

    Args:
        examples: B.
        views: B·K, the number of inputs of the model.
        like: the losses, (B,).
        coarse: whether outputs are computed in 16 bits somewhere (autocast).

    Attributes:
        factors: of the losses, one tensor (B,) per backward pass.
        sure: whether the last gradient that belonged had values in enough examples.
    """

    def __init__(self, examples: int, views: int, like: Tensor, coarse: bool) -> None:
        self.examples, self.views, self.coarse, self.sure = examples, views, coarse, True
        self.factors: list[Tensor] = []
        index = torch.arange(examples, device=like.device)
        while examples > 1 and (not self.factors or bool(index.any())):
            self.factors.append(torch.ldexp(torch.ones_like(like), index % _DIGITS - _DIGITS // 2))
            index = index // _DIGITS

    def belongs(self, gradient: Tensor, scaled: list[Tensor], dim: int) -> bool:
        """Compare a gradient with those of scaled losses, examples along a dimension."""
        if self.examples == 1:
            return True
        rows = split(gradient, dim, self.examples).flatten(1)
        for factor, other in zip(self.factors, scaled, strict=True):
            expected, got = rows * factor.to(rows.dtype)[:, None], split(other, dim, self.examples).flatten(1)
            # What is not finite says nothing: a NaN of another example would be in both, and is dropped with its norm.
            same = (got == expected) | ~got.isfinite() | ~expected.isfinite()
            if not bool(same.all()):
                size = torch.where(same & ~expected.isfinite(), 0.0, expected.abs()).amax(1, keepdim=True)
                relative, absolute = _ROUNDING.get(rows.dtype, (0.1, 0.01))
                tiny = torch.finfo(rows.dtype).tiny * 2.0**_DIGITS
                limit = relative * expected.abs() + absolute * size + tiny
                if not bool((same | ((got - expected).abs() <= limit)).all()):
                    return False
        # Pads and dead units send nothing back; the layout of a batch shows in the other examples.
        self.sure = int((rows != 0).any(1).sum()) >= min(self.examples, max(2, self.examples // 4))
        return True


def argument_dims(leaves: tuple[object, ...], views: int, output: int) -> Iterator[tuple[int | None, ...]]:
    """List how arguments may be split: each along a dimension or shared; a tensor passed twice alike."""
    keys = [(x.data_ptr(), x.shape, x.stride()) if isinstance(x, Tensor) else None for x in leaves]
    tensors = {key: x for key, x in zip(keys, leaves, strict=True) if isinstance(x, Tensor)}
    options: list[list[int | None]] = []
    for x in tensors.values():
        dims = possible_dims(x, views, x.ndim)
        options.append([*sorted(dims, key=lambda d: (d != output, d)), None])
    for choice in itertools.islice(itertools.product(*options), 256):
        dims_of = dict(zip(tensors, choice, strict=True))
        yield tuple(dims_of.get(key) for key in keys)


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether two tensors have one shape and, but for rounding, the same values."""
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return bool(torch.equal(one, other))
    finite = other[other.isfinite()]
    size = float(finite.abs().max()) if len(finite) else 0.0
    return bool(torch.isclose(one, other.to(one.dtype), rtol=tolerance, atol=tolerance * size, equal_nan=True).all())


def same_outputs(one: Any, other: Any, coarse: bool) -> bool:
    """Whether two forward passes returned the same, but for rounding.

    Args:
        one: returned by a model.
        other: returned by a model.
        coarse: whether they were computed in 16 bits somewhere.
    """
    pairs = list(itertools.zip_longest(output_tensors(one), output_tensors(other)))
    return bool(pairs) and all(
        x is not None and y is not None and close(x, y, rounding_of_outputs(y.dtype, coarse)) for x, y in pairs
    )


def rounding_of_outputs(dtype: torch.dtype, coarse: bool) -> float:
    """Relative difference of outputs that two ways of computing them may make."""
    return 0.06 if coarse else {torch.float64: 1e-9, torch.float32: 3e-3}.get(dtype, 0.06)
