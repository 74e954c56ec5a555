"""One run, top to bottom: plan → loop → result.

Everything that can be refused is refused before the run directory is made. From then on the directory always holds a
state from which the same command continues, or the finished result.
"""

import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpopt import checkpoint, files, prepare, report, store
from dpopt.card import privacy_card
from dpopt.config import Config, build, check_components, identity
from dpopt.data.datasets import DataSpec
from dpopt.data.sources import Source
from dpopt.estimate import estimate, optimizer_state_bytes, peak_memory_bytes, reset_peak_memory
from dpopt.grad_sample.model_check import check_model
from dpopt.optim.step_metrics import StepMetrics
from dpopt.privacy.clipping import Adaptive
from dpopt.privacy.plan import PrivacyPlan
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.privacy.sampling import poisson_batches
from dpopt.rng import RandomKey
from dpopt.tracking import Metrics, warn


def run(config: Config) -> dict[str, Any]:
    """Train what the configuration says, or continue it, or print what it has come to.

    Returns:
        The result, as in result.json; for a dry run, the estimated `seconds` and `memory_bytes`, and as `status`
        "planned", or "finished" where there is a result.

    Raises:
        ValueError: for a configuration that cannot be trained as asked; OSError for missing files.
    """
    commit = store.git_commit()  # before anything that takes long
    check_components(config)
    directory = store.locate(config)
    done = store.finished(directory)
    if done and not config.fresh and not config.dry_run:
        report.already_finished(done, str(directory), commit)
        return done

    prepare.keep_freed_memory()
    device = prepare.make_device(config.device)
    spec: DataSpec = build("dataset", config.dataset)()
    clip = build("clipping", config.clipping)() if config.private else None
    plan = prepare.make_plan(config, spec, clip)
    offline = {"pretrained": False, "weights": None} if config.dry_run else {}
    model = store.build_model(config, spec, **offline).to(device)
    check_model(model, private=config.private)
    prepare.check_shapes(model, spec)
    make_optimizer = build("optimizer", config.optimizer)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trainable)
    schedule = prepare.make_schedule(config, optimizer, plan, clip)
    averaged = config.ema is not None
    reference = next(model.parameters())
    example = torch.zeros(config.views, *spec.shape, dtype=reference.dtype, device=device)
    engine, micro_batch = prepare.make_engine(config, model, example)
    filtered = build("filter", config.filter)(trainable) if config.filter else None
    make_private = prepare.make_private(config, engine, clip, optimizer, filtered)
    make_private(plan).update_param_groups(optimizer)  # or refused, before there is a run directory
    data = None if config.dry_run else prepare.load_data(config, spec, device)
    guess = estimate(
        engine, make_optimizer, plan, example, micro_batch, averaged, 1 if filtered is None else filtered.cost
    )
    if data is None:
        report.plan_panel(directory.name, config, plan, clip, guess, engine, device.type)
        return {"status": "finished" if done else "planned", **asdict(guess)}

    with store.claim(directory):
        try:
            if (done := store.finished(directory)) and not config.fresh:  # by another process, in the meantime
                report.already_finished(done, str(directory), commit)
                return done
            if config.fresh:
                store.clear(directory)
            (directory / store.ERROR).unlink(missing_ok=True)
            report.plan_panel(directory.name, config, plan, clip, guess, engine, device.type)
            parts = (make_private, micro_batch, optimizer, schedule, filtered)
            result = _train(config, directory, plan, *parts, *data)
        except Exception as error:
            files.write_atomic(directory / store.ERROR, f"{type(error).__name__}: {error}\n")
            raise
    report.result_panel(result, str(directory), config.fresh)
    if result["status"] == "interrupted":
        raise KeyboardInterrupt  # the user wants the whole sweep to stop
    return result


def _train(
    config: Config,
    directory: Path,
    plan: PrivacyPlan,
    make_private: Callable[..., PrivateGradient],
    micro_batch: int,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    filtered: Any,
    train: Source,
    test: Source,
    held_out: Source | None,
) -> dict[str, Any]:
    model, clip = (getattr(make_private(plan), name) for name in ("model", "clip"))
    device = next(model.parameters()).device
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema is not None else None
    final = ema.module if ema is not None else model
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    parts |= {"ema": ema} if ema else {}
    parts |= {"filter": filtered} if filtered else {}
    parts |= {"clip": clip} if isinstance(clip, Adaptive) else {}
    fingerprint = train.fingerprint()
    facts = {"name": directory.name, "configuration": identity(config), "plan": plan.to_dict(), "data_set": fingerprint}
    path = directory / store.CHECKPOINT
    sensitivity = clip.sensitivity if clip is not None else None
    step = 0
    commit = store.git_commit()
    progress: dict[str, Any] = {"wall_seconds": 0.0, "metrics_rows": 0, "git_commit": commit, "diagnostics": False}
    if path.exists():
        step, progress = checkpoint.load(path, facts, parts)
        if progress["git_commit"] != commit:
            warn(f"this run began at commit {progress['git_commit']}, the code is at {commit} now")
    secret = store.secret_key(directory) if config.secure_rng else RandomKey.from_seed(config.seed)
    plan = replace(plan, key=secret.derive(directory.name, fingerprint))
    progress["diagnostics"] |= config.diagnostics  # once recorded, the card must say so for good

    def write_card(steps: int | None) -> None:
        text = privacy_card(config, plan, sensitivity, steps, directory.name, progress["diagnostics"])
        files.write_atomic(directory / store.CARD, text)

    def measure() -> dict[str, float]:
        found = evaluate(final, test, config.precision, "test/")
        if config.diagnostics and held_out is not None:
            found |= evaluate(final, held_out, config.precision, "private/holdout_")
        return found

    write_card(None)
    (directory / store.RESULT).unlink(missing_ok=True)
    files.write_atomic(directory / store.CONFIG, yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))
    tracker = build("logger", config.logger)()
    metrics = Metrics(directory / store.METRICS, progress["metrics_rows"], tracker, directory.name, asdict(config))
    private = make_private(plan, start=step)
    reset_peak_memory(device)
    start, first, training = time.perf_counter(), step, 0.0
    clock = start - progress["wall_seconds"]
    values: dict[str, float] = {}
    status = "finished"

    def save() -> None:
        progress.update(wall_seconds=time.perf_counter() - clock, metrics_rows=metrics.sync())
        checkpoint.save(path, step, facts, parts, progress)

    with _stop_signals() as stop, report.Progress(plan, step) as live:
        try:
            batches = poisson_batches(train, plan, step, config.views, micro_batch)
            for batch in batches:
                began = time.perf_counter()
                private.backward(batch)
                private.update_param_groups(optimizer)
                if filtered is not None:
                    filtered.apply()
                log = batch.step + 1 == plan.steps or (batch.step + 1) % config.eval_every == 0
                probe = StepMetrics(optimizer) if log else None
                lr = optimizer.param_groups[0]["lr"]
                optimizer.step()
                schedule.step()
                if ema is not None:
                    ema.update_parameters(model)
                step += 1
                training += time.perf_counter() - began
                if probe is not None:
                    wall = time.perf_counter() - clock
                    speed = (step - first) * plan.batch_size / training
                    values = measure()
                    values |= {"privacy/epsilon": plan.epsilon_at(step), "optimizer/lr": float(lr)}
                    values |= probe.measure() | private.statistics
                    if isinstance(clip, Adaptive):
                        values |= {f"privacy/{name}": private.step_info[name] for name in ("clip_norm", "clip_rate")}
                    values |= {"memory/optimizer_state_bytes": optimizer_state_bytes(optimizer)}
                    values |= {"time/wall_seconds": wall, "time/examples_per_second": speed}
                    metrics.log(step, values, {"memory/peak_bytes": peak_memory_bytes(device)})
                    live.evaluated(step, values)
                live.step(step)
                if stop or (config.time_limit is not None and time.perf_counter() - start > config.time_limit):
                    status = "interrupted" if stop else "time_limit"
                if step < plan.steps and (step % config.checkpoint_every == 0 or status != "finished"):
                    save()
                if status != "finished" and step < plan.steps:
                    break
            status = "finished" if step == plan.steps else status
            save()
        finally:
            metrics.close()
    if "test/accuracy" not in values or status != "finished":
        values |= measure()
    result = {
        "status": status,
        "run": directory.name,
        "test_accuracy": values["test/accuracy"],
        "test_loss": values["test/loss"],
        **{key: values[key] for key in ("private/holdout_accuracy",) if key in values},
        "epsilon": plan.epsilon_at(step),
        "epsilon_rdp": plan.epsilon_at(step, "rdp"),
        "accountant": plan.accountant,
        "steps": step,
        "planned_steps": plan.steps,
        **{name: value for name, value in plan.to_dict().items() if name not in ("steps", "accountant")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "optimizer_state_bytes": optimizer_state_bytes(optimizer),
        "adam_state_bytes": 8 * sum(p.numel() for p in model.parameters() if p.requires_grad),
        "peak_memory_bytes": peak_memory_bytes(device),
        "examples_per_second": (step - first) * plan.batch_size / training if training else 0.0,
        "wall_seconds": time.perf_counter() - clock,
        "seed": config.seed,
        "git_commit": commit,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "opacus", "dp-accounting")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "config": asdict(config),
    }
    write_card(step)
    if status == "finished":
        weights = directory / f".{store.WEIGHTS}.tmp"
        save_file({name: tensor.contiguous().clone() for name, tensor in final.state_dict().items()}, weights)
        weights.chmod(path.stat().st_mode)  # as the checkpoint; save_file lets nobody else read
        files.replace_durably(weights, directory / store.WEIGHTS)
        store.erase_key(directory)
    files.write_json(directory / store.RESULT, result)
    return result


@torch.no_grad()
def evaluate(model: nn.Module, source: Source, precision: str = "fp32", prefix: str = "") -> dict[str, float]:
    """Accuracy in [0, 1] and mean cross-entropy of the model on all examples, in eval mode.

    Returns:
        `{prefix}accuracy` and `{prefix}loss`.
    """
    was_training = model.training
    model.eval()
    reference = next(model.parameters())
    autocast = torch.autocast(reference.device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
    correct, loss, count = 0, 0.0, 0
    for inputs, targets in source.plain(512):
        with autocast:
            outputs = model(inputs.to(reference.dtype))
        loss += float(F.cross_entropy(outputs.double(), targets, reduction="sum"))
        correct += int((outputs.argmax(1) == targets).sum())
        count += len(targets)
    model.train(was_training)
    return {f"{prefix}accuracy": correct / max(count, 1), f"{prefix}loss": loss / max(count, 1)}


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, to stop after the step in hand; a second one stops at once."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
