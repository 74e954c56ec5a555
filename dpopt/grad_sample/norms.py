"""Arithmetic on per-example gradients (B, *shape), in whatever order they lie in memory."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from dpopt.machine import have_triton

Gradients = dict[str, Tensor]
TERMS = 4096  # products that meet in one sum where norms are taken in closed form
CANCELLED = 64  # times what it adds up to: nothing longer is trusted to cancel; in training it is 1 to 30 times
_WORKSPACE = {"cpu": 8 << 20, "cuda": 256 << 20}  # bytes of intermediate results that are formed at once


def add_up(total: Gradients, found: Gradients) -> None:
    """Add gradients to those of the same names."""
    for name, gradient in found.items():
        total[name] = total[name] + gradient if name in total else gradient


def at_once(like: Tensor, size: int) -> int:
    """Return how many examples to work on at once.

    Each example has `size` intermediate values in the dtype of `like`.
    """
    return max(1, _WORKSPACE.get(like.device.type, 8 << 20) // (like.element_size() * max(1, size)))


def kernels(x: Tensor) -> Any:
    """Find the module whose kernels take a tensor, or None for torch.

    The kernels pass over memory once. Tensors of a graph that is being traced have none, nor do those under vmap.
    """
    if get_proxy_mode() is not None or is_functorch_wrapped_tensor(x):
        return None
    if x.is_cuda:
        if not have_triton():
            return None
        from dpopt.grad_sample import triton_kernels

        return triton_kernels
    if type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu":
        return None
    from dpopt.grad_sample import cpu_kernels

    return cpu_kernels if cpu_kernels.supports(x) else None


def squares_by_example(gradient: Tensor) -> Tensor:
    """‖·‖² of every example of a gradient (B, *shape), (B,) float64: its attribute `squares`, if a kernel set it."""
    squares: Tensor | None = getattr(gradient, "squares", None)
    return square_norms(by_example(gradient)) if squares is None else squares


def square_norms(rows: Tensor) -> Tensor:
    """‖·‖² of each row of (R, n), in float64.

    On a CPU, torch adds the squares of a long row one by one in fp32, and 25 million equal entries lose 1% of their
    norm: rows are taken in blocks of 256, which loses at most 2e-7, and the blocks are added in float64.
    """
    if (found := kernels(rows)) is not None:
        squares: Tensor = found.square_norms(rows)
        return squares
    return torch.cat([_square_norms(piece) for piece in wide_pieces(rows)])


def _square_norms(rows: Tensor) -> Tensor:
    whole = rows.shape[1] // 256 * 256
    blocks = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, 256)), dim=2)
    if whole == rows.shape[1]:
        return blocks.double().square_().sum(1)
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True)
    return torch.cat([blocks, rest], 1).double().square_().sum(1)


def pieces(rows: Tensor) -> Iterator[Tensor]:
    """Split (R, …) into some rows that stay in the cache, converted to at least float32; a graph gets them whole."""
    count = len(rows) if get_proxy_mode() is not None else at_once(rows, 2 * rows[:1].numel())
    for piece in rows.split(max(1, count)):
        yield piece.float() if piece.element_size() < 4 else piece


def wide_pieces(rows: Tensor) -> Iterable[Tensor]:
    """(R, …) in at least float32: whole if it is so already, else in pieces."""
    return [rows] if rows.element_size() >= 4 else pieces(rows)


def sum_wide(x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Sum over some dimensions, in at least float32."""
    return x.sum(dims, dtype=torch.float32 if x.element_size() < 4 else x.dtype)


def by_example(gradient: Tensor) -> Tensor:
    """(B, …) as (B, n), in the order in which it lies in memory: a view of anything dense."""
    return gradient.permute(0, *memory_order(gradient)).flatten(1) if gradient.ndim > 1 else gradient[:, None]


def memory_order(gradient: Tensor) -> list[int]:
    """Sort the dimensions after the first, outermost in memory first."""
    strides = gradient.stride()
    return sorted(range(1, gradient.ndim), key=lambda i: (-strides[i], -gradient.shape[i], i))


def position_norms(a: Tensor, g: Tensor, bias: bool) -> Tensor:
    """Squared norms (B,) of Σ a_t·g_tᵀ over positions, and of Σ g_t where there is a bias, never too short."""
    return never_short(*gram(a, g, bias), a.shape[-2], g.dtype)


def never_short(square: Tensor, lengths: Tensor, positions: int, dtype: torch.dtype) -> Tensor:
    """Squared norms in closed form, lengthened where positions cancel.

    An example whose positions cancel has products far longer than its norm, and rounding in their sum is in proportion
    to them. A sum of n products has an error of at most n·u·Σ|products|, with u half of a type's ε, which is added to
    the norm. Others meet these products in the sum, too, so that a norm is at least a `CANCELLED`th of their lengths.

    Args:
        square: ‖Σ p_t‖² over the products p_t of an example's positions, (B,) float64, from inner products.
        lengths: Σ ‖p_t‖, (B,).
        positions: of an example.
        dtype: in which sums are taken, of `TERMS` products at most or of one example.
    """
    norm, terms = square.clamp(min=0).sqrt(), max(positions, min(len(square) * positions, TERMS))
    longer = norm + terms * torch.finfo(dtype).eps / 2 * (lengths - norm).clamp(min=0)
    return torch.maximum(longer, lengths.double() / CANCELLED).square()


def gram(a: Tensor, g: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """`of_pairs` of positions of a (B, …, T, n) and g (B, …, T, m)."""
    return of_pairs(inner_products(a), inner_products(g), bias)


def inner_products(x: Tensor) -> Tensor:
    """x_s·x_t for pairs of positions of (B, …, T, n), (B, …, T, T) float64.

    Where positions cancel, float32 would lose the norm, and one too small is not an option.
    """
    x = x.double()
    return x.square().sum(-1, keepdim=True) if x.shape[-2] == 1 else x @ x.mT


def of_pairs(a: Tensor, g: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Turn `inner_products` of a layer's input and output gradient into what `never_short` needs.

    Returns:
        Σ (a_s·a_t + bias)(g_s·g_t) over pairs of positions, (B,), and Σ ‖(a_t, bias)‖·‖g_t‖ over positions, (B,).
    """
    products = (a + float(bias)) * g
    return products.flatten(1).sum(1), products.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().flatten(1).sum(1)


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Matrix products in full precision: TF32 or autocast would round the sum, and it could be longer than its norm."""
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    if before[0] != "highest":
        torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = False  # not cudnn.flags(), which switches cuDNN off unless told otherwise
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before[0] != "highest":
            torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1]
