"""Run directories: finding the one that belongs to a configuration, claiming it, and reading a trained model back.

A run directory holds config.yaml, metrics.csv, checkpoint.pt, result.json, privacy_card.md and model.safetensors, and
while a run with secure randomness is unfinished its key. Files appear whole or not at all.
"""

import contextlib
import fcntl
import json
import os
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from dpopt import files
from dpopt.config import COMPONENTS, Config, accepted, build, component_defaults, identity, run_name
from dpopt.data.datasets import DataSpec
from dpopt.rng import RandomKey

RESULT, CHECKPOINT, METRICS, CONFIG = "result.json", "checkpoint.pt", "metrics.csv", "config.yaml"
CARD, WEIGHTS, KEY, ERROR, LOCK = "privacy_card.md", "model.safetensors", "secret.key", "error.txt", ".lock"


def locate(config: Config) -> Path:
    """The directory of this run: by name or, if it is finished and the configuration has new keys since, by content.

    Raises:
        ValueError: when `output_dir` is not a directory.
    """
    root = Path(config.output_dir)
    for part in (root, *root.parents):
        if part.exists():
            if not part.is_dir():
                raise ValueError(f"output_dir={root} cannot be made, because {part} is a file: choose another")
            break
    directory = root / run_name(config)
    if not directory.exists() and root.is_dir():
        return by_content(root).get(content(config), directory)
    return directory


def by_content(root: Path) -> dict[str, Path]:
    """The finished runs in a folder, by what they are."""
    found = {}
    for path in root.glob(f"*/{RESULT}"):
        result = files.read_json(path)
        if result.get("status") == "finished" and result.get("config"):
            found[content(result["config"])] = path.parent
    return found


def content(config: Config | dict[str, Any]) -> str:
    """What makes a run, as text: keys that it lacks, at the root or in a component, have their default today."""
    stored = asdict(config) if isinstance(config, Config) else config
    defaults = {f.name: f.default for f in fields(Config) if f.default is not MISSING}
    defaults |= {f.name: f.default_factory() for f in fields(Config) if f.default_factory is not MISSING}
    values = defaults | stored
    for group in COMPONENTS:
        values[group] = component_defaults(values[group]) | values[group]
    return json.dumps(identity(values), sort_keys=True)


def finished(directory: Path) -> dict[str, Any] | None:
    """The result of a run that has completed, else None."""
    path = directory / RESULT
    result = files.read_json(path) if path.exists() else {}
    return result if result.get("status") == "finished" else None


@contextlib.contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Make the directory and hold it against other processes.

    Raises:
        ValueError: when another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another process is training in {directory}: wait for it, or add tag=NAME for a run of your own"
            ) from None
        yield


def clear(directory: Path) -> None:
    """Forget everything about a run but its lock and its loggers' files."""
    erase_key(directory)
    for name in (RESULT, CHECKPOINT, METRICS, CONFIG, CARD, WEIGHTS, ERROR):
        (directory / name).unlink(missing_ok=True)


def secret_key(directory: Path) -> RandomKey:
    """The run's secret key: kept, readable by the owner alone, until the run is finished.

    Raises:
        ValueError: when it is damaged, or lost although the run has begun.
    """
    path = directory / KEY
    if not path.exists():
        if (directory / CHECKPOINT).exists():
            raise ValueError(
                f"{path} is lost, so the draws of this run cannot be repeated: start again with fresh=true"
            )
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
    material = path.read_bytes()
    if len(material) != 32 or not any(material):
        raise ValueError(f"{path} is damaged, so the run cannot continue: start again with fresh=true")
    return RandomKey(material, secure=True)


def erase_key(directory: Path) -> None:
    """Overwrite and remove the run's secret key, if it has one."""
    path = directory / KEY
    if path.exists():
        with open(path, "r+b") as file:  # in place, not into a new file
            file.write(bytes(path.stat().st_size))
            file.flush()
            os.fsync(file.fileno())
        path.unlink()


def note_failure(config: Config, error: Exception) -> None:
    """Record, for the tables of a sweep, why a run that has no directory could not begin."""
    with contextlib.suppress(OSError, ValueError):  # the error itself is what the user wants to hear of
        path = _failure(config)
        if not config.dry_run:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomic(path, f"{error}\n")


def failure(config: Config, directory: Path) -> str | None:
    """The first line of what ended the run in a directory, or kept it from beginning; None when nothing did."""
    for path in [directory / ERROR, *([] if directory.exists() else [_failure(config)])]:
        if path.exists():
            return path.read_text().splitlines()[0]
    return None


def _failure(config: Config) -> Path:
    return Path(config.output_dir).absolute() / ".sweeps" / f"{run_name(config)}.txt"


def build_model(config: Config, spec: DataSpec, **overrides: Any) -> nn.Module:
    """The model of a configuration for a data set, initialised by the seed; `overrides` replace arguments it takes."""
    make = build("model", config.model)
    sizes = {"num_classes": spec.classes, "in_channels": spec.shape[0], "image_size": spec.shape[-1]} | overrides
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RandomKey.from_seed(config.seed).seed("init"))
        model: nn.Module = make(**{name: sizes[name] for name in accepted(make, sizes)})
    return model.double() if config.precision == "fp64" else model


def load(run_dir: str | Path) -> nn.Module:
    """The trained model of a run directory (the weight average, where one was kept), on the CPU, in eval mode.

    Raises:
        ValueError: when the run has not produced a model.
    """
    from safetensors.torch import load_file

    directory = Path(run_dir)
    if not (directory / WEIGHTS).exists():
        raise ValueError(f"{directory} holds no {WEIGHTS}: run the experiment to its end first")
    config = Config(**yaml.safe_load((directory / CONFIG).read_text()))
    spec = build("dataset", config.dataset)()
    offline = {"pretrained": False, "weights": None}
    model = build_model(config, spec, **offline)
    model.load_state_dict(load_file(directory / WEIGHTS))
    return model.eval()


def short_commit(commit: Any) -> str:
    """The same in few characters."""
    name, dash, dirty = str(commit).partition("-")
    return name[:12] + dash + dirty


@cache  # the code that is loaded, though the checkout may move on during a sweep
def git_commit() -> str | None:
    """The commit of the checkout that this code runs from, if it is one; with "-dirty" where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
