"""The rules of convolutions (`dpopt.grad_sample.rules` says what a rule is)."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpopt.grad_sample.choices import fastest
from dpopt.grad_sample.norms import (
    Gradients,
    at_once,
    inner_products,
    kernels,
    never_short,
    of_pairs,
    squares_by_example,
    sum_wide,
)


def conv(module: nn.Conv1d | nn.Conv2d, a: Tensor, g: Tensor) -> Gradients:
    """Any stride, padding, dilation and number of groups."""
    found = {"bias": bias_gradient(g)}
    if module.weight.requires_grad:
        found["weight"] = conv_weight(module, a, g, squares_by_example)
    return found


def formed_on_chip(module: nn.Conv1d | nn.Conv2d, g: Tensor) -> bool:
    """Whether a kernel forms the gradients of a layer without writing them to memory; of one processor only."""
    return not g.is_cuda and (on_chip := kernels(g)) is not None and on_chip.convolves(g, g, module.groups)


def conv_norms_on_chip(module: nn.Conv1d | nn.Conv2d, a: Tensor, g: Tensor) -> Tensor:
    """Squared norms (B,) of `conv`'s gradients, where they are `formed_on_chip`."""
    form, squares = Form.of(module, a), torch.zeros(len(a), dtype=torch.float64, device=a.device)
    if module.weight.requires_grad:
        squares += kernels(g).conv_square_norms(form.a, in_2d(g), *form.how)[0]
    if module.bias is not None and module.bias.requires_grad:
        squares += squares_by_example(bias_gradient(g))
    return squares


def conv_sum_on_chip(
    module: nn.Conv1d | nn.Conv2d, a: Tensor, g: Tensor, weights: Tensor, filters: Any = None
) -> Gradients:
    """Σ weights[i]·gradient, of the same gradients; an example of weight zero may hold NaN.

    Args:
        module: the layer.
        a: input.
        g: output gradient.
        weights: (B,).
        filters: what standardized ones are.
    """
    form, bias, weights = Form.of(module, a), bias_gradient(g), weights.double()
    weight, gain = kernels(g).conv_weighted_sum(form.a, in_2d(g), *form.how, weights=weights, filters=filters)
    bias = weights @ bias.double().masked_fill((weights == 0)[:, None], 0.0)
    return {"weight": weight.view(module.weight.shape), "gain": gain, "bias": bias}


def bias_gradient(g: Tensor) -> Tensor:
    """(B, out) of an output gradient (B, K, out, …)."""
    return sum_wide(g.flatten(3), (1, 3))


def conv_ghost_norm(module: nn.Conv1d | nn.Conv2d, a: Tensor, g: Tensor) -> Tensor:
    """As for a linear layer, over what the filters meet: for maps so small that pairs of positions cost little."""
    g = by_position(module, g)
    products = of_pairs(products_met(module, a, g.shape[2]), inner_products(g), module.bias is not None)
    return never_short(*products, g.shape[2], g.dtype)


def products_met(module: Any, a: Tensor, positions: int) -> Tensor:
    """Inner products of what the filters meet at T positions of the output, (B, groups, T, T) float64."""
    image, kernel, _, _, (left, right, top, bottom) = _as_2d(module, a)
    pixels = image.shape[1] * (image.shape[3] + top + bottom) * (image.shape[4] + left + right)
    channels = image.shape[2] // module.groups
    # In products; to add up one shifted pair costs about 10 of them, and to copy and widen a value of a column 25.
    by_pixels = pixels**2 * (channels + 10 * sum(kernel))
    by_columns = positions * channels * kernel[0] * kernel[1] * (positions + 25)
    return products_of_pixels(module, a) if by_pixels < by_columns else inner_products(columns(module, a))


def products_of_pixels(module: Any, a: Tensor) -> Tensor:
    """Take `products_met` from inner products of pixels, which add up over the places of the kernel.

    Of pairs of pixels there are fewer by the number of places, if the output is as large as the input.
    """
    image, kernel, stride, dilation, padding = _as_2d(module, a)
    pixels = image.unflatten(2, (module.groups, -1)).permute(0, 2, 1, 4, 5, 3)  # (B, groups, K, h, w, n)
    found = inner_products(pixels.flatten(2, 4)).view(*pixels.shape[:5], *pixels.shape[2:5])
    found = F.pad(found, (*padding, 0, 0, *padding))
    for dim, k, s, d in zip((3, 4), kernel, stride, dilation, strict=True):
        windows = found.unfold(dim, d * (k - 1) + 1, s).unfold(dim + 3, d * (k - 1) + 1, s)
        found = functools.reduce(torch.add, windows.diagonal(dim1=-2, dim2=-1)[..., ::d].unbind(-1))
    return found.flatten(5).flatten(2, 4)


def columns(module: Any, a: Tensor) -> Tensor:
    """Arrange what the filters meet by position, (B, groups, T, n)."""
    examples, views = a.shape[:2]
    a, kernel, stride, dilation, padding = _as_2d(module, a)
    x = F.pad(a, padding).flatten(0, 1)
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    steps = [by * d for by, d in zip(x.stride()[2:], dilation, strict=True)]
    steps += [by * s for by, s in zip(x.stride()[2:], stride, strict=True)]
    met = x.as_strided((*x.shape[:2], *kernel, *sizes), (*x.stride()[:2], *steps))  # not F.unfold: a launch per image
    return by_position(module, met.reshape(examples, views, -1, *sizes))


def convolve(module: Any, a: Tensor, filters: Tensor) -> Tensor:
    """Convolve an input (B, K, in, …) with other filters than the module's, without a bias; (B, K, out, h, w)."""
    image, _, stride, dilation, padding = _as_2d(module, a)
    x = F.pad(image, padding).flatten(0, 1)
    return F.conv2d(x, filters.to(x), None, stride, 0, dilation, module.groups).unflatten(0, a.shape[:2])


def in_2d(g: Tensor) -> Tensor:
    """(B, K, out, h', w') of an output gradient; a Conv1d's has one row."""
    return g.reshape(*g.shape[:3], -1, g.shape[-1])


def by_position(module: Any, x: Tensor) -> Tensor:
    """Arrange (B, K, groups·n, …) by position, (B, groups, T, n)."""
    return x.flatten(3).unflatten(2, (module.groups, -1)).permute(0, 2, 1, 4, 3).flatten(2, 3)


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


def conv_weight(
    module: nn.Conv1d | nn.Conv2d,
    a: Tensor,
    g: Tensor,
    then: Callable[[Tensor], Any] | None = None,
    filters: Any = None,
) -> Tensor:
    """∂/∂weight (B, *weight shape) of an input (B, K, in, …) and an output gradient (B, K, out, …).

    Args:
        module: the layer.
        a: input.
        g: output gradient.
        then: what the caller does with the result, for the choice of the fastest way.
        filters: what standardized ones are, for a kernel that takes their norms, too.
    """
    form = Form.of(module, a)
    g = in_2d(g)
    if len(a) == 1:  # the sum of a batch
        found = _grouped(form, g)
    else:
        ways = {"grouped": _grouped, "one by one": _one_by_one, "columns": _by_columns}
        if a.is_cuda:
            ways = {"columns": ways.pop("columns"), **ways}
        if (on_chip := kernels(form.a)) is not None and on_chip.convolves(form.a, g, form.groups):
            ways = {"kernel": functools.partial(_by_kernel, on_chip, filters), **ways}
        name = form.name(g) + (f" for {then.__name__}" if then else "")
        found = fastest(name, a.device, {name: functools.partial(way, form, g) for name, way in ways.items()}, then)
    return found.squeeze(3) if module.weight.ndim == 3 else found


@dataclass(frozen=True)
class Form:
    """A convolution in two dimensions: its input (B, K, in, h, w), and the zeros left, right, above and below it."""

    a: Tensor
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, module: nn.Conv1d | nn.Conv2d, a: Tensor) -> "Form":
        a, kernel, stride, dilation, padding = _as_2d(module, a)
        return cls(a, kernel, stride, dilation, tuple(padding), module.groups)

    @property
    def how(self) -> tuple[tuple[int, int], ...]:
        """Kernel, stride, dilation, and zeros (above, left of) the input."""
        return self.kernel, self.stride, self.dilation, (self.padding[2], self.padding[0])

    def name(self, g: Tensor) -> str:
        """Of the weight gradient, for `fastest`."""
        how = f"{self.kernel} {self.stride} {self.dilation} {self.padding} {self.groups}"
        return f"convolution {how} {tuple(self.a.shape)} {tuple(g.shape)} {self.a.dtype}"


def _by_kernel(on_chip: Any, filters: Any, form: Form, g: Tensor) -> Tensor:
    options = {} if filters is None or form.a.is_cuda else {"filters": filters}
    found: Tensor = on_chip.conv_weight_gradient(form.a, g, *form.how, form.groups, **options)
    return found


def _grouped(form: Form, g: Tensor) -> Tensor:
    """Run one big convolution in which every example has its own groups."""
    examples, out, channels = len(g), g.shape[2], form.a.shape[2] // form.groups
    x, y = (t.transpose(0, 1).flatten(1, 2) for t in (form.a, g))  # (K, B·channels, h, w): a view where K is 1
    found = _weight_gradient(form, x, y, (examples * out, channels), examples * form.groups)
    return found.view(examples, out, channels, *form.kernel)


def _one_by_one(form: Form, g: Tensor) -> Tensor:
    """Make one call for every example."""
    out, channels = g.shape[2], form.a.shape[2] // form.groups
    result = g.new_empty(len(g), out, channels, *form.kernel)
    for i, (x, y) in enumerate(zip(form.a, g, strict=True)):
        result[i] = _weight_gradient(form, x, y, (out, channels), form.groups)
    return result


def _weight_gradient(form: Form, x: Tensor, y: Tensor, shape: tuple[int, int], groups: int) -> Tensor:
    """Of an ordinary convolution of (K, groups·in, h, w), by torch."""
    left, right, top, bottom = form.padding
    if left != right or top != bottom:
        x, left, top = F.pad(x, form.padding), 0, 0
    weight = x.new_empty(*shape, *form.kernel)
    options = (form.stride, (top, left), form.dilation, False, (0, 0), groups, (False, True, False))
    return torch.ops.aten.convolution_backward(y, x, weight, None, *options)[1]


def _by_columns(form: Form, g: Tensor) -> Tensor:
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
