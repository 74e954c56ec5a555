"""Inputs to try a model on: real ones where there are any, else noise or tokens that it accepts."""

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dpopt.grad_sample.nested import tensors_in
from dpopt.grad_sample.state_check import called


def trials(model: nn.Module, rows: Tensor, count: int, noise_first: bool = False) -> Iterator[Tensor]:
    """Yield batches (count, …) of examples that differ, in the form of the given rows.

    Args:
        model: whose embeddings say which tokens exist.
        rows: (n, …), real or not.
        count: examples.
        noise_first: try noise before the rows themselves, where inputs are no tokens.
    """
    generator = torch.Generator().manual_seed(2)
    shape = (count, *rows.shape[1:])
    given = [rows[torch.arange(count, device=rows.device) % len(rows)]] if differ(rows) else []
    if rows.is_floating_point() or rows.is_complex():
        dtype = torch.promote_types(rows.dtype, torch.float32)
        drawn = [draw(shape, generator=generator, dtype=dtype).to(rows) for draw in (torch.randn, torch.rand)]
        yield from [drawn[0], *given, drawn[1]] if noise_first else [*given, *drawn]
        return
    yield from given
    flat = rows.flatten()
    low, high = int(flat.min()), int(flat.max())
    if high > low:
        chosen = torch.randint(len(flat), (count * rows[0].numel(),), generator=generator)
        yield flat[chosen.to(flat.device)].view(shape)
    known = sorted({m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)})
    for size in [*[n for n in known if n > max(1, high)][:1], 2]:
        yield torch.randint(size, shape, generator=generator).to(rows)
    yield rows[torch.arange(count, device=rows.device) % len(rows)]


def other_than(inputs: Tensor, forward: Callable[[Tensor], Any]) -> Tensor:
    """Return a batch of other examples that the model accepts, too."""
    if inputs.is_floating_point() or inputs.is_complex():
        candidates = [0.5 * inputs.flip(0), inputs[:1].expand_as(inputs).contiguous()]
    else:
        candidates = [inputs.flatten()[0].expand_as(inputs).contiguous(), inputs[:1].expand_as(inputs).contiguous()]
    for other in candidates:
        try:
            forward(other)
        except Exception:  # out of its range
            continue
        return other
    return inputs


def differ(rows: Tensor) -> bool:
    """Tell whether there are two different examples."""
    return len(rows) > 1 and not torch.equal(rows, rows[:1].expand_as(rows))


def accepted(
    model: nn.Module, forward: Callable[[Tensor], Any], check: Callable[[Any, int], None], batches: Iterator[Tensor]
) -> tuple[Tensor, Any]:
    """Return the first batch whose outputs are finite, and the outputs.

    Raises:
        ValueError: when the model takes none of them.
    """
    problem: Exception | None = None
    for inputs in batches:
        try:
            outputs = forward(inputs)
        except Exception as error:  # a model may raise anything
            problem = problem or error
            continue
        check(outputs, len(inputs))
        finite = finite_rows(outputs, len(inputs))
        if not bool(finite.all()) and bool(finite.any()):
            kept = inputs[finite]
            inputs = kept[torch.arange(len(inputs), device=inputs.device) % len(kept)]
            outputs = forward(inputs)
        if bool(finite_rows(outputs, len(inputs)).all()):
            return inputs, outputs
    if problem is not None:
        raise ValueError(
            f"{called(model, None)} raised {type(problem).__name__} on inputs of shape {tuple(inputs.shape[1:])} and "
            f"type {inputs.dtype}: pass inputs that it accepts, or change the model"
        ) from problem
    raise ValueError(
        f"{called(model, None)} has outputs that are not finite, on noise as on the data, so nothing can be validated: "
        "check its initialization and the range of its inputs"
    )


def finite_rows(outputs: Any, count: int) -> Tensor:
    """Tell which rows of the outputs are finite, (N,)."""
    rows = [x for x in tensors_in(outputs) if x.ndim > 0 and len(x) == count]
    return torch.stack([x.isfinite().reshape(count, -1).all(1) for x in rows]).all(0)


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Move trainable parameters a little: a layer behind zeros shows nothing of what it does."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.add_((0.02 * torch.randn(p.shape, generator=generator, dtype=torch.float32)).to(p))


def float64_copy(model: nn.Module) -> nn.Module | None:
    """Copy a model in float64; None where it cannot be copied, or not within half of the free memory."""
    tensors = [*model.parameters(), *model.buffers()]
    if 2 * sum(8 * t.numel() for t in tensors) > _free_memory(tensors[0].device):
        return None
    try:
        return copy.deepcopy(model).double()
    except Exception:  # modules with handles, non-leaf tensors, locks
        return None


def in_float64(inputs: Tensor) -> Tensor:
    """Return floating-point inputs in float64, others as they are."""
    return inputs.double() if inputs.is_floating_point() else inputs


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4
