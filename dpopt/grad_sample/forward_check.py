"""Refuse a model whose forward mixes examples: one example's input must not enter another's output.

One example in a few places of a batch of the real shape is replaced by what a batch may hold: NaN, ±1e30, noise of size
1e4, zeros, another example; tokens by other tokens. All other rows of the output must stay what they were, to the bit,
which in one shape they do (WRN-16-4 in fp32: 0.5 s per forward of 64, in float64 3.5 s). Where a kernel rounds
otherwise, a float64 copy decides, to 1e-9. An example must not notice its place in the batch, or the size of the batch,
either: capacities and cumulative sums do.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dpopt.grad_sample.modes import eval_mode
from dpopt.grad_sample.nested import output_tensors, tensors_in
from dpopt.grad_sample.state_check import called, equal_outputs, first_difference
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


def check_independence(
    model: nn.Module, forward: Forward, inputs: Tensor, outputs: Any, values: Iterable[Tensor], limits: Limits
) -> None:
    """Refuse a model in which a replaced example changes another's outputs.

    Args:
        model: for names.
        forward: (N, …) → outputs.
        inputs: N examples.
        outputs: those of `forward` on the inputs, all finite.
        values: what takes the place of the examples in `places`, one batch after the other.
        limits: what rounding may do.

    Raises:
        ValueError: naming the layer, where one can be told.
    """
    accepted, rounded = 0, []
    where = places(len(inputs))
    others = torch.tensor([i for i in range(len(inputs)) if i not in where], device=inputs.device)
    accepts = _probe(model, inputs)
    for new in values:
        if not accepts(new):
            continue
        changed = inputs.clone()
        changed[where] = new
        try:
            found = forward(changed)
        except Exception:  # what the model does not accept cannot enter it
            continue
        accepted += 1
        difference = _difference(outputs, found, others, len(inputs))
        if difference > 0:
            if difference > limits.rounding or limits.exact is None:
                _refuse_mixing(model, forward, inputs, changed, others)
            rounded.append(changed)
    if not accepted:
        raise ValueError(
            f"{called(model, None)} accepts none of the inputs with which its examples are told apart (another "
            "example, zeros, noise): pass inputs of the shape and range that the data have"
        )
    if rounded and limits.exact is not None:
        _decide_in_float64(model, limits.exact, inputs, rounded, others, forward)


def places(count: int) -> list[int]:
    """First, middle and last of at least four examples."""
    return [0, count // 2, count - 1]


def crowd(inputs: Tensor) -> Tensor:
    """Return the first example again and again, from the middle on with small changes.

    Neighbors meet here, and the capacity of an expert is exceeded.
    """
    crowded = inputs[:1].expand_as(inputs).clone()
    half = len(inputs) // 2
    if inputs.is_floating_point() or inputs.is_complex():
        noise = torch.randn(crowded[half:].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float32)
        crowded[half:] *= 1 + 0.01 * noise.to(inputs)  # no sign changes, which a logarithm would not take
    elif inputs.ndim == 1:
        crowded[half:] = inputs[half:]
    else:
        crowded[half:, ..., -1] = inputs[half:, ..., -1]
    return crowded


def short(inputs: Tensor) -> Iterator[Tensor]:
    """Yield inputs with an empty second half: a model may cut a batch to its longest row."""
    if inputs.ndim < 2 or inputs.shape[1] < 2:
        return
    floating = inputs.is_floating_point() or inputs.is_complex()
    for value in [0] if floating else {int(inputs.min()), int(inputs.max())}:
        cut = inputs.clone()
        cut[:, (inputs.shape[1] + 1) // 2 :] = value
        yield cut


def check_places(model: nn.Module, forward: Forward, inputs: Tensor, outputs: Any, limits: Limits) -> None:
    """Refuse outputs that depend on an example's place, its neighbors or the batch's size.

    Raises:
        ValueError: in one sentence.
    """
    half, first = [], []
    for number, base in enumerate([crowd(inputs), *short(inputs)]):
        found = _finite(forward, base)
        if found is None and number == 0:  # out of its range: without the small changes, then
            base = inputs[:1].expand_as(inputs).contiguous()
            found = _finite(forward, base)
        if found is None:
            continue
        check_independence(
            model, forward, base, found, itertools.islice(replacements(inputs), 1 + (number == 0)), limits
        )
        if number == 0:
            half = [x[: len(inputs) // 2] for x in tensors_in(found) if has_rows(x, len(inputs))]
            first = [x[:1].expand_as(x) for x in half]
    few = torch.tensor(places(len(inputs)), device=inputs.device)
    together = [x[few] if has_rows(x, len(inputs)) else x for x in tensors_in(outputs)]
    try:
        alone = tensors_in(forward(inputs[few].contiguous()))
    except Exception:  # a model that wants batches of one size
        alone = []
    for expected, found, what in ((first, half, "place in the batch"), (together, alone, "batch's size")):
        if not _agree(expected, found, limits.rounding):
            raise ValueError(
                f"{called(model, None)} gives an example other outputs with its {what}, which the other examples "
                f"decide (a capacity, a cumulative sum, statistics of the batch): {_FIX}"
            )


def _finite(forward: Forward, inputs: Tensor) -> Any:
    """Return the outputs; None where the model does not accept the inputs, or its outputs are not finite."""
    try:
        outputs = forward(inputs)
    except Exception:  # a model may raise anything
        return None
    return outputs if all(bool(x.isfinite().all()) for x in tensors_in(outputs)) else None


def _agree(expected: list[Tensor], found: list[Tensor], rounding: float) -> bool:
    if len(expected) != len(found) or any(x.shape != y.shape for x, y in zip(expected, found, strict=True)):
        return False
    return all(relative(x, y) <= rounding for x, y in zip(expected, found, strict=True))


def check_outputs(model: nn.Module, outputs: Any, count: int) -> None:
    """Refuse outputs without a row per example.

    Raises:
        ValueError: naming the type or the shapes.
    """
    found = tensors_in(outputs)
    if not found:
        raise ValueError(
            f"{called(model, None)} returns a {type(outputs).__name__} without tensors: return a tensor, or a tuple, "
            "list, dict or dataclass of tensors"
        )
    if not any(has_rows(x, count) for x in found):
        shapes = ", ".join(str(tuple(x.shape)) for x in found)
        raise ValueError(
            f"{called(model, None)} returns tensors of shape {shapes} for {count} examples: return the examples in the "
            "first dimension"
        )


def has_rows(tensor: Tensor, count: int) -> bool:
    """Tell whether a tensor has a row per example; one that has not must be the same for all batches."""
    return tensor.ndim > 0 and len(tensor) == count


@torch.no_grad()
def check_padding(model: nn.Module, tokens: Tensor) -> None:
    """Refuse a model of tokens whose outputs depend on the padding behind a text.

    How long a micro-batch is depends on its longest text, so padding would make one text change what others contribute.

    Args:
        model: reads tokens (N, T), with -1 for padding on the right.
        tokens: (N, T), without padding; their first halves are padded.

    Raises:
        ValueError: in one sentence.
    """
    short = tokens[:, : max(1, tokens.shape[1] // 2)]
    padded = torch.cat([short, torch.full_like(tokens[:, short.shape[1] :], -1)], 1)
    with eval_mode(model):
        alone, behind = output_tensors(model(short)), output_tensors(model(padded))
    for one, other in zip(alone, behind, strict=True):
        for dim, size in enumerate(one.shape):  # where there is an output for every position
            other = other.narrow(dim, 0, size) if other.ndim == one.ndim and other.shape[dim] > size else other
        limit = 1e-4 * one.nan_to_num(0, 0, 0).abs().max() if one.numel() else 0
        if one.shape != other.shape or not bool(((one == other) | ((one - other).abs() <= limit)).all()):
            raise ValueError(
                "the model's output for a text depends on the padding behind it, so one text would change what others "
                "of its micro-batch contribute: set model.pooling=mean, or choose another model"
            )


def replacements(inputs: Tensor) -> Iterator[Tensor]:
    """Yield what takes the place of the examples in `places`, the most harmless first."""
    generator = torch.Generator().manual_seed(3)
    where = places(len(inputs))
    count, shape = len(where), (len(where), *inputs.shape[1:])
    rows = inputs.roll(1 + len(inputs) // 3, 0)[where]
    if inputs.is_floating_point() or inputs.is_complex():
        normal = torch.randn(shape, generator=generator, dtype=torch.promote_types(inputs.dtype, torch.float32))
        noise = normal.to(inputs)
        yield torch.stack([rows[0], torch.zeros_like(rows[0]), rows[-1]])
        yield torch.stack([torch.zeros_like(rows[0]), rows[0], noise[0]])
        yield 1e4 * noise
        yield -1e4 * noise
        large = min(1e30, torch.finfo(inputs.dtype).max / 2)
        yield torch.stack([torch.full_like(rows[0], large * (-1) ** i) for i in range(count)])
        yield torch.stack([torch.full_like(rows[0], float("inf" if i == 1 else "nan")) for i in range(count)])
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


def _refuse_mixing(model: nn.Module, forward: Forward, inputs: Tensor, changed: Tensor, others: Tensor) -> NoReturn:
    try:
        name = first_difference(model, lambda: forward(inputs), lambda: forward(changed), others, len(inputs))
    except Exception:  # hooks that the model does not bear
        name = None
    raise ValueError(
        f"{called(model, name)} mixes the examples of a batch: replacing the input of one changes the outputs of "
        f"others, so no example has a gradient that a clip could bound: {_FIX}"
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
        if _difference(outputs[0], found, others, len(inputs)) > 1e-9:
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


def _difference(expected: Any, found: Any, rows: Tensor, count: int) -> float:
    """Largest difference in these rows, relative to the largest output; infinite where one is not finite."""
    left, right = tensors_in(expected), tensors_in(found)
    if len(left) != len(right) or any(x.shape != y.shape for x, y in zip(left, right, strict=True)):
        return float("inf")
    left, right = ([x[rows] if has_rows(x, count) else x for x in part] for part in (left, right))
    if equal_outputs(left, right):
        return 0.0
    return max(relative(x, y) for x, y in zip(left, right, strict=True))


def relative(one: Tensor, other: Tensor) -> float:
    """Largest difference relative to the largest value of `one`; infinite where either is not finite."""
    if one.numel() == 0 or torch.equal(one, other):
        return 0.0
    one, other = (x.to(torch.complex128 if x.is_complex() else torch.float64) for x in (one, other))
    found = float((one - other).abs().max() / one.abs().max().clamp(min=1e-30))
    return found if found == found else float("inf")
