"""The rules of convolutions, plain and weight-standardized (`dpopt.grad_sample.rules` says what a rule is)."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from dpopt.grad_sample.choices import fastest
from dpopt.grad_sample.norms import (
    Gradients,
    at_once,
    kernels,
    memory_order,
    never_short,
    pieces,
    position_norms,
    square_norms,
    sum_wide,
)
from dpopt.models.layers import StandardizedConv2d


def conv(module: nn.Conv1d | nn.Conv2d, a: Tensor, g: Tensor) -> Gradients:
    """Any stride, padding, dilation and number of groups."""
    found = {"bias": sum_wide(g.flatten(3), (1, 3))}
    if module.weight.requires_grad:
        found["weight"] = _conv_weight(module, a, g)
    return found


def conv_ghost_norm(module: nn.Conv1d | nn.Conv2d, a: Tensor, g: Tensor) -> Tensor:
    """As for a linear layer, over the unfolded input: for maps so small that pairs of positions cost little."""
    return position_norms(*_positions(module, a, g), module.bias is not None)


def _positions(module: Any, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Arrange what the filters meet, and the output gradient, by position."""
    examples, views, groups = *a.shape[:2], module.groups
    a, kernel, stride, dilation, padding = _as_2d(module, a)
    x = F.pad(a, padding).flatten(0, 1)
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    steps = [by * d for by, d in zip(x.stride()[2:], dilation, strict=True)]
    steps += [by * s for by, s in zip(x.stride()[2:], stride, strict=True)]
    met = x.as_strided((*x.shape[:2], *kernel, *sizes), (*x.stride()[:2], *steps))  # not F.unfold: a launch per image
    met = met.reshape(examples, views, groups, -1, sizes[0] * sizes[1])
    columns = met.permute(0, 2, 1, 4, 3).flatten(2, 3)  # (B, groups, T, n); the gradient: (B, groups, T, filters)
    return columns, g.reshape(examples, views, groups, g.shape[2] // groups, -1).permute(0, 2, 1, 4, 3).flatten(2, 3)


def _as_2d(module: nn.Conv1d | nn.Conv2d, a: Tensor) -> tuple[Tensor, Any, Any, Any, list[int]]:
    """Describe a convolution in two dimensions; a Conv1d has one row.

    Returns the input (B, K, in, h, w), kernel, stride, dilation, and padding with zeros (left, right, top, bottom).
    """
    padding = list(module._reversed_padding_repeated_twice)
    if module.padding_mode != "zeros":
        a = F.pad(a.flatten(0, 1), padding, module.padding_mode).unflatten(0, a.shape[:2])
        padding = [0] * len(padding)
    row = (1,) if a.ndim == 4 else ()
    kernel, stride, dilation = ((*row, *n) for n in (module.kernel_size, module.stride, module.dilation))
    return a.unsqueeze(3) if row else a, kernel, stride, dilation, [*padding, 0, 0] if row else padding


def _conv_weight(module: nn.Conv1d | nn.Conv2d, a: Tensor, g: Tensor) -> Tensor:
    """∂/∂weight (B, *weight shape) of an input (B, K, in, …) and an output gradient (B, K, out, …)."""
    form = _Form.of(module, a)
    g = g.reshape(*g.shape[:3], -1, g.shape[-1])
    if len(a) == 1:  # the sum of a batch
        found = _grouped(form, g)
    else:
        ways = {"grouped": _grouped, "one by one": _one_by_one, "columns": _by_columns}
        if a.is_cuda:
            ways = {"columns": ways.pop("columns"), **ways}
        if a.is_cuda and a.dtype == g.dtype != torch.float64 and kernels(a) is not None:
            ways = {"kernel": _by_kernel, **ways}
        found = fastest(form.name(g), a.device, {name: functools.partial(way, form, g) for name, way in ways.items()})
    return found.squeeze(3) if module.weight.ndim == 3 else found


@dataclass(frozen=True)
class _Form:
    """A convolution in two dimensions: its input (B, K, in, h, w), and the zeros left, right, above and below it."""

    a: Tensor
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, module: nn.Conv1d | nn.Conv2d, a: Tensor) -> "_Form":
        a, kernel, stride, dilation, padding = _as_2d(module, a)
        return cls(a, kernel, stride, dilation, tuple(padding), module.groups)

    def name(self, g: Tensor) -> str:
        """Of the weight gradient, for `fastest`."""
        how = f"{self.kernel} {self.stride} {self.dilation} {self.padding} {self.groups}"
        return f"convolution {how} {tuple(self.a.shape)} {tuple(g.shape)} {self.a.dtype}"


def _by_kernel(form: _Form, g: Tensor) -> Tensor:
    left, _, above, _ = form.padding
    options = form.kernel, form.stride, form.dilation, (above, left), form.groups
    found: Tensor = kernels(form.a).conv_weight_gradient(form.a, g, *options)
    return found


def _grouped(form: _Form, g: Tensor) -> Tensor:
    """Run one big convolution in which every example has its own groups."""
    examples, out, channels = len(g), g.shape[2], form.a.shape[2] // form.groups
    x, y = (t.transpose(0, 1).flatten(1, 2) for t in (form.a, g))  # (K, B·channels, h, w): a view where K is 1
    found = _weight_gradient(form, x, y, (examples * out, channels), examples * form.groups)
    return found.view(examples, out, channels, *form.kernel)


def _one_by_one(form: _Form, g: Tensor) -> Tensor:
    """Make one call for every example."""
    out, channels = g.shape[2], form.a.shape[2] // form.groups
    result = g.new_empty(len(g), out, channels, *form.kernel)
    for i, (x, y) in enumerate(zip(form.a, g, strict=True)):
        result[i] = _weight_gradient(form, x, y, (out, channels), form.groups)
    return result


def _weight_gradient(form: _Form, x: Tensor, y: Tensor, shape: tuple[int, int], groups: int) -> Tensor:
    """Of an ordinary convolution of (K, groups·in, h, w), by torch."""
    left, right, top, bottom = form.padding
    if left != right or top != bottom:
        x, left, top = F.pad(x, form.padding), 0, 0
    weight = x.new_empty(*shape, *form.kernel)
    options = (form.stride, (top, left), form.dilation, False, (0, 0), groups, (False, True, False))
    return torch.ops.aten.convolution_backward(y, x, weight, None, *options)[1]


def _by_columns(form: _Form, g: Tensor) -> Tensor:
    """Batched matrix products over what the columns of the kernel meet, channels last.

    The input is laid out as (B·groups, sh, K·rows·width, kw·in): rows r, r + sh, … together. Then what row dy of the
    kernel meets is a contiguous stretch for all positions of the output, and the gradient is kh batched products over
    the positions.
    """
    a, (examples, views, out, height, width) = form.a, g.shape
    (kh, kw), (sh, sw), (dh, dw), groups = form.kernel, form.stride, form.dilation, form.groups
    left, right, top, bottom = form.padding
    channels = a.shape[2] // groups
    rows = -(-(a.shape[3] + top + bottom) // sh)
    length = ((views - 1) * rows + height) * width
    result = a.new_empty(examples * groups, kh, out // groups, kw * channels)
    count = at_once(a, a.shape[2] * kw * sh * views * rows * width)
    for start in range(0, examples, count):
        y = g[start : start + count].transpose(1, 2)
        x = F.pad(a[start : start + count].flatten(0, 1), (left, right, top, rows * sh - a.shape[3] - top))
        x = x.contiguous(memory_format=torch.channels_last)
        by_image, by_channel, by_row, by_column = x.stride()
        sizes = (len(y), groups, sh, views, rows, width, kw, channels)
        steps = (views * by_image, channels * by_channel, by_row, by_image, sh * by_row, sw * by_column, dw * by_column)
        met = x.as_strided(sizes, (*steps, by_channel))
        met = met.reshape(len(y) * groups, sh, views * rows * width, kw * channels)
        if views > 1:  # y in the pitch of x: rows between the views are zero
            y = F.pad(y, (0, 0, 0, rows - height))
        y = y.reshape(len(y) * groups, out // groups, -1)[:, :, :length]
        into = result[start * groups :][: len(y)]
        for dy in range(kh):
            phase, first = dy * dh % sh, dy * dh // sh * width
            torch.bmm(y, met[:, phase, first : first + length], out=into[:, dy])
    result = result.view(examples, groups, kh, out // groups, kw, channels)
    return result.permute(0, 1, 3, 5, 2, 4).flatten(1, 2) if groups > 1 else result[:, 0].permute(0, 2, 4, 1, 3)


# Weight standardization: the convolution sees s·τ·h, where h = (w − mean(w))/τ, filter by filter.


@dataclass(frozen=True)
class _Standardization:
    """With G = ∂/∂(standardized weight): ∂/∂w = s·(G − mean(G) − p·h·(h·G)) and ∂/∂gain = c·(h·G), for every filter.

    Attributes:
        direction: h, (out, n), the filter without its mean, over τ, about its norm.
        scale: s, (out,).
        project: p, (out,): 1, or 0 where τ is clamped.
        gain: c.
    """

    direction: Tensor
    scale: Tensor
    project: Tensor
    gain: float


def _how(module: Any) -> tuple[float, float, float]:
    """Floor, extra and factor: used is factor·gain·(w − mean(w))/τ, where τ² = max(‖w − mean(w)‖², floor) + extra.

    Ours has a floor of 1e-4, timm's adds n·eps.
    """
    if isinstance(module, StandardizedConv2d):
        return 1e-4, 0.0, 1.0
    count = module.weight[0].numel()
    return 0.0, count * module.eps, getattr(module, "scale", 1.0) * count**0.5


def _gain(module: Any) -> Tensor | None:
    return None if getattr(module, "gain", None) is None else module.gain.detach().flatten()


def _standardization(module: Any) -> _Standardization:
    (floor, extra, factor), gain = _how(module), _gain(module)
    weight = module.weight.detach().flatten(1)
    centered = weight - weight.mean(1, keepdim=True)
    square = centered.square().sum(1)
    length, project = (square.clamp(min=floor) + extra).sqrt(), (square > floor).to(square.dtype)
    scale = factor / length if gain is None else factor * gain / length
    return _Standardization(centered / length[:, None], scale, project, factor)


def standardized_conv(module: Any, a: Tensor, g: Tensor) -> Gradients:
    """Compute the plain convolution's gradients, with respect to the standardized weight."""
    return {"bias": sum_wide(g.flatten(3), (1, 3)), "weight": _conv_weight(module, _padded_to_same(module, a), g)}


def standardized_ghost_norm(module: Any, a: Tensor, g: Tensor) -> Tensor:
    """`standardized_norms` from positions: ‖G‖² is a quadratic form in a·aᵀ, ΣG and h·G are sums over positions.

    h·G takes a convolution with h, in fp32 where that is enough.
    """
    through = _standardization(module)
    columns, g = _positions(module, _padded_to_same(module, a), g)
    double, gradient = columns.double(), g.double()
    filters = through.direction.unflatten(0, (module.groups, -1)).mT.to(columns.dtype)
    inner = double @ double.mT
    sums = inner @ gradient, double.sum(3, keepdim=True)
    square, total = ((x * gradient).sum(2).flatten(1) for x in sums)
    unasked = _unasked(g)
    along = (_meet(*(double, filters.double()) if unasked else (columns, filters)) * gradient).sum(2).flatten(1)
    left = _left_of(through, square, total, along)
    if not unasked and bool((left < square / 20).any()):
        along = (_meet(double, filters.double()) * gradient).sum(2).flatten(1)
        left = _left_of(through, square, total, along)
    square = _through(module, through, left, along, {"bias": gradient.sum(2).flatten(1)})
    stretch = (through.scale.max().square() + through.gain**2).sqrt().clamp(min=1)  # the chain rule's, from the sum on
    squares = (inner.diagonal(dim1=-2, dim2=-1) + float(module.bias is not None)) * gradient.square().sum(3)
    return never_short(square, stretch * squares.sqrt().flatten(1).sum(1), columns.shape[2], g.dtype)


def _meet(columns: Tensor, filters: Tensor) -> Tensor:
    """(B, groups, T, n) times (groups, n, filters), all examples in one product."""
    return (columns.transpose(0, 1).flatten(1, 2) @ filters).unflatten(1, (len(columns), -1)).transpose(0, 1)


def _padded_to_same(module: Any, a: Tensor) -> Tensor:
    if not getattr(module, "same_pad", False):
        return a
    from timm.layers import pad_same

    return pad_same(a.flatten(0, 1), module.kernel_size, module.stride, module.dilation).unflatten(0, a.shape[:2])


def standardized_norms(module: Any, found: Gradients) -> Tensor:
    """In closed form from ΣG, ‖G‖² and h·G of every filter: the gradients of weight and gain are never formed.

    ‖∂/∂w‖² = s²·(‖G‖² − (ΣG)²/n − p·(2 − ‖h‖²)·(h·G)²). Where less than a twentieth of ‖G‖² is left, fp32 may have lost
    it, and these filters are done one by one in float64.
    """
    gradient = found["weight"]
    if kernels(gradient) is not None:
        return _norms_by_kernel(module, found)
    through = _standardization(module)
    h, project = through.direction, through.project
    parts, directions = _by_filter(gradient, h)
    square, total, along = torch.cat([_filter_sums(piece, directions) for piece in pieces(parts)], 1)
    left = _left_of(through, square, total, along)
    if _unasked(gradient):
        left = torch.cat([_left(piece.flatten(2), h, project) for piece in pieces(gradient)])
    elif bool((lost := left < square / 20).any()):
        filters = h.expand(len(gradient), -1, -1)
        left[lost] = _left(gradient[lost].flatten(1), filters[lost], project.expand_as(lost)[lost])
    return _through(module, through, left, along, found)


def _norms_by_kernel(module: Any, found: Gradients) -> Tensor:
    (parts, weight), gain = _by_filter(found["weight"], module.weight.detach()), getattr(module, "gain", None)
    counted = module.weight.requires_grad, gain is not None and gain.requires_grad
    given = weight.contiguous(), _gain(module), _how(module)
    norms: Tensor = kernels(parts).standardized_square_norms(parts, *given, counted)
    if module.bias is not None and module.bias.requires_grad:
        norms += square_norms(found["bias"])
    return norms


def _filter_sums(parts: Tensor, h: Tensor) -> Tensor:
    """‖G‖², ΣG and h·G of every filter, (3, B, out) float64, of G (B, P, out, n/P) and h (P, out, n/P)."""
    square = square_norms(parts.flatten(0, 2)).view(parts.shape[:3])
    return torch.stack([square, parts.sum(3).double(), (parts * h).sum(3).double()]).sum(2)


def _unasked(x: Tensor) -> bool:
    """Whether nothing should depend on values: a graph has no branches, and a GPU would have to be waited for."""
    return get_proxy_mode() is not None or x.is_cuda


def _left_of(through: _Standardization, square: Tensor, total: Tensor, along: Tensor) -> Tensor:
    """‖G − mean(G) − p·h·(h·G)‖² of every filter from ‖G‖², ΣG and h·G, (B, out) float64."""
    h = through.direction
    return square - total.square() / h.shape[1] - through.project * (2 - h.square().sum(1)) * along.square()


def _through(module: Any, through: _Standardization, left: Tensor, along: Tensor, found: Gradients) -> Tensor:
    """Squared norms (B,) of all trainable parameters of the layer."""
    norms = torch.zeros(len(left), dtype=torch.float64, device=left.device)
    if module.weight.requires_grad:
        norms += (through.scale.square() * left.clamp(min=0)).sum(1)
    if getattr(module, "gain", None) is not None and module.gain.requires_grad:
        norms += (through.gain * along).square().sum(1)
    if module.bias is not None and module.bias.requires_grad:
        norms += square_norms(found["bias"])
    return norms


def _left(rows: Tensor, h: Tensor, project: Tensor) -> Tensor:
    """‖G − mean(G) − p·h·(h·G)‖² of filters (…, n), in float64."""
    rows = rows.double()
    rows = rows - rows.mean(-1, keepdim=True)
    return (rows - (project * (rows * h).sum(-1))[..., None] * h).square().sum(-1)


def _by_filter(gradient: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(B, out, …) as (B, P, out, n/P) without moving it, where memory has P pieces of every filter; h alike."""
    order = memory_order(gradient)
    before, moved = order.index(1), gradient.permute(0, *order)
    pieces, length = moved.shape[1 : 1 + before].numel(), moved.shape[2 + before :].numel()
    shape = (pieces, gradient.shape[1], length)
    return moved.reshape(-1, *shape), h.view(gradient.shape[1:]).permute([i - 1 for i in order]).reshape(shape)


def standardized_pull_back(module: Any, sums: Gradients) -> Gradients:
    """From the standardized weight to weight and gain."""
    gradient, gain = sums["weight"].flatten(1), _gain(module)
    if (of := kernels(gradient)) is not None:
        weight, along = of.standardized_gradients(gradient, module.weight.detach().flatten(1), gain, _how(module))
    else:
        through = _standardization(module)
        along = (through.direction * gradient).sum(1)
        rest = gradient - gradient.mean(1, keepdim=True) - (through.project * along)[:, None] * through.direction
        weight, along = through.scale[:, None] * rest, through.gain * along
    found = {**sums, "weight": weight.view(module.weight.shape)}
    return found if gain is None else {**found, "gain": along.view(module.gain.shape)}
