"""Record everything that a model holds, compare it after a forward pass, and put it back to the bit.

Parameters, buffers, and what lies in attributes of modules and of their classes: tensors, arrays, numbers, generators,
also inside lists, dicts, tuples and plain objects, in slots or not. What lies in globals and closures is not seen.
"""

import types
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_STATE = (*_SCALARS, list, dict, set, deque, Tensor, np.ndarray, torch.Generator)  # of a class: what it may write to
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType, torch.dtype)
_DEPTH = 8  # of containers within containers


class Snapshot:
    """What a model held at one moment.

    Args:
        model: recorded now; its tensors are copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._containers: list[tuple[Any, Any]] = []  # the container, and a shallow copy
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._others: list[tuple[Any, Any]] = []  # arrays and generators
        self._values: dict[str, Any] = {}
        self._versions: dict[str, int] = {}
        self.parameters: set[str] = set()  # paths
        copies: dict[int, Tensor] = {}
        for path, value in _leaves(model, self._containers):
            if isinstance(value, Tensor):
                if id(value) not in copies:
                    copies[id(value)] = _copy(value)
                    self._tensors.append((value, copies[id(value)]))
                self._values[path] = copies[id(value)]
                if isinstance(value, nn.Parameter):
                    self._versions[path] = value._version
                    self.parameters.add(path)
            else:
                self._values[path] = _frozen(value)
                if isinstance(value, np.ndarray | torch.Generator):
                    kept = value.copy() if isinstance(value, np.ndarray) else value.get_state()
                    self._others.append((value, kept))

    def iterators(self) -> list[str]:
        """Return the paths of iterators, of which nobody can tell how far they are."""
        return [path for path, value in self._values.items() if isinstance(value, Iterator)]

    def differences(self) -> dict[str, Any]:
        """Return what is different now: a copy by path, None for what is gone."""
        found: dict[str, Any] = {}
        seen = set()
        for path, value in _leaves(self.model, []):
            seen.add(path)
            written = isinstance(value, nn.Parameter) and value._version != self._versions.get(path)
            if written or path not in self._values or not same(self._values[path], _frozen(value)):
                found[path] = _copy(value) if isinstance(value, Tensor) else _frozen(value)
        return found | {path: None for path in self._values if path not in seen}

    def restore(self) -> None:
        """Put everything back as it was."""
        for container, copy in self._containers:
            if isinstance(container, dict):
                if not _same_items(container, copy):
                    container.clear()
                    container.update(copy)
            elif isinstance(container, list):
                container[:] = copy
            elif isinstance(container, set | deque):
                container.clear()
                (container.update if isinstance(container, set) else container.extend)(copy)
            elif isinstance(container, type):
                for name, value in copy.items():
                    if vars(container).get(name) is not value:
                        setattr(container, name, value)
            else:  # an object with slots
                for name in _slots(container).keys() - copy.keys():
                    object.__delattr__(container, name)
                for name, value in copy.items():
                    object.__setattr__(container, name, value)  # of a frozen dataclass, too
        for tensor, copy in self._tensors:
            if tensor.shape != copy.shape:
                tensor.data = copy.to(tensor.device)
            elif not same(copy, tensor.detach()):
                tensor.data.copy_(copy)  # .data: the version of a tensor in somebody's graph stays
        for other, copy in self._others:
            if isinstance(other, torch.Generator):
                other.set_state(copy)
            else:
                other[...] = copy


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore the model and the global random generators afterwards."""
    import random

    before, python, array = Snapshot(model), random.getstate(), np.random.get_state()
    devices = {t.device for t in [*model.parameters(), *model.buffers()] if t.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        before.restore()
        random.setstate(python)
        np.random.set_state(array)


def same(one: Any, other: Any) -> bool:
    """Tell whether two recorded values are the same to the bit, NaN being NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if one.layout != torch.strided or other.layout != torch.strided:
            return one.layout == other.layout and same(one.to_dense(), other.to_dense())
        other = other.detach().to(one.device)
        return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
    return type(one) is type(other) and bool(one == other or (one != one and other != other))


def _same_items(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    return list(one) == list(other) and all(one[key] is other[key] for key in one)


def _copy(tensor: Tensor) -> Tensor:
    try:
        return tensor.detach().clone()
    except torch.OutOfMemoryError:
        return tensor.detach().cpu()


def _frozen(value: Any) -> Any:
    """Make a comparable copy of a leaf that is no tensor."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return value.get_state() if isinstance(value, torch.Generator) else value


def _slots(value: Any) -> dict[str, Any]:
    """Values of the attributes that an object keeps in slots."""
    found: dict[str, Any] = {}
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            name = f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def _leaves(model: nn.Module, containers: list[tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
    """All tensors, arrays, numbers and generators by path; containers are recorded on the way."""
    visited: dict[int, Any] = {}  # keeps what it has seen alive, so that no id comes twice
    visited_kinds: set[type] = set()

    def module_leaves(path: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
        prefix = f"{path}." if path else ""
        for kind in type(module).__mro__:
            if kind.__module__.partition(".")[0] not in ("torch", "builtins") and kind not in visited_kinds:
                visited_kinds.add(kind)
                own = {key: value for key, value in vars(kind).items() if isinstance(value, _STATE) and key[:2] != "__"}
                containers.append((kind, own))
                for key, value in own.items():
                    yield from leaves(f"{prefix}{key} of the class", value, 0)
        containers.append((module.__dict__, dict(module.__dict__)))
        for key, value in list(module.__dict__.items()):
            if key in ("_parameters", "_buffers", "_modules"):
                containers.append((value, dict(value)))
                for name, one in list(value.items()):
                    yield from leaves(prefix + name, one, 0)
            elif "_hooks" in key:
                if isinstance(value, dict):
                    containers.append((value, dict(value)))
            elif key != "training":
                yield from leaves(prefix + key, value, 0)

    def leaves(path: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
        if isinstance(value, (Tensor, np.ndarray, torch.Generator, *_SCALARS)):
            yield path, value
            return
        if depth > _DEPTH or isinstance(value, _OPAQUE) or id(value) in visited:
            return
        visited[id(value)] = value
        if isinstance(value, nn.Module):
            yield from module_leaves(path, value)
        elif isinstance(value, dict):
            containers.append((value, dict(value)))
            for key, one in list(value.items()):
                yield from leaves(f"{path}[{key!r}]", one, depth + 1)
        elif isinstance(value, list | tuple | deque):
            if not isinstance(value, tuple):
                containers.append((value, list(value)))
            for index, one in enumerate(list(value)):
                yield from leaves(f"{path}[{index}]", one, depth + 1)
        elif isinstance(value, set):
            containers.append((value, set(value)))
            for index, one in enumerate(sorted(value, key=repr)):
                yield from leaves(f"{path}[{index}]", one, depth + 1)
        elif isinstance(value, Iterator) and not hasattr(value, "__dict__"):
            yield path, value  # of Python's own, which show nothing of where they are
        elif type(value).__module__.partition(".")[0] not in ("torch", "builtins", "functools"):
            if hasattr(value, "__dict__"):
                containers.append((value.__dict__, dict(value.__dict__)))
            if slots := _slots(value):
                containers.append((value, slots))
            for key, one in (getattr(value, "__dict__", {}) | slots).items():
                yield from leaves(f"{path}.{key}", one, depth + 1)

    yield from leaves("", model, 0)


@contextmanager
def displaced(displacement: dict[nn.Parameter, Tensor] | None) -> Iterator[None]:
    """Parameters displaced for a while; afterwards they are what they were, to the bit."""
    before = {p: p.detach().clone() for p in displacement or {}}
    try:
        with torch.no_grad():
            for p, difference in (displacement or {}).items():
                p.add_(difference)
        yield
    finally:
        with torch.no_grad():
            for p, old in before.items():
                p.copy_(old)
