"""What a run will take, before it starts: optimizer state counted on shapes alone, time measured on one micro-batch.

Each figure names its basis; what cannot be said is None.
"""

import contextlib
import copy
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dpopt.plan import PrivacyPlan
from dpopt.privacy.engine import LossFn, per_example_gradients

_PROBE_SECONDS = 0.2  # long enough to time, short enough not to be noticed


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds.

    Attributes:
        parameters: number of trainable parameters.
        optimizer_state_bytes: of the optimizer in question, counted by one step on shapes without memory.
        adam_state_bytes: of Adam on the same parameters, for comparison.
        memory_bytes: parameters, sums, optimizer state, weight average and per-example gradients of a micro-batch;
            activations are not in it.
        seconds: for all steps, from one timed micro-batch; None when it could not be timed.
    """

    parameters: int
    optimizer_state_bytes: int | None
    adam_state_bytes: int
    memory_bytes: int | None
    seconds: float | None


def estimate(
    model: nn.Module,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    loss_fn: LossFn,
    plan: PrivacyPlan,
    shape: tuple[int, ...],
    views: int,
    micro_batch: int,
    averaged: bool,
) -> Estimate:
    """Estimate a run of `model`, which is on the device and in the precision of the run."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trainable)
    state = _state_on_shapes(model, make_optimizer)
    memory = None
    if state is not None:
        everything = sum(p.numel() * p.element_size() for p in model.parameters())
        memory = everything * (2 if averaged else 1) + 4 * count * (1 + micro_batch) + state
    return Estimate(count, state, 8 * count, memory, _seconds(model, loss_fn, plan, shape, views, micro_batch))


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state, step counters of one element left out."""
    tensors = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
    return sum(t.numel() * t.element_size() for t in tensors if t.ndim)


def reset_peak_memory(device: torch.device) -> None:
    """Start counting the peak anew, so that a run in a sweep reports its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes since the last reset: allocated on a GPU, resident in the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _state_on_shapes(model: nn.Module, make_optimizer: Callable[..., torch.optim.Optimizer]) -> int | None:
    shadow = copy.deepcopy(model).to("meta")
    trainable = [p for p in shadow.parameters() if p.requires_grad]
    try:
        optimizer = make_optimizer(trainable)
        for parameter in trainable:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    except (NotImplementedError, RuntimeError):  # an operation without a shape-only form
        return None
    return optimizer_state_bytes(optimizer)


def _seconds(
    model: nn.Module, loss_fn: LossFn, plan: PrivacyPlan, shape: tuple[int, ...], views: int, micro_batch: int
) -> float | None:
    """Time growing micro-batches of zeros until one takes long enough to be believed."""
    reference = next(model.parameters())
    size, elapsed = 1, 0.0
    try:
        while True:
            inputs = torch.zeros(size, views, *shape, dtype=reference.dtype, device=reference.device)
            targets = torch.zeros(size, dtype=torch.long, device=reference.device)
            calls = []
            for _ in range(3):  # the first call pays for its memory, any call for other work on the machine
                start = time.perf_counter()
                _, losses = per_example_gradients(model, loss_fn, inputs, targets)
                float(losses.sum())
                calls.append(time.perf_counter() - start)
            elapsed = min(calls)
            if elapsed > _PROBE_SECONDS or 2 * size > micro_batch:
                return elapsed / size * plan.batch_size * plan.steps
            size *= 2
    except RuntimeError:
        return None
