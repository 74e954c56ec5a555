"""What makes a run: its identity, the name that follows, and the directory that belongs to it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from dpopt import files
from dpopt.config.components import call_words, component_defaults, component_name, estimator_takes, safe_name
from dpopt.config.schema import COMPONENTS, Config, renamed_keys
from dpopt.runs.description import RunDescription
from dpopt.runs.directory import RESULT

# What may change without making another run: where things are, what is watched, how fast it goes.
NOT_IDENTITY = {
    *("dry_run", "fresh", "logger", "diagnostics", "output_dir", "data_dir", "time_limit", "checkpoint_every"),
    *("device", "workers", "micro_batch", "memory", "engine", "compile", "ledger"),
}
# The keys of the first release are in every run's identity. A key that came later is in it only where it differs from
# its default, so that it renames no run. Do not add to this list.
_ALWAYS = {
    "": {
        *("dataset", "model", "optimizer", "clipping", "estimator", "filter", "schedule", "private", "epsilon"),
        *("noise_multiplier", "steps", "epochs", "delta", "accountant", "clip_norm", "secure_rng", "batch_size"),
        *("views", "holdout", "ema", "precision", "seed", "tag", "eval_every"),
    },
    "dataset": {"augment", "classes", "folder", "groups", "image_size", "train_size"},
    "model": {
        *("groups", "pretrained", "skip_gain", "small_images", "train", "weights", "widths", "zero_head"),
    },
    "optimizer": {
        *("betas", "bits", "bucket", "dense_size", "density", "eps", "eps_root", "eps_scale", "error_feedback"),
        *("floor", "lr", "momentum", "plain_steps", "rounding", "scope", "weight_decay", "window"),
    },
    "clipping": {"bounds", "clip_norm", "count_noise", "gamma", "lr", "quantile", "r", "s"},
    "estimator": {"smoothing"},
    "filter": {"gamma", "kappa"},
    "schedule": {
        *("T_max", "bounds", "end_factor", "eta_min", "factor", "rate", "start_factor", "target", "total_iters"),
    },
}
# What runs did before a key existed, where that is not its default today.
_BEFORE = {"holdout_by": "position"}
_STANDARD = ("flat", "privategradient", "gaussian", "constantlr", "none")


def identity(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """Reduce a configuration to what can change the result, numbers as floats."""
    values = asdict(config) if isinstance(config, Config) else renamed_keys(config)
    kept = {key: value for key, value in values.items() if key not in NOT_IDENTITY}
    # The first release named it so. A run without privacy has nothing to keep secret.
    kept["secure_rng"] = kept.pop("randomness", "secret") == "secret" and bool(kept.get("private", True))
    if not kept.get("holdout"):
        kept.pop("holdout_by", None)
    kept = _without_new_defaults(kept, _ALWAYS[""], _root_defaults() | _BEFORE)
    for group in COMPONENTS:
        if group in kept:
            node = {key: value for key, value in kept[group].items() if (group, key) != ("optimizer", "kernels")}
            always = {"_target_", *_ALWAYS.get(group, ())}
            kept[group] = _without_new_defaults(node, always, component_defaults(node))
    return {key: _canonical(value) for key, value in kept.items()}


def _without_new_defaults(values: Mapping[str, Any], always: set[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in values.items()
        if key in always or key not in defaults or _canonical(value) != _canonical(defaults[key])
    }


def _root_defaults() -> dict[str, Any]:
    plain = {f.name: f.default for f in fields(Config) if f.default is not MISSING}
    return plain | {f.name: f.default_factory() for f in fields(Config) if f.default_factory is not MISSING}


def run_name(config: Config) -> str:
    """Join a readable stem and a hash of `identity`, without `=`, `,` and spaces."""
    digest = hashlib.blake2b(json.dumps(identity(config), sort_keys=True).encode(), digest_size=5).hexdigest()
    if not config.private:
        budget = "nonprivate"
    elif config.epsilon is not None:
        budget = f"eps{config.epsilon:g}"
    else:
        budget = f"sigma{config.noise_multiplier:g}"
    parts = [
        *(component_name(getattr(config, name)) for name in ("dataset", "model", "optimizer")),
        *nondefault_components(config),
        budget,
    ]
    tag = [safe_name(config.tag)] if config.tag else []
    return "-".join([*parts, f"seed{config.seed}", *tag, digest])


def nondefault_components(config: Config) -> list[str]:
    """List the components that are not the standard ones.

    These are another clip rule, estimator, mechanism or schedule, and a filter.
    """
    names = [component_name(config.clipping)] if config.private else []
    names += [component_name(node) for node in (config.estimator, config.mechanism, config.filter, config.schedule)]
    return [name for name in names if name not in _STANDARD]


def component_strings(config: Config) -> list[str]:
    """List the strings in a configuration's components: among them the names of functions and classes."""
    values, found = [getattr(config, group) for group in COMPONENTS], []
    for value in values:  # grows
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, Mapping):
            values += value.values()
        elif isinstance(value, list | tuple):
            values += value
    return found


def is_secret(config: Config) -> bool:
    """Tell whether a run's draws are keyed by the operating system."""
    return config.private and config.randomness == "secret"


def identity_hash(config: Config) -> str:
    """Hash a run's identity, in full: what its draws are keyed by."""
    return hashlib.blake2b(json.dumps(identity(config), sort_keys=True).encode(), digest_size=32).hexdigest()


def describe(config: Config) -> RunDescription:
    """Name a run's components and settings for panel and card."""
    schedule = call_words(config.schedule)
    return RunDescription(
        name=run_name(config),
        private=config.private,
        dataset=component_name(config.dataset),
        model=component_name(config.model),
        optimizer=component_name(config.optimizer),
        optimizer_call=call_words(config.optimizer, "lr"),
        clip=component_name(config.clipping),
        clip_target=str(config.clipping.get("_target_")),
        others=tuple(nondefault_components(config)),
        mechanism_call=call_words(config.mechanism, "bands", "lam"),
        filter_call=call_words(config.filter) if config.filter else "",
        schedule_call=schedule if component_name(config.schedule) != "constantlr" else "",
        takes=estimator_takes(config),
        ema=config.ema,
        views=config.views,
        holdout=config.holdout,
        diagnostics=config.diagnostics,
        precision=config.precision,
        compiled=config.compile,
        seed=config.seed,
        secret=is_secret(config),
        dry_run=config.dry_run,
        max_length=config.dataset.get("max_length"),
    )


def content_key(config: Config | dict[str, Any]) -> str:
    """Serialize what makes a run; keys that it lacks, at the root or in a component, take today's default."""
    stored = asdict(config) if isinstance(config, Config) else renamed_keys(config)
    values = _root_defaults() | _BEFORE | stored
    for group in COMPONENTS:
        values[group] = component_defaults(values[group]) | values[group]
    return json.dumps(identity(values), sort_keys=True)


def locate(config: Config) -> Path:
    """Find the run's directory: by name, by hash or, if it is finished and the configuration has new keys, by content.

    Raises:
        ValueError: when `output_dir` is not a directory.
    """
    root = Path(config.output_dir)
    for part in (root, *root.parents):
        if part.exists():
            if not part.is_dir():
                raise ValueError(f"output_dir={root} cannot be made, because {part} is a file: choose another")
            break
    directory = same_run(root, run_name(config))
    if not directory.exists() and root.is_dir():
        return finished_runs(root).get(content_key(config), directory)
    return directory


def same_run(root: Path, name: str) -> Path:
    """Find the directory of a name, or of its hash below a stem of an earlier version; either may be missing."""
    if (root / name).exists():
        return root / name
    return next(iter(sorted(root.glob(f"*-{hash_of(name)}"))), root / name)


def hash_of(name: str) -> str:
    """Return the hash at the end of a run's name."""
    return name.rpartition("-")[2]


def finished_runs(root: Path) -> dict[str, Path]:
    """Index the finished runs in a folder by their content key."""
    found = {}
    for path in root.glob(f"*/{RESULT}"):
        result = files.read_json(path)
        if result.get("status") == "finished" and result.get("config"):
            found[content_key(result["config"])] = path.parent
    return found


def failure_note(config: Config) -> Path:
    """Name the file that says why a run without a directory could not begin."""
    return Path(config.output_dir).absolute() / ".sweeps" / f"{run_name(config)}.txt"


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    return repr(float(value))
