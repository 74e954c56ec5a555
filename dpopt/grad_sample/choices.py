"""Of several ways to compute the same, take the one that is fastest on this machine.

Which one that is depends on shapes, processor, threads and libraries, so it is measured, once: the first process that
meets a computation tries all ways and writes the result into the user's cache folder, where later processes find it.
Processes of one machine hence choose alike, and give the same bits; a run takes its choices along in its checkpoint.
"""

import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from dpopt import files
from dpopt.machine import cache_folder, processor_features

T = TypeVar("T")
_CODE = Path(__file__).parent
_ROUNDS, _SECONDS = 3, 0.2  # a way is timed so often, or for so long
_current: ContextVar["Choices | None"] = ContextVar("choices", default=None)


class Choices:
    """What was found fastest, by what is computed.

    Attributes:
        made: the name of the fastest way of each computation met so far; those of an earlier run may be put in.
    """

    def __init__(self) -> None:
        self.made: dict[str, str] = {}

    def find(self, what: str, device: torch.device, ways: dict[str, Callable[[], Any]]) -> str:
        """Name the fastest of several ways; measure them if nobody has."""
        if self.made.get(what) not in ways:
            if get_proxy_mode() is not None:  # nothing can be timed while a graph is traced
                return next(iter(ways))
            self.made[what] = _remembered(what, device, ways)
        return self.made[what]


@contextmanager
def using(choices: Choices | None) -> Iterator[None]:
    """Let `fastest` go by these for a while."""
    token = _current.set(choices)
    try:
        yield
    finally:
        _current.reset(token)


def fastest(
    what: str, device: torch.device, ways: dict[str, Callable[[], T]], then: Callable[[T], Any] | None = None
) -> T:
    """Compute something in the way that is fastest; in the first way where no `Choices` are used.

    Args:
        what: names the computation, with everything that its time depends on but the machine.
        device: on which it runs.
        ways: by name; all give the same but for rounding.
        then: what the caller does with the result, if it takes longer after one way than after another.
    """
    choices = _current.get()
    if choices is None or len(ways) == 1:
        return next(iter(ways.values()))()
    timed: dict[str, Callable[[], Any]] = {**ways}
    if then is not None:
        timed = {name: functools.partial(_in_turn, way, then) for name, way in ways.items()}
    return ways[choices.find(what, device, timed)]()


def _in_turn(way: Callable[[], T], then: Callable[[T], Any]) -> None:
    then(way())


def _remembered(what: str, device: torch.device, ways: dict[str, Callable[[], Any]]) -> str:
    name = f"fastest-{_machine(device.type)}.json"
    if (known := _read(name).get(what)) in ways:
        return known
    found = _measure(device, ways)
    with suppress(OSError), files.one_process(cache_folder()):
        _read.cache_clear()
        if _read(name).get(what) in ways:  # another process was first
            return _read(name)[what]
        _read(name)[what] = found
        files.write_json(cache_folder() / name, _read(name))
    return found


@functools.cache
def _read(name: str) -> dict[str, str]:
    """Read what this machine has found; nothing without a cache folder.

    The result is kept in memory: it is as of the last look.
    """
    try:
        return {what: str(way) for what, way in files.read_json(cache_folder() / name).items()}
    except OSError:
        return {}


def _measure(device: torch.device, ways: dict[str, Callable[[], Any]]) -> str:
    times: dict[str, float] = {}
    failure: Exception | None = None
    for number in range(_ROUNDS + 1):  # the first round pays for memory and libraries
        for name, way in ways.items():
            if (number and name not in times) or (number > 1 and times[name] * number > _SECONDS):
                continue
            try:
                start = _now(device)
                way()
                seconds = _now(device) - start
            except Exception as error:  # no memory for it, or a kernel that this GPU does not take
                times.pop(name, None)
                failure = error
                continue
            times[name] = seconds if number < 2 else min(seconds, times[name])
    if not times:
        raise failure or ValueError("no way was given")
    return min(times, key=times.__getitem__)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@functools.cache
def _machine(kind: str) -> str:
    """Hash what times depend on: the ways' code, processor, threads, torch, and the GPU's kind."""
    parts = [path.read_text() for path in sorted(_CODE.iterdir()) if path.suffix in (".py", ".c", ".h")]
    parts += [processor_features(), torch.__version__, str(torch.get_num_threads())]
    if kind == "cuda":
        parts.append(torch.cuda.get_device_name())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
