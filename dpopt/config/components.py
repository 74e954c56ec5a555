"""Components: checked against the signature of their target, and built by Hydra's `instantiate`."""

import contextlib
import inspect
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import instantiate

from dpopt.config.schema import COMPONENTS, Config

_VARIANTS = {
    "dpopt.optim.AdamBC": ("weight_decay", "adamwbc")
}  # target: (argument that makes another method, its name)


def check_components(config: Config) -> None:
    """Check every component's keys and types against the signature of its target, before anything is built.

    Raises:
        ValueError: naming the key and what the target takes.
    """
    for group in COMPONENTS:
        node = getattr(config, group)
        if group == "filter" and not node:
            continue
        target = locate_target(group, node)
        parameters, hints = _parameters(target)
        for key, value in node.items():
            if key in ("_target_", "_partial_", "_convert_"):
                continue
            parameter = parameters.get(key)
            if (group, key) == ("model", "weights") and (parameter is None or Path(str(value)).expanduser().is_dir()):
                _check_run(value)
                continue
            if parameter is None:
                accepted = [name for name in parameters if name not in ("self", "params", "optimizer")]
                raise ValueError(
                    f"{group}.{key} is not an argument of {node['_target_']}, which takes "
                    f"{', '.join(accepted) or 'none'}: leave it out, and where a preset sets it, add '~{group}.{key}'"
                )
            hint = hints.get(key, type(parameter.default) if parameter.default not in (None, parameter.empty) else Any)
            if not _fits(value, hint) and not (group == "schedule" and value is None):
                raise ValueError(f"{group}.{key}={value} does not fit {node['_target_']}, which takes {_words(hint)}")


def _check_run(path: Any) -> None:
    """Check that weights that are no file of weights are those of a run.

    Raises:
        ValueError: when they are not.
    """
    missing = [
        name for name in ("result.json", "model.safetensors") if not (Path(str(path)).expanduser() / name).exists()
    ]
    if path is not None and missing:
        raise ValueError(
            f"model.weights={path} is no directory of a run with weights, because {missing[0]} is missing: name one, "
            "or drop model.weights"
        )


def build(group: str, node: Mapping[str, Any]) -> Callable[..., Any]:
    """Bind a component's arguments; return a function of the remaining ones.

    This is the only use of Hydra's `instantiate`.

    Raises:
        ValueError: when the target cannot be found.
    """
    locate_target(group, node)
    built: partial[Any] = instantiate({**node, "_partial_": True, "_convert_": "all"})
    return built


def accepted(function: Callable[..., Any], names: Collection[str]) -> list[str]:
    """Select those of `names` that the function takes as arguments."""
    return [name for name in names if name in inspect.signature(function).parameters]


def component_defaults(node: Mapping[str, Any]) -> dict[str, Any]:
    """Collect those defaults of a component's arguments that are plain values."""
    return _defaults(node["_target_"]) if "_target_" in node else {}


@cache
def _defaults(target: str) -> dict[str, Any]:
    try:
        parameters, _ = _parameters(locate_target("component", {"_target_": target}))
    except ValueError:
        return {}
    plain = (bool, int, float, str, list, tuple, type(None))
    return {name: p.default for name, p in parameters.items() if isinstance(p.default, plain)}


def estimator_takes(config: Config) -> str:
    """Say what the estimator takes of each example: `gradients`, `losses`, `features`, or `updates` of clients.

    Raises:
        ValueError: for an estimator that does not say it.
    """
    target = locate_target("estimator", config.estimator)
    if not hasattr(target, "takes"):
        raise ValueError(f"{config.estimator['_target_']} has no `takes`: make it a subclass of dpopt.PrivateGradient")
    return str(target.takes)


def locate_target(group: str, node: Mapping[str, Any]) -> Callable[..., Any]:
    """Import the function or class that a component names.

    Raises:
        ValueError: when it cannot be imported or called.
    """
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
    """Collect the arguments of a target and their types.

    Those of its parent are among them where it passes **options on.
    """
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


def call_words(node: dict[str, Any], *always: str) -> str:
    """Write a component as its name and the arguments that are not defaults; `always` names some to show anyway."""
    defaults = component_defaults(node)
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in node.items() if name != "_target_"}
    told = [f"{name} = {v}" for name, v in values.items() if name in always or v != defaults.get(name)]
    return ", ".join([component_name(node), *told])


def component_name(component: Mapping[str, Any]) -> str:
    """Name a component for people and file names: a folder or path by its end, else the last word of its `_target_`."""
    target = str(component.get("_target_", "none"))
    if own := Path(str(component.get("folder") or component.get("path") or "")).name:
        return safe_name(own.lower())
    key, variant = _VARIANTS.get(target, ("", ""))
    return variant if component.get(key) else safe_name(target.rsplit(".", 1)[-1].lower())


def safe_name(text: str) -> str:
    """Replace what a file name should not hold by underscores."""
    return "".join(c if c.isalnum() or c in "._" else "_" for c in text)
