"""Refuse a model whose forward writes what it saw into itself, or draws random numbers.

What a forward leaves in the model escapes clip and noise: an EMA of activations, a codebook, a renormalized embedding,
a cache of the last features. What depends on shapes alone, cached positions say, is harmless. A counter is not: a later
call could do what none of these checks has seen, as a warm-up does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dpopt.grad_sample.nested import tensors_in
from dpopt.grad_sample.snapshot import Snapshot, same

Forward = Callable[[Tensor], Any]


def check_state(model: nn.Module, forward: Forward, inputs: Tensor, other: Tensor) -> set[str]:
    """Compare what two forwards on different inputs leave in the model.

    Args:
        model: restored afterwards.
        forward: calls it as it is, writes to buffers included.
        inputs: of a batch (N, …).
        other: of the same shape.

    Returns:
        Paths of numbers and tensors that a forward writes, whatever its inputs.

    Raises:
        ValueError: naming the module and the attribute that holds raw data.
    """
    before = Snapshot(model)
    left = []
    try:
        for x in (inputs, other):
            torch.manual_seed(0)  # what is drawn once and kept, random features say, is no data
            forward(x)
            left.append(before.differences())
            before.restore()
    finally:
        before.restore()
    one, two = left
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for path in [*one, *(path for path in two if path not in one)]:
        if path in before.parameters:
            raise ValueError(
                f"the forward of {owner(model, path)} writes the parameter {path}, past clip and noise: update it in "
                "the optimizer only (for max_norm and codebooks, drop the option or learn them by gradient)"
            )
        if path not in one or path not in two or not same(one[path], two[path]):
            kind = "buffer" if path in buffers else "attribute"
            raise ValueError(
                f"the forward of {owner(model, path)} writes what it sees of the data into the {kind} {path}, past "
                "clip and noise: keep it in a local variable, or freeze it with module.eval()"
            )
    return set(one)


def check_settled(model: nn.Module, forward: Forward, inputs: Tensor) -> None:
    """Refuse a model that a second forward on equal inputs changes once more, or that holds iterators.

    Buffers may change: the engine discards what a forward writes to them.

    Raises:
        ValueError: naming the module and the attribute.
    """
    before, buffers = Snapshot(model), {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for path in before.iterators():
        raise ValueError(
            f"{owner(model, path)} holds the iterator {path}, whose state cannot be compared from call to call: keep "
            "numbers in a list or a tensor"
        )
    left = []
    try:
        for _ in range(2):
            torch.manual_seed(0)
            forward(inputs)
            left.append(before.differences())
    finally:
        before.restore()
    one, two = left
    for path in {**one, **two}:
        if path not in buffers and not (path in one and path in two and same(one[path], two[path])):
            raise ValueError(
                f"the forward of {owner(model, path)} changes {path} with every call, so that a later call could do "
                "what was not checked: drop it, or derive it from the inputs"
            )


def check_repeatable(model: nn.Module, forward: Forward, inputs: Tensor, outputs: Any) -> Any:
    """Return the outputs of a forward that gave these outputs before, too.

    Raises:
        ValueError: naming the layer whose outputs differ between equal inputs.
    """
    again = forward(inputs)
    if not equal_outputs(outputs, again):
        outputs, again = again, forward(inputs)  # the first one may have chosen the kernels of this shape
    if not equal_outputs(outputs, again):
        name = first_difference(model, lambda: forward(inputs), lambda: forward(inputs), None, len(inputs))
        raise ValueError(
            f"{called(model, name)} gives different outputs for equal inputs: random numbers that are not keyed by "
            "example, or a state that no attribute shows, could not be replayed after a resume: remove them, or call "
            "eval() of that module"
        )
    return again


def equal_outputs(one: Any, other: Any) -> bool:
    """Tell whether two outputs hold the same tensors to the bit."""
    left, right = tensors_in(one), tensors_in(other)
    return len(left) == len(right) and all(same(x.detach(), y.detach()) for x, y in zip(left, right, strict=True))


def called(model: nn.Module, name: str | None) -> str:
    """Name a module in a message."""
    module = model if not name else dict(model.named_modules()).get(name, model)
    return f"layer '{name}' ({type(module).__name__})" if name else f"the model ({type(model).__name__})"


def owner(model: nn.Module, path: str) -> str:
    """Name the module that holds what lies at a path."""
    modules = dict(model.named_modules())
    name = path.partition("[")[0]
    while name not in modules:
        name = name.rpartition(".")[0]
    return called(model, name)


def first_difference(
    model: nn.Module, one: Callable[[], Any], other: Callable[[], Any], rows: Tensor | None, examples: int
) -> str | None:
    """Find the innermost module that makes different outputs of equal inputs; None if it cannot be told.

    Args:
        model: hooked for two runs.
        one: runs it.
        other: runs it again.
        rows: which examples are compared; None for all.
        examples: rows of a batch.
    """
    runs = []
    for run in (one, other):
        calls: list[tuple[str, list[Tensor | None], list[Tensor | None]]] = []
        pending: list[list[Tensor | None]] = []

        def digest(values: Any) -> list[Tensor | None]:
            return [_row_digest(x, rows, examples) for x in tensors_in(values)]

        def before(module: nn.Module, args: Any, kwargs: Any, pending: Any = pending) -> None:
            pending.append(digest((args, kwargs)))

        handles = []
        for name, module in model.named_modules():

            def after(m: Any, args: Any, output: Any, name: str = name, calls: Any = calls, p: Any = pending) -> None:
                calls.append((name, p.pop(), digest(output)))

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        runs.append(calls)
    for (name, left, out), (twin, right, changed) in zip(*runs, strict=False):
        if name != twin:
            return None
        if _alike(left, right) and None not in out and None not in changed and not _alike(out, changed):
            return name
    return None


def _alike(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    if len(one) != len(other):
        return False
    pairs = zip(one, other, strict=True)
    return all(x is not None and y is not None and same(x, y) for x, y in pairs)


def _row_digest(tensor: Tensor, rows: Tensor | None, examples: int) -> Tensor | None:
    """Numbers (N, 2) that equal rows share; None where examples do not come first."""
    if tensor.ndim == 0 or len(tensor) == 0 or len(tensor) % examples:
        return None
    flat = tensor.detach().reshape(examples, -1)
    flat = flat.abs().double() if flat.is_complex() else flat.double()
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(flat.shape[1], generator=generator, dtype=torch.float64).to(flat.device)
    found = (flat.nan_to_num(0.123, 1e100, -1e100) * weights).sum(1)
    found = torch.stack([found, torch.full_like(found, flat.shape[1])], 1)  # padding with zeros is a difference
    return found if rows is None else found[rows]
