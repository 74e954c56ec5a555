"""Per-example gradients, their norms and sums on a GPU: a launch each, which reads a value once or from its cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_SUMMED = 32  # rows that a program sums
_PIECE = 4096  # values of a row that a program squares


def weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """Σ weights[i]·rows[i], (n,), in float64; a row of weight zero is not read, so that it may hold NaN.

    Args:
        rows: (B, n) of 16- or 32-bit floats, contiguous in n.
        weights: (B,) float32.
    """
    size, parts = rows.shape[1], triton.cdiv(len(rows), _SUMMED)
    totals = torch.empty(parts, size, dtype=torch.float64, device=rows.device)
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        _sum_kernel[(triton.cdiv(size, _BLOCK // 2), parts)](
            *(rows, weights, totals, size, len(rows), rows.stride(0)), SUMMED=_SUMMED, ROWS=8, BLOCK=_BLOCK // 2
        )
    return totals.sum(0) if parts > 1 else totals[0]


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
    parts = parts if parts.stride(3) == 1 else parts.contiguous()
    examples, pieces, out, length = parts.shape
    squares, lengths = torch.empty(2, examples, out, dtype=torch.float64, device=parts.device)
    with torch.cuda.device_of(parts):
        _standardized_kernel[(examples, out)](
            *(parts, weight, gain, squares, lengths, length, *parts.stride()[:3], *how),
            PIECES=pieces,
            GAINED=gain is not None,
            BLOCK=min(_BLOCK, triton.next_power_of_2(length)),
            FORM=False,
            WEIGHT=counted[0],
            GAIN=counted[1],
        )
    return squares.sum(1), lengths.sum(1)


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
    """∂/∂weight of every example, (B, out, in/groups, kh, kw), in the type of `a`; its input is not unfolded.

    Args:
        a: input (B, K, in, h, w) of 16- or 32-bit floats; of K views.
        g: output gradient (B, K, out, h', w'), of the same type.
        kernel: (kh, kw).
        stride: (vertical, horizontal).
        dilation: (vertical, horizontal).
        corner: zeros (above, left of) the input.
        groups: of channels.
    """
    (examples, views, channels, height, width), out, map_width = a.shape, g.shape[2], g.shape[4]
    positions = views * g.shape[3] * map_width
    a, g = channels_last(a), channels_last(g)
    wide, deep = out // groups, channels // groups
    found = torch.empty(examples, out, *kernel, deep, dtype=a.dtype, device=a.device)
    block = tuple(min(64, max(16, triton.next_power_of_2(n))) for n in (wide, deep))
    tiles = triton.cdiv(wide, block[0]), triton.cdiv(deep, block[1])
    with torch.cuda.device_of(a):
        _conv_kernel[(examples * groups * tiles[0] * tiles[1] * kernel[0] * kernel[1],)](
            *(a, g, found, groups, wide, deep, *tiles, height, width, map_width, positions // views, positions),
            *(*stride, *dilation, *corner),
            TAPS_Y=kernel[0],
            TAPS_X=kernel[1],
            ROWS=block[0],
            COLUMNS=block[1],
            POSITIONS=32 if a.element_size() == 4 else 64 if capability(a) >= 80 else 16,  # a T4 would spill
            num_stages=3,
        )
    return found.permute(0, 1, 4, 2, 3)


def convolves(a: Tensor, g: Tensor, groups: int) -> bool:
    """Whether `conv_weight_gradient` takes these."""
    return a.dtype == g.dtype != torch.float64


def capability(x: Tensor) -> int:
    """Of the GPU that a tensor lies on, 90 for an H100; of a GPU of today where it lies elsewhere."""
    if x.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def channels_last(x: Tensor) -> Tensor:
    """(N, K, C, h, w) as (N, K, h, w, C), contiguous: a view of what lies so already."""
    moved = x.permute(0, 1, 3, 4, 2)
    if moved.is_contiguous():
        return moved
    x = x.contiguous()
    found = torch.empty(moved.shape, dtype=x.dtype, device=x.device)
    rows, columns = x.shape[2], x.shape[3] * x.shape[4]
    block = tuple(min(64, triton.next_power_of_2(n)) for n in (rows, columns))
    tiles = triton.cdiv(rows, block[0]), triton.cdiv(columns, block[1])
    with torch.cuda.device_of(x):
        _transpose_kernel[(x.shape[0] * x.shape[1] * tiles[0] * tiles[1],)](
            *(x, found, rows, columns, *tiles), ROWS=block[0], COLUMNS=block[1]
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
def _sum_kernel(
    rows, weights, totals, size, count, stride, SUMMED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(part * SUMMED, part * SUMMED + SUMMED, ROWS):
        row = start + tl.arange(0, ROWS)
        weight = tl.load(weights + row, mask=row < count, other=0.0)
        read = (weight != 0.0)[:, None] & (at < size)[None, :]
        value = tl.load(rows + row.to(tl.int64)[:, None] * stride + at[None, :], mask=read, other=0.0)
        total += tl.sum(weight[:, None].to(tl.float64) * value.to(tl.float64), 0)
    tl.store(totals + part.to(tl.int64) * size + at, total, mask=at < size)


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
    g2 = tl.zeros((BLOCK,), tl.float64)  # Σ G²
    for piece in range(PIECES):
        for start in range(0, length, BLOCK):
            at, inside = start + offsets, start + offsets < length
            g = tl.load(row + piece * by_piece + at, mask=inside, other=0.0).to(tl.float64)
            w = tl.load(filter + piece * filters * length + at, mask=inside, other=0.0).to(tl.float64)
            g1, w1, w2, gw = g1 + g, w1 + w, w2 + w * w, gw + g * w
            if not FORM:
                g2 += g * g
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
    stretch = along * 0.0
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
        stretch += scale * scale
    if GAIN:
        through = factor * along
        found += through * through
        stretch += factor * factor
        if FORM:
            tl.store(second + one, through.to(second.dtype.element_ty))
    if not FORM:
        tl.store(first + example * filters + one, found)
        tl.store(second + example * filters + one, stretch * tl.sum(g2, 0))


@triton.jit
def _conv_kernel(
    a, g, found, groups, wide, deep, row_tiles, column_tiles, height, width, map_width, map_size, positions,
    down, right, dilation_y, dilation_x, above, left,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Compute a tile (ROWS, COLUMNS) of out × in.

    The tile is of one place of the filter: a product over the output's positions.
    """
    number = tl.program_id(0)
    tap = number % (TAPS_Y * TAPS_X)
    number = number // (TAPS_Y * TAPS_X)
    column = number % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    number = number // column_tiles
    row = number % row_tiles * ROWS + tl.arange(0, ROWS)
    number = number // row_tiles
    example, group = (number // groups).to(tl.int64), number % groups
    dy, dx = tap // TAPS_X * dilation_y - above, tap % TAPS_X * dilation_x - left
    inputs = positions // map_size * height * width
    a_from = a + example * inputs * (groups * deep) + group * deep + column[None, :]
    g_from = g + example * positions * (groups * wide) + group * wide + row[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, positions, POSITIONS):
        at = start + tl.arange(0, POSITIONS)
        y, x = at % map_size // map_width * down + dy, at % map_width * right + dx
        there = (at < positions)[:, None] & (row < wide)[None, :]
        of_g = tl.load(g_from + at[:, None] * (groups * wide), mask=there, other=0.0)
        there = (at < positions) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        place = (at // map_size * height + y) * width + x
        there = there[:, None] & (column < deep)[None, :]
        of_a = tl.load(a_from + place[:, None] * (groups * deep), mask=there, other=0.0)
        total = tl.dot(tl.trans(of_g), of_a, total, input_precision="ieee")
    filters = (example * groups + group) * wide + row
    into = found + (filters[:, None] * (TAPS_Y * TAPS_X) + tap) * deep + column[None, :]
    tl.store(into, total.to(found.dtype.element_ty), mask=(row < wide)[:, None] & (column < deep)[None, :])


@triton.jit
def _transpose_kernel(
    x, found, rows, columns, row_tiles, column_tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    number = tl.program_id(0)
    column = number % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    number = number // column_tiles
    row = number % row_tiles * ROWS + tl.arange(0, ROWS)
    first = (number // row_tiles).to(tl.int64) * rows * columns
    there = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(x + first + row[:, None] * columns + column[None, :], mask=there, other=0.0)
    tl.store(found + first + column[:, None] * rows + row[None, :], tl.trans(tile), mask=tl.trans(there))


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
