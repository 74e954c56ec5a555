"""What a run is made of, built from its configuration: device, plan, schedule, data.

Each function refuses, in one sentence, what could not be trained as asked, before a run directory is made.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dpopt.config import Config, build
from dpopt.data.datasets import DataSpec
from dpopt.data.sources import Source, as_source
from dpopt.estimate import fit_micro_batch
from dpopt.grad_sample.engine import GradSampler
from dpopt.grad_sample.validate import validate_against_autograd
from dpopt.optim.schedules import ClipRate
from dpopt.privacy.clipping import Adaptive, ClipRule
from dpopt.privacy.plan import PrivacyPlan
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.rng import RandomKey


def make_device(name: str) -> torch.device:
    """The device of a name; `auto` is a GPU where there is one, and where there are several they take turns by job."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("DPOPT_JOB", "0")) % torch.cuda.device_count())
    try:
        return torch.empty(1, device=torch.device(name)).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has several words for it
        raise ValueError(f"device={name} cannot be used here: use device=cpu or auto") from error


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of returning it: a CPU run frees and faults in gigabytes per step.

    On two cores the small CNN on CIFAR-10 goes from 390 to 1,109 examples/s. Other C libraries are left as they are.
    """
    trim_threshold, mmap_threshold = -1, -3  # the names of <malloc.h>
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 32 << 20)  # the largest that glibc accepts
        libc.mallopt(trim_threshold, 2**31 - 1)


def make_plan(config: Config, spec: DataSpec, clip: ClipRule | None) -> PrivacyPlan:
    """The privacy plan of a configuration; without privacy, the same plan with σ = 0.

    An adaptive clip rule that leaves the noise of its count open gets a twentieth of the batch size.
    """
    size = spec.train_size - round(config.holdout * spec.train_size)
    budget = {"epsilon": config.epsilon, "noise_multiplier": config.noise_multiplier}
    return PrivacyPlan.calibrate(
        **(budget if config.private else {"epsilon": float("inf")}),
        steps=config.steps,
        epochs=config.epochs,
        delta=config.delta,
        dataset_size=size,
        batch_size=config.batch_size,
        accountant=config.accountant,
        count_noise=(clip.count_noise or config.batch_size / 20) if isinstance(clip, Adaptive) else 0.0,
    )


def make_engine(config: Config, model: nn.Module, inputs: torch.Tensor) -> tuple[GradSampler, int]:
    """The engine, proved if the run is private, and the size of a micro-batch.

    Args:
        config: the configuration.
        model: the model, on its device.
        inputs: of one example (K, …), any.
    """
    engine = GradSampler(model, F.cross_entropy, config.engine, precision=config.precision, compiled=config.compile)
    if config.private and takes_gradients(config):
        validate_against_autograd(engine, inputs[None], torch.zeros(1, dtype=torch.long, device=inputs.device))
    budget = _memory(inputs.device) if config.memory is None else int(config.memory * 1e9)
    # A batch of many micro-batches wastes little on padding the last one.
    most = min(config.batch_size, max(64, config.batch_size // 8))
    size, engine.memory = fit_micro_batch(engine, inputs, budget, most)
    return engine, size if config.micro_batch == "auto" else int(config.micro_batch)


def takes_gradients(config: Config) -> bool:
    """Whether the estimator takes gradients of examples; else it is content with their losses."""
    return bool(build("estimator", config.estimator).func.takes_gradients)  # type: ignore[attr-defined]


def make_private(
    config: Config, engine: GradSampler, clip: ClipRule | None, optimizer: torch.optim.Optimizer, filtered: Any
) -> Callable[..., PrivateGradient]:
    """(plan, start) → the way from batches to `p.grad`, with what optimizer and filter have to say about it."""
    make = build("estimator", config.estimator)

    def private(plan: PrivacyPlan, start: int = 0) -> PrivateGradient:
        if config.compile and (filtered or hasattr(optimizer, "pre_clip_scale") or not takes_gradients(config)):
            raise ValueError("compile=true does not go with a scale, a filter or estimator=zeroth_order: drop it")
        seams = {
            "pre_clip_scale": getattr(optimizer, "pre_clip_scale", None),
            "query_points": filtered.query_points if filtered else None,
        }
        options = {"engine": engine, "diagnostics": config.diagnostics, **seams}
        made: PrivateGradient = make(engine.model, F.cross_entropy, plan, clip, start=start, **options)
        return made

    return private


def _memory(device: torch.device) -> int:
    """Bytes that a run may take by itself: not of what is free, so that a resumed run does as the first one did."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 2
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (ValueError, OSError, AttributeError):
        return 4 << 30


def check_shapes(model: nn.Module, spec: DataSpec) -> None:
    """Refuse a model that cannot read the data set's inputs, before anything is made."""
    reference = next(model.parameters())
    inputs = torch.zeros(2, *spec.shape, dtype=reference.dtype, device=reference.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            shape = tuple(model(inputs).shape)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"the model does not accept {spec.name}'s inputs of shape {spec.shape} ({str(error).splitlines()[0]}): "
            "change the model's arguments or the data set's image_size"
        ) from error
    model.train(was_training)
    if shape != (2, spec.classes):
        raise ValueError(f"the model's output has shape {shape[1:]} where {spec.name} has {spec.classes} classes")


def make_schedule(
    config: Config, optimizer: torch.optim.Optimizer, plan: PrivacyPlan, clip: ClipRule | None
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning-rate schedule; a length that the configuration leaves null is the number of steps."""
    lengths = {name: plan.steps for name in ("T_max", "total_iters", "total_steps")}
    node = {k: lengths.get(k, v) if v is None else v for k, v in config.schedule.items()}
    schedule: torch.optim.lr_scheduler.LRScheduler = build("schedule", node)(optimizer)
    if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError(
            "schedule=ReduceLROnPlateau follows a metric of private data: use a schedule of the step alone"
        )
    if isinstance(schedule, ClipRate) and clip is not None:
        if not isinstance(clip, Adaptive):
            raise ValueError(
                "schedule=clip_rate follows a privatised clip rate: choose clipping=adaptive, which has one"
            )
        if abs(1 - clip.quantile - schedule.target) > 1e-6:
            raise ValueError(
                f"clipping.quantile={clip.quantile:g} clips {1 - clip.quantile:.4g} of the examples; aiming at another "
                f"rate, the learning rate would run to its bound: set schedule.target={1 - clip.quantile:.4g}"
            )
    return schedule


def load_data(config: Config, spec: DataSpec, device: torch.device) -> tuple[Source, Source, Source | None]:
    """Training, test and held-out data; the hold-out is split off by the seed."""
    loaded = spec.load(Path(config.data_dir).expanduser(), device, config.workers)
    train, test = (as_source(part, device, config.workers) for part in loaded)
    if len(train) != spec.train_size:
        raise ValueError(f"{spec.name} has {len(train):,} training examples, not {spec.train_size:,} as announced")
    held = round(config.holdout * len(train))
    if not held:
        return train, test, None
    order = torch.argsort(RandomKey.from_seed(config.seed).uniform(len(train), "split"))
    return train.subset(order[held:].sort().values), test, train.subset(order[:held].sort().values)
