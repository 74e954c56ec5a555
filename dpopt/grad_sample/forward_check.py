"""Refuse a model whose forward mixes examples: one example's input must not enter another's output.

One example in a few places of a batch of the real shape is replaced by what a batch may hold: NaN, ±1e30, noise of size
1e4, zeros, another example; tokens by other tokens. All other rows of the output must stay what they were, to the bit,
which in one shape they do (WRN-16-4 in fp32: 0.5 s per forward of 64, in float64 3.5 s). Where a kernel rounds
otherwise, a float64 copy decides, to 1e-9. An example must not notice its place in the batch, or the size of the batch,
either: capacities and cumulative sums do.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dpopt.grad_sample.state_check import called, equal_outputs, first_difference, tensors_in
from dpopt.grad_sample.trial import in_float64

Forward = Callable[[Tensor], Any]
_FIX = (
    "compute it over each example alone (GroupNorm or LayerNorm instead of statistics of the batch), or train with "
    "privacy=none"
)


@dataclass(frozen=True)
class Limits:
    """What rounding may do.

    Attributes:
        rounding: of an output in the model's own dtype, relative to the largest output.
        exact: a float64 copy of the model; None where there is none, and rows must be equal to the bit.
    """

    rounding: float
    exact: nn.Module | None


def check_independence(model: nn.Module, forward: Forward, inputs: Tensor, outputs: Any, limits: Limits) -> None:
    """Refuse a model in which a replaced example changes another's outputs.

    Args:
        model: for names.
        forward: (N, …) → outputs.
        inputs: N examples, no two of them equal if possible.
        outputs: those of `forward` on the inputs, all finite.
        limits: what rounding may do.

    Raises:
        ValueError: naming the layer, where one can be told.
    """
    count, accepted, rounded = len(inputs), 0, []
    places = sorted({0, count // 2, count - 1})
    others = torch.tensor([i for i in range(count) if i not in places], dtype=torch.long, device=inputs.device)
    if len(others) == 0:
        places, others = places[:1], torch.arange(1, count, device=inputs.device)
    accepts = _probe(model, inputs)
    for values in replacements(inputs, len(places)):
        if not accepts(values):
            continue
        changed = inputs.clone()
        changed[places] = values
        try:
            found = forward(changed)
        except Exception:  # what the model does not accept cannot enter it
            continue
        accepted += 1
        difference = _difference(outputs, found, others)
        if difference > 0:
            if difference > limits.rounding or limits.exact is None:
                _refuse_mixing(model, forward, inputs, changed, others)
            rounded.append(changed)
    if not accepted:
        raise ValueError(
            f"{called(model, None)} accepts none of the inputs with which its examples are told apart (another example, "
            "zeros, noise): pass inputs of the shape and range that the data have"
        )
    if rounded and limits.exact is not None:
        _decide_in_float64(model, limits.exact, inputs, rounded, others, forward)


def check_places(model: nn.Module, forward: Forward, inputs: Tensor, outputs: Any, limits: Limits) -> None:
    """Refuse a model in which an example's outputs depend on its place or on the size of the batch.

    Raises:
        ValueError: in one sentence.
    """
    count = len(inputs)
    repeated = forward(inputs[:1].expand_as(inputs).contiguous())
    first = [x[:1].expand_as(x) for x in tensors_in(repeated)]
    few = torch.tensor(sorted({0, count // 2, count - 1}), device=inputs.device)
    together, alone = [x[few] for x in tensors_in(outputs)], tensors_in(forward(inputs[few].contiguous()))
    for expected, found, what in (
        (first, tensors_in(repeated), "place in the batch"),
        (together, alone, "batch's size"),
    ):
        if any(x.shape != y.shape for x, y in zip(expected, found, strict=True)) or not (
            max(relative(x, y) for x, y in zip(expected, found, strict=True)) <= limits.rounding
        ):
            raise ValueError(
                f"{called(model, None)} gives an example other outputs with its {what}, which the other examples decide "
                f"(a capacity, a cumulative sum, statistics of the batch): {_FIX}"
            )


def check_outputs(model: nn.Module, outputs: Any, count: int) -> None:
    """Refuse outputs that do not hold one row per example.

    Raises:
        ValueError: naming the type or the shape.
    """
    found = tensors_in(outputs)
    if not found:
        raise ValueError(
            f"{called(model, None)} returns a {type(outputs).__name__} without tensors: return a tensor, or a tuple, list "
            "or dict of tensors"
        )
    for tensor in found:
        if tensor.ndim == 0 or len(tensor) != count:
            raise ValueError(
                f"{called(model, None)} returns a tensor of shape {tuple(tensor.shape)} for {count} examples: return "
                "tensors with the examples in the first dimension"
            )


def replacements(inputs: Tensor, count: int) -> Iterator[Tensor]:
    """Yield values (count, …) for the examples in `count` places, the most harmless first."""
    generator = torch.Generator().manual_seed(3)
    shape = (count, *inputs.shape[1:])
    spread = inputs.roll(1 + len(inputs) // 3, 0)
    rows = spread[torch.linspace(0, len(inputs) - 1, count).long()]
    if inputs.is_floating_point() or inputs.is_complex():
        normal = torch.randn(shape, generator=generator, dtype=torch.promote_types(inputs.dtype, torch.float32))
        noise = normal.to(inputs)
        mild = [rows[0], torch.zeros_like(rows[0]), noise[0]]
        yield torch.stack([mild[i % 3] for i in range(count)])
        yield torch.stack([mild[(i + 1) % 3] for i in range(count)])
        yield 1e4 * noise
        yield torch.stack([torch.full_like(rows[0], 1e30 * (-1) ** i) for i in range(count)])
        yield torch.full_like(rows, float("nan"))
        return
    low, high = inputs.min(), inputs.max()
    flat = inputs.flatten()
    yield rows
    yield flat[torch.randperm(len(flat), generator=generator)[: rows.numel()].to(flat.device)].view(shape)
    ends = [torch.full_like(rows[0], int(low)), torch.full_like(rows[0], int(high))]
    yield torch.stack([ends[i % 2] for i in range(count)])
    yield torch.stack([ends[(i + 1) % 2] for i in range(count)])
    drawn = torch.rand(shape, generator=generator).to(inputs.device) * (high.double() - low.double() + 1)
    yield (low.double() + drawn.double()).floor().clamp(max=high.double()).to(inputs.dtype)


def _refuse_mixing(
    model: nn.Module, forward: Forward, inputs: Tensor, changed: Tensor, others: Tensor
) -> NoReturn:
    try:
        name = first_difference(model, lambda: forward(inputs), lambda: forward(changed), others, len(inputs))
    except Exception:  # hooks that the model does not bear
        name = None
    raise ValueError(
        f"{called(model, name)} mixes the examples of a batch: replacing the input of one changes the outputs of others, "
        f"so no example has a gradient that a clip could bound: {_FIX}"
    )


def _decide_in_float64(
    model: nn.Module, exact: nn.Module, inputs: Tensor, changed: list[Tensor], others: Tensor, forward: Forward
) -> None:
    """Tell rounding from mixing."""
    try:
        outputs = [exact(in_float64(x)) for x in (inputs, *changed)]
    except Exception:  # code that wants the dtype of the model
        _refuse_mixing(model, forward, inputs, changed[0], others)
    for x, found in zip(changed, outputs[1:], strict=True):
        if _difference(outputs[0], found, others) > 1e-9:
            _refuse_mixing(model, forward, inputs, x, others)


def _probe(model: nn.Module, inputs: Tensor) -> Callable[[Tensor], bool]:
    """Make a test of whether a model accepts values.

    On a GPU a failing lookup would end the process, so the values go through a copy on the CPU first.
    """
    if inputs.device.type == "cpu":
        return lambda values: True
    try:
        twin = copy.deepcopy(model).cpu()
        twin(inputs[:3].cpu())
    except Exception:  # without a CPU form: what is in range only
        return lambda values: bool((values.isfinite() & (values.abs() <= inputs.abs().max())).all())

    def accepts(values: Tensor) -> bool:
        try:
            twin(values.cpu())
        except Exception:
            return False
        return True

    return accepts


def _difference(expected: Any, found: Any, rows: Tensor) -> float:
    """Largest difference in these rows, relative to the largest output; infinite where one is not finite."""
    left, right = tensors_in(expected), tensors_in(found)
    if len(left) != len(right) or any(x.shape != y.shape for x, y in zip(left, right, strict=True)):
        return float("inf")
    if equal_outputs([x[rows] for x in left], [x[rows] for x in right]):
        return 0.0
    return max(relative(x[rows], y[rows]) for x, y in zip(left, right, strict=True))


def relative(one: Tensor, other: Tensor) -> float:
    """Largest difference relative to the largest value of `one`; infinite where either is not finite."""
    if one.numel() == 0 or torch.equal(one, other):
        return 0.0
    one, other = (x.to(torch.complex128 if x.is_complex() else torch.float64) for x in (one, other))
    found = float((one - other).abs().max() / one.abs().max().clamp(min=1e-30))
    return found if found == found else float("inf")
