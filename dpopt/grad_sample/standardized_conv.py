"""The rules of weight-standardized convolutions, dpopt's and timm's (`dpopt.grad_sample.rules` says what a rule is).

The convolution sees s·τ·h, where h = (w − mean(w))/τ, filter by filter.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.linalg import vector_norm

from dpopt.grad_sample.conv import (
    Form,
    bias_gradient,
    by_position,
    conv_sum_on_chip,
    conv_weight,
    convolve,
    in_2d,
    products_met,
)
from dpopt.grad_sample.norms import (
    CANCELLED,
    Gradients,
    at_once,
    by_example,
    kernels,
    memory_order,
    never_short,
    pieces,
    square_norms,
)
from dpopt.models.layers import StandardizedConv2d


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


def _filters(module: Any) -> Any:
    """All that kernels need to know about them."""
    return module.weight.detach(), _gain(module), _how(module), _counted(module)


def _standardization(module: Any, dtype: torch.dtype) -> _Standardization:
    (floor, extra, factor), gain = _how(module), _gain(module)
    weight = module.weight.detach().flatten(1).to(dtype)
    centered = weight - weight.mean(1, keepdim=True)
    square = vector_norm(centered, dim=1).square()
    length, project = (square.clamp(min=floor) + extra).sqrt(), (square > floor).to(square.dtype)
    scale = factor / length if gain is None else factor * gain / length
    return _Standardization(centered.div_(length[:, None]), scale, project, factor)


def standardized_conv(module: Any, a: Tensor, g: Tensor) -> Gradients:
    """Compute the plain convolution's gradients, with respect to the standardized weight."""

    def standardized_norms(weight: Tensor) -> Any:
        return _weight_norms_through(module, weight)

    a = _padded_to_same(module, a)
    return {"bias": bias_gradient(g), "weight": conv_weight(module, a, g, standardized_norms, _filters(module))}


def standardized_norms_on_chip(module: Any, a: Tensor, g: Tensor) -> Tensor:
    """`standardized_norms` of gradients that are `formed_on_chip`."""
    form = Form.of(module, _padded_to_same(module, a))
    found = kernels(g).conv_square_norms(form.a, in_2d(g), *form.how, filters=_filters(module))
    return _not_cancelled(*_with_bias(module, found, bias_gradient(g)))


def standardized_sum_on_chip(module: Any, a: Tensor, g: Tensor, weights: Tensor) -> Gradients:
    """Σ weights[i]·gradient of weight, gain and bias."""
    found = conv_sum_on_chip(module, _padded_to_same(module, a), g, weights, _filters(module))
    gain = getattr(module, "gain", None)
    return found if gain is None else {**found, "gain": found["gain"].view_as(gain)}


def standardized_ghost_norm(module: Any, a: Tensor, g: Tensor) -> Tensor:
    """`standardized_norms` from positions: ‖G‖² is a quadratic form in a·aᵀ, ΣG and h·G are sums over positions.

    h·G takes a convolution with h, in fp32 where that is enough, and the norm counts what it may be wrong by.
    """
    through, a, g = _standardization(module, torch.float64), _padded_to_same(module, a), by_position(module, g)
    positions, fan_in, gradient = g.shape[2], module.weight[0].numel(), g.double()
    filters = through.direction.view(module.weight.shape)
    inner = products_met(module, a, positions)
    met = inner.diagonal(dim1=-2, dim2=-1)[..., None].clamp(min=0).sqrt()
    products = (met * gradient.abs()).sum(2).flatten(1)  # their lengths, added up for every filter
    error_of_sums = (fan_in + positions) * torch.finfo(torch.float64).eps / 2 * products

    def over_positions(x: Tensor) -> Tensor:
        return (x * gradient).sum(2).flatten(1)

    def along_filters(x: Tensor) -> tuple[Tensor, Tensor]:
        along = over_positions(by_position(module, convolve(module, x, filters.to(x.dtype))))
        return along, fan_in * torch.finfo(x.dtype).eps / 2 * products + error_of_sums

    square = over_positions(inner @ gradient)
    channels = a.double().unflatten(2, (module.groups, -1)).sum(3)
    ones = channels.new_ones(module.groups, 1, *module.kernel_size)
    total = over_positions(by_position(module, convolve(module, channels, ones)))
    along, error = along_filters(a.double() if _unasked(g) else a)
    left = _left_of(through, square, total, along)
    if not _unasked(g) and bool((left < square / 20).any()):
        along, error = along_filters(a.double())
        left = _left_of(through, square, total, along)
    along = along.abs() + error
    taken_off = through.project * along * error + total.abs() * fan_in**-0.5 * error_of_sums
    square = _through(module, through, left.clamp(min=0) + 2 * taken_off, along)
    if module.bias is not None and module.bias.requires_grad:
        square += gradient.sum(2).flatten(1).square().sum(1)
    by_filter = met.square() * _stretch(module, through).view(gradient.shape[1], 1, -1) + float(module.bias is not None)
    lengths = (by_filter * gradient.square()).sum(3).sqrt()
    return never_short(square, lengths.flatten(1).sum(1), positions, g.dtype)


def _padded_to_same(module: Any, a: Tensor) -> Tensor:
    if not getattr(module, "same_pad", False):
        return a
    from timm.layers import pad_same

    return pad_same(a.flatten(0, 1), module.kernel_size, module.stride, module.dilation).unflatten(0, a.shape[:2])


def standardized_norms(module: Any, found: Gradients, scale: Gradients | None = None) -> Tensor:
    """In closed form from ΣG, ‖G‖² and h·G of every filter: the gradients of weight and gain are never formed.

    ‖∂/∂w‖² = s²·(‖G‖² − (ΣG)²/n − p·(2 − ‖h‖²)·(h·G)²). What is taken off may be far longer than what is left. It is
    in the sum of G over examples and would round others away there, so that a norm is at least a `CANCELLED`th of it.
    Scales may differ so much that more is taken off in training, which sums in float64 bear.
    """
    if scale is None:
        return _not_cancelled(*norms_through(module, found))
    squares, longest = _scaled_norms_through(module, found, scale)
    return torch.maximum(squares, longest * 1e-18)


def _not_cancelled(squares: Tensor, longest: Tensor) -> Tensor:
    return torch.maximum(squares, longest * CANCELLED**-2)


def _scaled_norms_through(module: Any, found: Gradients, scale: Gradients) -> tuple[Tensor, Tensor]:
    """`norms_through` of scaled gradients, formed in float64: a scale may magnify what float32 rounds away."""
    through, weight = _standardization(module, torch.float64), found["weight"]
    count, squares = at_once(weight[:0].double(), weight[0].numel()), []
    for start in range(0, len(weight), count):
        piece = {name: g[start : start + count].double() for name, g in found.items()}
        formed = standardized_pull_back(module, piece)
        scaled = [square_norms(by_example(formed[name] * by)) for name, by in scale.items()]
        longest = _at_most(module, through, piece["weight"].flatten(2).square().sum(2))
        squares.append(torch.stack([torch.stack(scaled).sum(0), longest]))
    square, longest = torch.cat(squares, 1)
    return square, longest * torch.stack([by.abs().max() for by in scale.values()]).max().double().square()


def norms_through(module: Any, found: Gradients) -> tuple[Tensor, Tensor]:
    """Squared norms of every example, and what they are at most for such ‖G‖², (B,) float64.

    Where less than a twentieth of ‖G‖² is left, fp32 may have lost it: these filters are done one by one, in float64.
    """
    return _with_bias(module, _weight_norms_through(module, found["weight"]), found["bias"])


def _weight_norms_through(module: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    known: tuple[Tensor, Tensor] | None = getattr(gradient, "through", None)
    if known is not None:
        return known
    return (_by_kernel if kernels(gradient) is not None else _by_torch)(module, gradient)


def _with_bias(module: Any, squares: tuple[Tensor, Tensor], gradient: Tensor) -> tuple[Tensor, Tensor]:
    if module.bias is None or not module.bias.requires_grad:
        return squares
    bias = square_norms(gradient)
    return squares[0] + bias, squares[1] + bias


def _by_torch(module: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    through = _standardization(module, torch.float64)
    h, project = through.direction, through.project
    parts, directions = _by_filter(gradient, h.to(torch.promote_types(gradient.dtype, torch.float32)))
    square, total, along = torch.cat([_filter_sums(piece, directions) for piece in pieces(parts)], 1)
    left = _left_of(through, square, total, along)
    if _unasked(gradient):
        left = torch.cat([_left(piece.flatten(2), h, project) for piece in pieces(gradient)])
    elif bool((lost := left < square / 20).any()):
        filters = h.expand(len(gradient), -1, -1)
        left[lost] = _left(gradient[lost].flatten(1), filters[lost], project.expand_as(lost)[lost])
    return _through(module, through, left, along), _at_most(module, through, square)


def _by_kernel(module: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    parts, weight = _by_filter(gradient, module.weight.detach())
    found: tuple[Tensor, Tensor] = kernels(parts).standardized_square_norms(
        parts, weight.contiguous(), _gain(module), _how(module), _counted(module)
    )
    return found


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
    twice = 2 - vector_norm(h, dim=1).square()
    return square - total.square() / h.shape[1] - through.project * twice * along.square()


def _counted(module: Any) -> tuple[bool, bool]:
    """Whether weight and gain are trained."""
    gain = getattr(module, "gain", None)
    return module.weight.requires_grad, gain is not None and gain.requires_grad


def _through(module: Any, through: _Standardization, left: Tensor, along: Tensor) -> Tensor:
    """Squared norms (B,) of weight and gain."""
    weight, gain = _counted(module)
    by_filter = torch.zeros_like(left)
    if weight:
        by_filter += through.scale.square() * left.clamp(min=0)
    if gain:
        by_filter += (through.gain * along).square()
    return by_filter.sum(1)


def _stretch(module: Any, through: _Standardization) -> Tensor:
    """(out,): the chain rule from G to weight and gain, a linear function, lengthens squares by this at most."""
    weight, gain = _counted(module)
    return weight * through.scale.square() + gain * through.gain**2


def _at_most(module: Any, through: _Standardization, square: Tensor) -> Tensor:
    """Bound squared norms (B,) by ‖G‖² of filters (B, out), not read where neither weight nor gain is trained."""
    stretch = _stretch(module, through)
    return torch.where(stretch > 0, stretch * square, 0.0).sum(1)


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
    """From the standardized weight to weight and gain, of sums or of every example."""
    gradient, gain = sums["weight"].flatten(-3), _gain(module)
    if gradient.ndim == 2 and (of := kernels(module.weight)) is not None:
        weight, along = of.standardized_gradients(gradient, module.weight.detach().flatten(1), gain, _how(module))
    else:
        through = _standardization(module, gradient.dtype)
        along = (through.direction * gradient).sum(-1)
        rest = gradient - gradient.mean(-1, keepdim=True) - (through.project * along)[..., None] * through.direction
        weight, along = through.scale[:, None] * rest, through.gain * along
    found = {**sums, "weight": weight.view(sums["weight"].shape)}
    return found if gain is None else {**found, "gain": along.view(*along.shape[:-1], *module.gain.shape)}
