"""Per-example gradients, their norms and sums on a GPU: a launch each, which reads a value once or from its cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_PIECE = 4096  # values of a row that a program squares


def weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """Σ weights[i]·rows[i], (n,) float32; a row of weight zero is not read, so that it may hold NaN.

    Args:
        rows: (B, n) of 16- or 32-bit floats, contiguous in n.
        weights: (B,) float32.
    """
    total = torch.empty(rows.shape[1], dtype=torch.float32, device=rows.device)
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        _sum_kernel[(triton.cdiv(len(total), _BLOCK),)](
            rows, weights, total, len(total), rows.stride(0), COUNT=len(rows), BLOCK=_BLOCK
        )
    return total


def square_norms(rows: Tensor) -> Tensor:
    """‖·‖² of each row of (R, n), in float64.

    Args:
        rows: floats of any width.
    """
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    pieces = triton.cdiv(rows.shape[1], _PIECE)
    squares = torch.empty(len(rows), pieces, dtype=torch.float64, device=rows.device)
    with torch.cuda.device_of(rows):
        _square_kernel[(len(rows), pieces)](rows, squares, rows.shape[1], rows.stride(0), pieces, BLOCK=_PIECE)
    return squares.sum(1) if pieces > 1 else squares[:, 0]


def standardized_square_norms(
    parts: Tensor, weight: Tensor, gain: Tensor | None, how: tuple[float, float, float], counted: tuple[bool, bool]
) -> Tensor:
    """‖∂/∂w‖² + ‖∂/∂gain‖² of every example, (B,) float64 (`dpopt.grad_sample.conv` has the equations).

    Args:
        parts: G, (B, P, out, m): P pieces of every filter, each contiguous.
        weight: w, (P, out, m), contiguous.
        gain: (out,), or None for 1.
        how: floor, extra and factor: a filter is used as factor·gain·(w − mean(w))/τ, where
            τ² = max(‖w − mean(w)‖², floor) + extra.
        counted: whether ∂/∂w and ∂/∂gain are.
    """
    parts = parts if parts.stride(3) == 1 else parts.contiguous()
    examples, pieces, out, length = parts.shape
    squares = torch.empty(examples, out, dtype=torch.float64, device=parts.device)
    with torch.cuda.device_of(parts):
        _standardized_kernel[(examples, out)](
            *(parts, weight, gain, squares, squares, length, *parts.stride()[:3], *how),
            PIECES=pieces,
            GAINED=gain is not None,
            BLOCK=min(_BLOCK, triton.next_power_of_2(length)),
            FORM=False,
            WEIGHT=counted[0],
            GAIN=counted[1],
        )
    return squares.sum(1)


def standardized_gradients(
    gradient: Tensor, weight: Tensor, gain: Tensor | None, how: tuple[float, float, float]
) -> tuple[Tensor, Tensor]:
    """∂/∂w (out, n) and ∂/∂gain (out,) of G (out, n), in its type; w is (out, n), contiguous."""
    gradient = gradient.contiguous()
    out, length = gradient.shape
    of_weight, of_gain = torch.empty_like(gradient), gradient.new_empty(out)
    with torch.cuda.device_of(gradient):
        _standardized_kernel[(1, out)](
            *(gradient, weight, gain, of_weight, of_gain, length, 0, 0, length, *how),
            PIECES=1,
            GAINED=gain is not None,
            BLOCK=min(_BLOCK, triton.next_power_of_2(length)),
            FORM=True,
            WEIGHT=True,
            GAIN=True,
        )
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
    """∂/∂weight of every example, (B, out, in/groups, kh, kw), in the type of `a`, without a copy of its input.

    Args:
        a: input (B, K, in, h, w), in any order in memory, of 16- or 32-bit floats; of K views.
        g: output gradient (B, K, out, h', w'), of the same type.
        kernel: (kh, kw).
        stride: (vertical, horizontal).
        dilation: (vertical, horizontal).
        corner: zeros (above, left of) the input.
        groups: of channels.
    """
    (examples, views, channels, height, width), out = a.shape, g.shape[2]
    wide, columns = out // groups, channels // groups * kernel[0] * kernel[1]
    found = torch.empty(examples, out, channels // groups, *kernel, dtype=a.dtype, device=a.device)
    block = tuple(min(64, max(16, triton.next_power_of_2(n))) for n in (wide, columns))
    grid = (examples * groups, triton.cdiv(wide, block[0]), triton.cdiv(columns, block[1]))
    with torch.cuda.device_of(a):
        _conv_kernel[grid](
            *(a, g, found, groups, wide, channels // groups, height, width, g.shape[4], g.shape[3] * g.shape[4]),
            *(views * g.shape[3] * g.shape[4], *stride, *dilation, *corner, *a.stride(), *g.stride()),
            KH=kernel[0],
            KW=kernel[1],
            ROWS=block[0],
            COLUMNS=block[1],
            POSITIONS=32,
        )
    return found


def group_norm_gradients(x: Tensor, g: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Σ g·x̂ and Σ g of every channel, (N, C) float32 each.

    Args:
        x: input of a group normalization, (N, C, L).
        g: output gradient, (N, C, L).
        groups: of channels.
        eps: added to the variance.
    """
    x, g = x.contiguous(), g.contiguous()
    count, channels, length = x.shape
    products, sums = torch.empty(2, count, channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _group_norm_kernel[(count, groups)](
            *(x, g, products, sums, channels // groups, length, eps),
            BLOCK=min(_BLOCK, triton.next_power_of_2(length)),
        )
    return products, sums


@triton.jit
def _sum_kernel(rows, weights, total, size, stride, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), tl.float32)
    row = rows + at
    for i in range(COUNT):
        weight = tl.load(weights + i)
        read = at < tl.where(weight != 0.0, size, 0)
        found += weight * tl.load(row, mask=read, other=0.0).to(tl.float32)
        row += stride
    tl.store(total + at, found, mask=at < size)


@triton.jit
def _square_kernel(rows, squares, size, stride, pieces, BLOCK: tl.constexpr):
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = piece.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(rows + row * stride + at, mask=at < size, other=0.0).to(tl.float64)
    tl.store(squares + row * pieces + piece, tl.sum(value * value, 0))


@triton.jit
def _standardized_kernel(
    parts, weights, gains, first, second, length, by_example, by_piece, by_filter, floor, extra, factor,
    PIECES: tl.constexpr, GAINED: tl.constexpr, BLOCK: tl.constexpr,
    FORM: tl.constexpr, WEIGHT: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    example, one, filters = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row = parts + example * by_example + one.to(tl.int64) * by_filter
    filter = weights + one * length
    offsets = tl.arange(0, BLOCK)
    g1 = tl.zeros((BLOCK,), tl.float64)  # Σ G
    w1 = tl.zeros((BLOCK,), tl.float64)  # Σ w
    w2 = tl.zeros((BLOCK,), tl.float64)  # Σ w²
    gw = tl.zeros((BLOCK,), tl.float64)  # Σ G·w
    for piece in range(PIECES):
        for start in range(0, length, BLOCK):
            at, inside = start + offsets, start + offsets < length
            g = tl.load(row + piece * by_piece + at, mask=inside, other=0.0).to(tl.float64)
            w = tl.load(filter + piece * filters * length + at, mask=inside, other=0.0).to(tl.float64)
            g1, w1, w2, gw = g1 + g, w1 + w, w2 + w * w, gw + g * w
    count = PIECES * length
    g_mean, w_mean = tl.sum(g1, 0) / count, tl.sum(w1, 0) / count
    square = tl.sum(w2, 0) - count * w_mean * w_mean
    inverse = 1.0 / tl.sqrt(tl.maximum(square, floor) + extra)  # 1/τ
    along = (tl.sum(gw, 0) - count * g_mean * w_mean) * inverse  # h·G
    project = tl.where(square > floor, along * inverse, 0.0)
    scale = factor * inverse
    if GAINED:
        scale *= tl.load(gains + one).to(tl.float64)
    found = along * 0.0
    if WEIGHT:
        left = tl.zeros((BLOCK,), tl.float64)
        for piece in range(PIECES):  # once more, from the cache
            for start in range(0, length, BLOCK):
                at, inside = start + offsets, start + offsets < length
                g = tl.load(row + piece * by_piece + at, mask=inside, other=0.0).to(tl.float64)
                w = tl.load(filter + piece * filters * length + at, mask=inside, other=0.0).to(tl.float64)
                rest = tl.where(inside, g - g_mean - project * (w - w_mean), 0.0)
                if FORM:
                    tl.store(first + one * length + at, (scale * rest).to(first.dtype.element_ty), mask=inside)
                left += rest * rest
        found += scale * scale * tl.sum(left, 0)
    if GAIN:
        through = factor * along
        found += through * through
        if FORM:
            tl.store(second + one, through.to(second.dtype.element_ty))
    if not FORM:
        tl.store(first + example * filters + one, found)


@triton.jit
def _conv_kernel(
    a, g, found, groups, wide, deep, height, width, out_width, map_size, positions,
    down, right, dilation_y, dilation_x, above, left,
    a_example, a_view, a_channel, a_y, a_x, g_example, g_view, g_channel, g_y, g_x,
    KH: tl.constexpr, KW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """A tile (ROWS, COLUMNS) of out × (in·kh·kw) of one example and group: a product over the output's positions."""
    example, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    channel, dy, dx = column // (KH * KW), column // KW % KH, column % KW
    a_from = a + example * a_example + (group * deep + channel)[None, :] * a_channel
    g_from = g + example * g_example + (group * wide + row)[:, None] * g_channel
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, positions, POSITIONS):
        at = start + tl.arange(0, POSITIONS)
        view, y, x = at // map_size, at % map_size // out_width, at % out_width
        there = (row < wide)[:, None] & (at < positions)[None, :]
        of_g = tl.load(g_from + (view * g_view + y * g_y + x * g_x)[None, :], mask=there, other=0.0)
        in_y = (y * down - above)[:, None] + (dy * dilation_y)[None, :]
        in_x = (x * right - left)[:, None] + (dx * dilation_x)[None, :]
        there = (at < positions)[:, None] & (channel < deep)[None, :]
        there = there & (in_y >= 0) & (in_y < height) & (in_x >= 0) & (in_x < width)
        of_a = tl.load(a_from + (view * a_view)[:, None] + in_y * a_y + in_x * a_x, mask=there, other=0.0)
        total = tl.dot(of_g, of_a, total, input_precision="ieee")
    size = deep * KH * KW
    into = found + ((example * groups + group) * wide + row)[:, None] * size + column[None, :]
    tl.store(into, total.to(found.dtype.element_ty), mask=(row < wide)[:, None] & (column < size)[None, :])


@triton.jit
def _group_norm_kernel(x, g, products, sums, channels, length, eps, BLOCK: tl.constexpr):
    """One group of one sample, which is contiguous."""
    first = tl.program_id(0).to(tl.int64) * tl.num_programs(1) * channels + tl.program_id(1) * channels
    offsets = tl.arange(0, BLOCK)
    size = channels * length
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + offsets
        total += tl.load(x + first * length + at, mask=at < size, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / size
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + offsets
        away = tl.load(x + first * length + at, mask=at < size, other=0.0).to(tl.float32) - mean
        total += tl.where(at < size, away * away, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(total, 0) / size + eps)
    for channel in range(0, channels):
        product = tl.zeros((BLOCK,), tl.float32)
        of_g = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, length, BLOCK):
            at, inside = start + offsets, start + offsets < length
            place = (first + channel) * length + at
            upstream = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
            product += upstream * (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean)
            of_g += upstream
        tl.store(products + first + channel, tl.sum(product, 0) * inverse)
        tl.store(sums + first + channel, tl.sum(of_g, 0))
