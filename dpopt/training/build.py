"""Build what a run is made of from its configuration: the only place where components are built.

Each function refuses, in one sentence, what could not be trained as asked, before a run directory is made.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpopt.config.components import accepted, build, estimator_takes
from dpopt.config.schema import Config
from dpopt.data.datasets import DataSpec
from dpopt.data.fingerprint import module_fingerprint
from dpopt.grad_sample.engine import GradSampler
from dpopt.grad_sample.model_check import check_model
from dpopt.grad_sample.validate import validate
from dpopt.models.layers import standardizing
from dpopt.models.pretrained import is_named_by_configuration
from dpopt.optim.schedules import ClipRate
from dpopt.privacy.canaries import Canaries
from dpopt.privacy.clipping import Adaptive, ClipRule
from dpopt.privacy.plan import PrivacyPlan
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.rng import RandomKey
from dpopt.tasks import TASKS, Task
from dpopt.training.cost import fit_micro_batch
from dpopt.training.distributed import local_rank, world_size
from dpopt.training.initial_weights import (
    describe_initial_weights,
    load_run,
    model_node,
    split_weights,
)

_LARGE = 2560  # examples of a micro-batch that keep a GPU busy


@dataclass
class Components:
    """Everything that a run is made of, but its data and its directory.

    Attributes:
        config: where it comes from.
        task: loss, metrics and checks.
        device: where the model lies.
        model: on its device.
        clip: the clip rule; None for the non-private control.
        plan: the privacy plan, not yet under the run's key.
        engine: takes per-sample gradients; validated if the run is private.
        micro_batch: examples whose gradients are held at once.
        make_optimizer: parameters → optimizer.
        optimizer: of the trainable parameters.
        schedule: of the learning rate.
        filter: between `p.grad` and the optimizer; None for none.
    """

    config: Config
    task: Task
    device: torch.device
    model: nn.Module
    clip: ClipRule | None
    plan: PrivacyPlan
    engine: GradSampler
    micro_batch: int
    make_optimizer: Callable[..., torch.optim.Optimizer]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    filter: Any

    @property
    def example(self) -> tuple[Tensor, Tensor]:
        """An input (K, …) and its target, to measure with."""
        return self.task.example(self.config.views, next(self.model.parameters()))

    def private_gradient(self, plan: PrivacyPlan, start: int = 0, canaries: Canaries | None = None) -> PrivateGradient:
        """Make the way from batches to `p.grad`, wired to the optimizer's scale and the filter.

        Raises:
            ValueError: for components that do not go together.
        """
        config, scale = self.config, getattr(self.optimizer, "pre_clip_scale", None)
        make = build("estimator", config.estimator)
        if config.compile and (self.filter or scale is not None or estimator_takes(config) != "gradients"):
            raise ValueError("compile=true does not go with a scale, a filter or another estimator: drop it")
        made: PrivateGradient = make(
            self.model,
            self.task.loss_fn,
            plan,
            self.clip,
            start=start,
            engine=self.engine,
            diagnostics=config.diagnostics,
            pre_clip_scale=scale,
            query_points=self.filter.query_points if self.filter else None,
            canaries=canaries,
        )
        return made

    @property
    def model_arguments(self) -> dict[str, Any]:
        """The model's arguments, defaults included."""
        return model_node(self.config)

    def initial_weights(self) -> str:
        """Fingerprint the model as it is now, unless its configuration alone decides its weights."""
        return "" if is_named_by_configuration(self.model_arguments) else module_fingerprint(self.model)

    def public_facts(self) -> dict[str, str]:
        """Name what the run takes as public, for the privacy card."""
        constants = self.task.spec.constants or "none stated; constants computed from the training data are outside ε"
        constants += "; then channels by statistics of the training data, in ε" if self.plan.statistics_noise else ""
        facts = {"initial weights": describe_initial_weights(self.config), "preprocessing": constants}
        if self.config.holdout:
            by = {"content": "a coin per example, keyed by its content", "position": "position, as papers split"}
            facts["hold-out"] = f"{self.config.holdout:g} of the examples, by {by[self.config.holdout_by]}"
        return facts


def build_components(config: Config) -> Components:
    """Build a run's components; a dry run builds its model without pretrained weights.

    Raises:
        ValueError: for a configuration that cannot be trained as asked.
    """
    device = make_device(config.device)
    task = make_task(config)
    clip = build("clipping", config.clipping)() if config.private else None
    plan = make_plan(config, task.spec, clip)
    model = build_model(config, task, offline=config.dry_run).to(device)
    check_model(model, private=config.private)
    task.check(model)
    make_optimizer = build("optimizer", config.optimizer)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trainable)
    schedule = make_schedule(config, optimizer, plan, clip)
    engine = GradSampler(model, task.loss_fn, config.engine, precision=config.precision, compiled=config.compile)
    filtered = build("filter", config.filter)(trainable) if config.filter else None
    components = Components(
        config, task, device, model, clip, plan, engine, 0, make_optimizer, optimizer, schedule, filtered
    )
    components.micro_batch = _prepare_engine(components)
    components.private_gradient(plan).update_param_groups(optimizer)  # or refused, before there is a run directory
    return components


def make_tracker(config: Config) -> Any:
    """Make the tracker of a configuration."""
    return build("logger", config.logger)()


def make_task(config: Config) -> Task:
    """Make the task of a configuration; reads no data."""
    spec = build("dataset", config.dataset)()
    return TASKS[spec.task](spec)


def _prepare_engine(components: Components) -> int:
    """Validate the engine of a private run; return the size of a micro-batch."""
    config, engine = components.config, components.engine
    inputs, target = components.example
    if config.private:  # on noise; the first batch is validated, too
        no_data = torch.zeros(1, dtype=torch.bool, device=inputs.device)
        validate(engine, inputs[None], target[None], no_data, estimator_takes(config) != "losses")
    budget = _memory(inputs.device) if config.memory is None else int(config.memory * 1e9)
    share = math.ceil(config.batch_size / world_size())
    most = _enough(share, inputs.device)
    size, engine.memory = fit_micro_batch(engine, inputs, budget, most)
    if config.micro_batch != "auto":
        return int(config.micro_batch)
    return _even(size, share) if inputs.is_cuda else size


def _enough(batch_size: int, device: torch.device) -> int:
    """Examples of a micro-batch beyond which more bring nothing.

    On a CPU a micro-batch costs as much as about three examples, and half of one is padding, on average.
    """
    return _LARGE if device.type == "cuda" else min(batch_size, max(16, math.isqrt(6 * batch_size) // 8 * 8))


def _even(most: int, batch_size: int) -> int:
    """Examples of a micro-batch, so many at most, of which a batch rarely takes one more, almost empty.

    They hold two standard deviations more than the batch expects.
    """
    large = batch_size + 2 * math.sqrt(batch_size)
    return math.ceil(large / math.ceil(large / most))


def build_model(config: Config, task: Task, offline: bool) -> nn.Module:
    """Build the model for a task, initialized by the seed; `offline` leaves pretrained weights out."""
    node, runs = split_weights(config.model, offline)
    make = build("model", node)
    options = task.model_arguments()
    for name, value in options.items():
        if node.get(name, value) not in (None, value):
            raise ValueError(f"model.{name}={node[name]} contradicts the dataset, which has {value}: leave it out")
    options |= {"pretrained": False, "weights": None} if offline or runs else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RandomKey.from_seed(config.seed).seed("init"))
        model: nn.Module = make(**{name: options[name] for name in accepted(make, options)})
    model = standardizing(model, task.spec.shape[0]) if task.spec.statistics else model
    if runs:
        load_run(model, runs[0], keep_head=runs[0].spec.name == task.spec.name)
    return model.double() if config.precision == "fp64" else model


def make_device(name: str) -> torch.device:
    """Resolve the name of a device; `auto` prefers a GPU.

    Of several GPUs, jobs take turns; ranks of one run take one each.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if world_size() > 1:
            return torch.device("cuda", local_rank())
        return torch.device("cuda", int(os.environ.get("DPOPT_JOB", "0")) % torch.cuda.device_count())
    try:
        return torch.empty(1, device=torch.device(name)).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has several words for it
        raise ValueError(f"device={name} cannot be used here: use device=cpu or auto") from error


def make_plan(config: Config, spec: DataSpec, clip: ClipRule | None) -> PrivacyPlan:
    """Make the privacy plan of a configuration.

    Without privacy, it is the same plan with σ = 0.
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
        allow_large_delta=config.allow_large_delta,
        count_noise=clip.count_std(config.batch_size) if isinstance(clip, Adaptive) else 0.0,
        mechanism=build("mechanism", config.mechanism)(),
        statistics_noise=spec.statistics.noise_multiplier if spec.statistics and config.epsilon != math.inf else 0.0,
    )


def make_schedule(
    config: Config, optimizer: torch.optim.Optimizer, plan: PrivacyPlan, clip: ClipRule | None
) -> torch.optim.lr_scheduler.LRScheduler:
    """Make the learning-rate schedule; a null length is the number of steps."""
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
                "schedule=clip_rate follows a privatized clip rate: choose clipping=slack or adaptive, which have one"
            )
        if abs(1 - clip.quantile - schedule.target) > 1e-6:
            raise ValueError(
                f"clipping.quantile={clip.quantile:g} clips {1 - clip.quantile:.4g} of the examples; aiming at another "
                f"rate, the learning rate would run to its bound: set schedule.target={1 - clip.quantile:.4g}"
            )
    return schedule


def _memory(device: torch.device) -> int:
    """Bytes that a run may take by itself: not of what is free, so that a resumed run does as the first one did."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 2
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4 // ranks
    except (ValueError, OSError, AttributeError):
        return 4 << 30
