"""The typed configuration: what `run.py` accepts, how a run is named, and the one place where components are built.

This module imports no torch, so that `--help`, `--cfg job` and TAB completion answer at once.
"""

import contextlib
import difflib
import hashlib
import inspect
import json
import math
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dpopt.privacy.accounting import ACCOUNTANTS, check_budget

COMPONENTS = ("dataset", "model", "optimizer", "clipping", "estimator", "filter", "schedule", "logger")
# What may change without making another run: where things are, what is watched, how fast it goes.
NOT_IDENTITY = {
    *("dry_run", "fresh", "logger", "diagnostics", "output_dir", "data_dir", "time_limit", "checkpoint_every"),
    *("device", "workers", "micro_batch", "memory", "engine", "compile"),
}
CONF = Path(__file__).resolve().parents[1] / "conf"
_STANDARD = ("flat", "privategradient", "constantlr", "none")


@dataclass
class Config:
    """The root of the configuration. Component groups are Python calls: `_target_` plus arguments."""

    # Components. Each is a group: `optimizer=dp_adam` is conf/optimizer/dp_adam.yaml, `optimizer.lr=1e-3` its argument.
    dataset: dict[str, Any] = field(default_factory=dict)  # what is trained on
    model: dict[str, Any] = field(default_factory=dict)  # what is trained
    optimizer: dict[str, Any] = field(default_factory=dict)  # what makes a step of a private gradient
    clipping: dict[str, Any] = field(default_factory=dict)  # the clip rule of per-example gradients
    estimator: dict[str, Any] = field(default_factory=lambda: {"_target_": "dpopt.PrivateGradient"})  # of gradients
    filter: dict[str, Any] = field(default_factory=dict)  # between private gradient and optimizer; empty for none
    schedule: dict[str, Any] = field(default_factory=dict)  # of the learning rate
    logger: dict[str, Any] = field(default_factory=dict)  # wandb, tensorboard, or csv for metrics.csv alone
    # The budget. Exactly two of epsilon, noise_multiplier, and steps or epochs; the third follows.
    private: bool = True  # false only through privacy=none: no clipping and no noise
    epsilon: Optional[float] = None  # noqa: UP045 (ε of the whole run; inf clips without noise)
    noise_multiplier: Optional[float] = None  # noqa: UP045 (σ, the noise over the clip rule's sensitivity)
    steps: Optional[int] = None  # noqa: UP045 (optimizer steps)
    epochs: Optional[float] = None  # noqa: UP045 (the same in passes over the data)
    delta: float = 1e-5  # δ; below 1/N to mean anything
    accountant: str = "pld"  # what computes ε: pld (tightest), rdp or prv
    clip_norm: float = 1.0  # C, what every example's gradient is clipped to
    secure_rng: bool = False  # key sampling, augmentation and noise by the operating system
    # Training. Together with the components and the budget this is what makes a run.
    batch_size: int = 4096  # expected; the realised size is Poisson
    views: int = 1  # K, augmented views per example, whose gradients are averaged before the clip
    holdout: float = 0.0  # fraction of the training set that is not trained on
    ema: Optional[float] = None  # noqa: UP045 (decay of the weight average that is evaluated and exported)
    precision: str = "fp32"  # fp32, bf16 (autocast) or fp64
    seed: int = 0  # of splits, weights, sampling and noise
    tag: str = ""  # makes an otherwise equal run another run
    # Running. None of these changes a result, and none but eval_every and diagnostics changes what is recorded.
    eval_every: int = 50  # steps between evaluations on the test set
    checkpoint_every: int = 50  # steps between checkpoints; at most so many are lost
    time_limit: Optional[float] = None  # noqa: UP045 (seconds, after which the run stops with a result, to be continued)
    diagnostics: bool = False  # record raw statistics of private data, outside ε
    dry_run: bool = False  # print the plan, train nothing
    fresh: bool = False  # retrain a finished run
    data_dir: str = "data"  # where data sets are, or are downloaded to; by default the environment's DPOPT_DATA_DIR
    output_dir: str = "runs"  # where run directories are made
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    workers: int = 2  # data-loading processes, for image folders
    micro_batch: Any = "auto"  # examples whose gradients are held at once; auto: what fits into memory
    memory: Optional[float] = None  # noqa: UP045 (GB for auto; a quarter of the machine's, or half of the GPU's)
    engine: str = "auto"  # per-example gradients: auto, store, recompute, gram or vmap
    compile: bool = False  # forward, backward and per-example gradients as one compiled graph

    def __post_init__(self) -> None:
        if self.private:
            check_budget(self.epsilon, self.noise_multiplier, self.steps, self.epochs)
        else:
            if self.epsilon is not None or self.noise_multiplier is not None:
                raise ValueError(
                    "privacy=none trains without privacy, so epsilon and noise_multiplier have no meaning: drop them, "
                    "or choose a budget with privacy=eps8 (epsilon=inf clips without noise)"
                )
            if (self.steps is None) == (self.epochs is None):
                raise ValueError("privacy=none needs the number of steps: set steps, or set steps=null and epochs")
        positive = ("batch_size", "views", "eval_every", "checkpoint_every")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.micro_batch != "auto" and not (isinstance(self.micro_batch, int) and self.micro_batch >= 1):
            raise ValueError(f"micro_batch={self.micro_batch} must be at least 1, or auto for what fits into memory")
        if self.memory is not None and not self.memory > 0:
            raise ValueError(f"memory={self.memory} must be a positive number of GB, or null")
        engines = ("auto", "store", "recompute", "ghost", "vmap")
        kinds = (("precision", ("fp32", "bf16", "fp64")), ("accountant", ACCOUNTANTS), ("engine", engines))
        for name, choices in kinds:
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)} must be one of {', '.join(choices)}")
        for name in ("steps", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout={self.holdout} must be a fraction in [0, 1)")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema} must be a decay in [0, 1), or null for no weight average")
        if not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm={self.clip_norm} must be a positive number")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be 0 or more")
        if self.time_limit is not None and not self.time_limit >= 0:
            raise ValueError(f"time_limit={self.time_limit} must be 0 or more seconds, or null for none")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} must be 0 or more")


ConfigStore.instance().store(name="schema", node=Config)


def by_epsilon(epsilon: float | None, values: Mapping[Any, Any], private: bool = True) -> Any:
    """`${by_epsilon:${epsilon},{1: a, 8: b}}` in a YAML: the value at the nearest ε, in ratio; for none, the last.

    `${by_epsilon:${epsilon},{1: a, 8: b, inf: c, none: d},${private}}` has values for the controls, too.
    """
    if not private and "none" in values:
        return values["none"]
    if epsilon is not None and float(epsilon) == math.inf and math.inf in values:
        return values[math.inf]
    known = sorted(key for key in values if key not in ("none", math.inf))
    if epsilon is None or not 0 < float(epsilon) < math.inf:  # nonsense is refused elsewhere, in words
        return values[known[-1]]
    return values[min(known, key=lambda other: abs(math.log(other / float(epsilon))))]


OmegaConf.register_new_resolver("by_epsilon", by_epsilon, replace=True)


def check_words(words: Sequence[str]) -> None:
    """Check the keys of overrides such as `epsilon=8` before Hydra reads them.

    Raises:
        ValueError: for one that is neither a key of the root nor a group, with what may have been meant.
    """
    groups = [path.name for path in CONF.iterdir() if path.is_dir()]
    known = {f.name for f in fields(Config)} | set(groups) | {"hydra"}
    for word in words:
        key, equals, _ = word.partition("=")
        root = re.split(r"[./@]", key)[0]
        if not equals or not root.isidentifier() or root in known:
            continue
        inside = [
            g for g in COMPONENTS if any(re.search(rf"^{root}:", p.read_text(), re.M) for p in CONF.glob(f"{g}/*"))
        ]
        meant = [f"{group}.{root}" for group in inside] or difflib.get_close_matches(root, known, 1)
        hint = f": did you mean {' or '.join(meant)}?" if meant else ""
        raise ValueError(f"{root} is no key{hint} (python run.py --help lists all of them)")


def from_hydra(cfg: DictConfig) -> Config:
    """Turn Hydra's composition into a checked Config.

    Raises:
        ValueError: for a key that is no field of Config, or values that contradict each other.
    """
    known = {f.name for f in fields(Config)}
    unknown = [str(key) for key in cfg if key not in known]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]}: the keys are {', '.join(sorted(known))}")
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    return config


def identity(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """What makes the run: the configuration without what cannot change its result, numbers as floats."""
    values = asdict(config) if isinstance(config, Config) else config
    kept = {key: value for key, value in values.items() if key not in NOT_IDENTITY}
    kept["optimizer"] = {key: value for key, value in kept["optimizer"].items() if key != "kernels"}
    return {key: _canonical(value) for key, value in kept.items()}


def run_name(config: Config) -> str:
    """A readable stem and a hash of `identity`; free of `=`, `,` and spaces."""
    digest = hashlib.blake2b(json.dumps(identity(config), sort_keys=True).encode(), digest_size=5).hexdigest()
    if not config.private:
        budget = "nonprivate"
    elif config.epsilon is not None:
        budget = f"eps{config.epsilon:g}"
    else:
        budget = f"sigma{config.noise_multiplier:g}"
    parts = [
        *(target_name(getattr(config, name)) for name in ("dataset", "model", "optimizer")),
        *beyond(config),
        budget,
    ]
    tag = [_safe(config.tag)] if config.tag else []
    return "-".join([*parts, f"seed{config.seed}", *tag, digest])


def beyond(config: Config) -> list[str]:
    """Names of the components that are not the standard ones: another clip rule, estimator or schedule, a filter."""
    names = [target_name(config.clipping)] if config.private else []
    names += [target_name(node) for node in (config.estimator, config.filter, config.schedule)]
    return [name for name in names if name not in _STANDARD]


def target_name(component: Mapping[str, Any]) -> str:
    """The last word of a component's `_target_`, in lower case."""
    return _safe(str(component.get("_target_", "none")).rsplit(".", 1)[-1].lower())


def check_components(config: Config) -> None:
    """Check every component's keys and types against the signature of its target, before anything is built.

    Raises:
        ValueError: naming the key and what the target takes.
    """
    for group in COMPONENTS:
        node = getattr(config, group)
        if group == "filter" and not node:
            continue
        target = _target(group, node)
        parameters, hints = _parameters(target)
        for key, value in node.items():
            if key in ("_target_", "_partial_", "_convert_"):
                continue
            parameter = parameters.get(key)
            if parameter is None:
                accepted = [name for name in parameters if name not in ("self", "params", "optimizer")]
                raise ValueError(
                    f"{group}.{key} is not an argument of {node['_target_']}: it takes {', '.join(accepted) or 'none'}"
                )
            hint = hints.get(key, type(parameter.default) if parameter.default not in (None, parameter.empty) else Any)
            if not _fits(value, hint) and not (group == "schedule" and value is None):
                raise ValueError(f"{group}.{key}={value} does not fit {node['_target_']}, which takes {_words(hint)}")


def build(group: str, node: Mapping[str, Any]) -> Callable[..., Any]:
    """The component as a function that awaits its remaining arguments (the only use of Hydra's `instantiate`).

    Raises:
        ValueError: when the target cannot be found.
    """
    _target(group, node)
    built: partial[Any] = instantiate({**node, "_partial_": True, "_convert_": "all"})
    return built


def accepted(function: Callable[..., Any], names: Collection[str]) -> list[str]:
    """Those of `names` that the function takes as arguments."""
    return [name for name in names if name in inspect.signature(function).parameters]


def component_defaults(node: Mapping[str, Any]) -> dict[str, Any]:
    """What the arguments of a component default to, where that is a plain value."""
    return _defaults(node["_target_"]) if "_target_" in node else {}


@cache
def _defaults(target: str) -> dict[str, Any]:
    try:
        parameters, _ = _parameters(_target("component", {"_target_": target}))
    except ValueError:
        return {}
    plain = (bool, int, float, str, list, tuple, type(None))
    return {name: p.default for name, p in parameters.items() if isinstance(p.default, plain)}


def _target(group: str, node: Mapping[str, Any]) -> Callable[..., Any]:
    if "_target_" not in node:
        raise ValueError(f"{group} has no _target_: choose one of the files in conf/{group}/")
    try:
        target = _locate(node["_target_"])
    except Exception as error:
        raise ValueError(f"{group}._target_={node['_target_']} cannot be imported: {error}") from error
    if not callable(target):
        raise ValueError(f"{group}._target_={node['_target_']} is not a function or class")
    return target


def _locate(path: str) -> Any:
    """Import what a dotted path names; an attribute of a package goes before its submodule of the same name.

    Both exist for `dpopt.models.cnn`. `pydoc.locate` returns the function up to Python 3.11 and the module from 3.12.

    Raises:
        ImportError: when there is no such module, class or function; and whatever an imported module raises.
    """
    first, *rest = path.split(".")
    name = first
    try:
        found: Any = import_module(first)
        for part in rest:
            name = f"{name}.{part}"
            found = getattr(found, part) if hasattr(found, part) else import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # a module that exists imports another one that is missing
        raise ImportError(
            "there is no such module, class or function (PYTHONPATH=. finds modules of this folder)"
        ) from error
    return found


def _parameters(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """The arguments of a target and their types; its parent's, too, where it passes **options on to it."""
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    kinds = target.__mro__ if inspect.isclass(target) else ()
    for function in [vars(kind)["__init__"] for kind in kinds if "__init__" in vars(kind)] or [target]:
        own = inspect.signature(function).parameters
        rest = [p.name for p in own.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        parameters = {**{name: p for name, p in own.items() if name not in rest}, **parameters}
        with contextlib.suppress(NameError, TypeError, AttributeError):
            hints = {**get_type_hints(function.func if isinstance(function, partial) else function), **hints}
        if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            break
    return parameters, hints


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and Ellipsis not in arguments:
            return len(value) == len(arguments) and all(map(_fits, value, arguments))
        return all(_fits(item, arguments[0]) for item in value)
    return hint is Any or not isinstance(value, str | bool | int | float) or not inspect.isclass(hint)


def _words(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if not get_args(hint) else str(hint).replace("typing.", "")


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    return repr(float(value))


def _safe(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "_" for c in text)
