"""What a run will take, before it starts: optimizer state counted on shapes alone, time measured on one micro-batch.

Each figure names its basis; what cannot be said is None.
"""

import contextlib
import copy
import ctypes
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dpopt.grad_sample.engine import GradSampler
from dpopt.privacy.plan import PrivacyPlan
from dpopt.runs.result import Estimate

_ACTIVATIONS = 1.3  # of what the forward keeps: gradients of activations and working memory come on top
STEP_INFO = {"noise_std": 1.0, "pre_clip_scaled": True}  # what optimizers must be told before a step
_PROBE_SECONDS = 0.2  # long enough to time, short enough not to be noticed


def estimate_cost(
    engine: GradSampler,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    plan: PrivacyPlan,
    example: tuple[Tensor, Tensor],
    micro_batch: int,
    averaged: bool,
    points: int = 1,
) -> Estimate:
    """Estimate a run of the engine's model, which is on the device and in the precision of the run.

    Args:
        engine: a private one has been validated.
        make_optimizer: of the trainable parameters.
        plan: its batches and steps.
        example: an input (K, …) and its target, any.
        micro_batch: examples of a micro-batch.
        averaged: whether an average of the weights is kept.
        points: gradients that a step takes.
    """
    engine = engine.twin(engine.model, engine.loss_fn, engine.precision)  # sizes that no step has are not measured
    model, (inputs, target) = engine.model, example
    trainable = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trainable)
    state = _state_on_shapes(model, make_optimizer)
    memory: float | None = None
    if state is not None:
        everything = sum(p.numel() * p.element_size() for p in model.parameters())
        memory = everything * (2 if averaged else 1) + 4 * count + state
        memory += 4 * count * (plan.mechanism.kept if plan.noise_multiplier else 0)  # noises of earlier steps
        gradients = 4 * count if engine.validated else 0
        memory += micro_batch * (_ACTIVATIONS * activation_bytes(engine, inputs) + gradients)
    seconds = _seconds(engine, plan, inputs, target, micro_batch)
    seconds = None if seconds is None else points * seconds
    return Estimate(count, state, 8 * count, None if memory is None else int(memory), micro_batch, seconds)


def fit_micro_batch(engine: GradSampler, inputs: torch.Tensor, budget: int, most: int) -> tuple[int, int]:
    """Find the largest micro-batch that fits a budget.

    Also return what it leaves for stored gradients, in bytes.
    Where fewer than eight examples would fit with their gradients stored, room is made by recomputing.

    Args:
        engine: of the model.
        inputs: of one example (K, …), any.
        budget: bytes for activations and per-example gradients.
        most: examples at most.
    """
    activations = _ACTIVATIONS * activation_bytes(engine, inputs)
    gradient = 4 * sum(p.numel() for p in engine.model.parameters() if p.requires_grad)
    fitting = int(budget / (activations + gradient * (2 if engine.policy == "vmap" else 1)))
    few = min(8, most)
    size = min(most, fitting) if fitting >= few else max(1, min(few, int(budget / (2 * activations))))
    return size, max(0, budget - int(size * activations * (1 if fitting >= few else 2)))


def activation_bytes(engine: GradSampler, inputs: torch.Tensor) -> int:
    """Bytes that the forward of one example (K, …) keeps for the backward, parameters left out."""
    parameters = {p.data_ptr() for p in engine.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), engine.autocast():
        outputs = engine.forward({}, inputs)
    return sum(kept.values()) + outputs.numel() * outputs.element_size()


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state, step counters of one element left out."""
    tensors = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
    return sum(t.numel() * t.element_size() for t in tensors if t.ndim)


def reset_peak_memory(device: torch.device) -> None:
    """Give freed memory back and start counting the peak again.

    A run in a sweep then reports its own peak.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
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
        for group in optimizer.param_groups:  # as `PrivateGradient.update_param_groups` does
            group.update({name: value for name, value in STEP_INFO.items() if name in group})
        for parameter in trainable:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    except (NotImplementedError, RuntimeError):  # an operation without a shape-only form
        return None
    return optimizer_state_bytes(optimizer)


def _seconds(engine: GradSampler, plan: PrivacyPlan, inputs: Tensor, target: Tensor, micro_batch: int) -> float | None:
    """Time growing micro-batches until one takes long enough to be believed.

    Next to other work a call may wait longer for its threads than it computes. Then twice the examples take about as
    long, and more are tried.
    """
    parameters = [p for p in engine.model.parameters() if p.requires_grad]
    values = {name: p.detach() for name, p in engine.model.named_parameters() if p.requires_grad}
    size, before = 1, math.inf
    try:
        while True:
            batch = inputs.expand(size, *inputs.shape)
            targets = target.expand(size, *target.shape)
            calls = []
            for _ in range(3):  # the first call pays for its memory, any call for other work on the machine
                start = time.perf_counter()
                if engine.validated:
                    float(engine.sample_at(values, batch, targets).norms.sum())
                else:
                    with engine.autocast():
                        loss = engine.loss_fn(
                            engine.forward({}, batch.flatten(0, 1)), targets.repeat_interleave(len(inputs), 0)
                        )
                    float(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)[0].sum())
                calls.append(time.perf_counter() - start)
            elapsed = min(calls)
            enough = _PROBE_SECONDS if elapsed > 1.5 * before else 10 * _PROBE_SECONDS
            if elapsed > enough or 2 * size > micro_batch:
                return elapsed / size * plan.batch_size * plan.steps
            size, before = 2 * size, elapsed
    except RuntimeError:
        return None


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of returning it: a CPU run frees and faults in gigabytes per step.

    On two cores of an AMD EPYC the per-sample gradients of WRN-16-4's convolutions take 94 ms where they took 233.
    Other C libraries are left as they are.
    """
    trim_threshold, mmap_max = -1, -4  # the names of <malloc.h>
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)  # what is mapped by itself goes back to the system when it is freed
        libc.mallopt(trim_threshold, 2**31 - 1)
