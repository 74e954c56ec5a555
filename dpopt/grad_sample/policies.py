"""Choose for every call of a layer what is done with its per-sample gradients."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import nn

from dpopt.grad_sample.choices import Choices
from dpopt.grad_sample.hooks import BackwardCollector
from dpopt.grad_sample.modules import TrackedLayer, size_of
from dpopt.grad_sample.per_sample import LayerCall, PerSampleGradients

_SMALL = 4096  # values of a gradient that is not worth anything but storing
_LARGEST = 1 << 30  # bytes that a way may take to be tried on a CPU, where no limit is known; an eighth of a GPU's


def choose_policies(
    calls: list[LayerCall],
    examples: int,
    policy: str,
    memory: int | None,
    choices: Choices | None = None,
    known: Mapping[str, str] = MappingProxyType({}),
    scaled: bool = False,
) -> None:
    """Set the policy of every call.

    Args:
        calls: of one forward pass.
        examples: B.
        policy: `auto`, or one for all layers that can follow it.
        memory: bytes that stored gradients may take under `auto`; None for no limit.
        choices: what is fastest, for `auto`; None to go by the numbers of positions and weights.
        known: policies of layers that are settled, for `auto`.
        scaled: whether norms are those of scaled gradients.
    """
    times = Counter(call.tracked for call in calls)
    for call in calls:
        tracked, size = call.tracked, size_of(call.tracked)
        call.alone = times[tracked] == 1 and not tracked.tied
        narrow = call.structure is not None and next(tracked.module.parameters()).element_size() < 4
        if not call.alone or narrow:
            # In 16 bits norm and sum would differ; several calls make one gradient (but see `_share`).
            call.policy = "store"
        elif policy == "ghost":
            call.policy = "ghost" if _has_ghost(tracked) else "recompute" if size > _SMALL else "store"
        elif policy != "auto":
            call.policy = policy
        else:
            call.policy = known.get(tracked.name) or _fastest(call, examples, memory, choices)
    if policy in ("auto", "ghost") and not scaled:
        _share(calls, examples, policy, memory, known)
    if policy == "auto" and memory is not None:
        stored = [call for call in calls if call.policy == "store"]
        left = memory - sum(4 * examples * size_of(call.tracked) for call in stored)
        # Where there are few positions, recomputing costs least per byte saved.
        for call in sorted(stored, key=lambda r: r.positions):
            if left < 0 and call.alone and size_of(call.tracked) > call.kept:
                call.policy = "recompute"
                left += 4 * examples * size_of(call.tracked)


def _share(calls: list[LayerCall], examples: int, policy: str, memory: int | None, known: Mapping[str, str]) -> None:
    """Take norms of a large weight that several calls use, tied embeddings for instance, from all calls together."""
    groups: dict[str, list[LayerCall]] = {}
    users: dict[str, set[TrackedLayer]] = {}
    for call in calls:
        for full in call.tracked.names.values():
            users.setdefault(full, set()).add(call.tracked)
        if not call.alone:
            groups.setdefault(call.tracked.names.get("weight", ""), []).append(call)
    for name, group in groups.items():
        modules = {call.tracked.module for call in group}
        plain = all(call.structure is None and type(m) in (nn.Linear, nn.Embedding) for call in group for m in modules)
        own_bias = len(modules) > 1 and any(getattr(m, "bias", None) is not None for m in modules)
        inside = {call.tracked for call in group}
        # What another unit does with a weight or a bias of these would be missing from the norm.
        whole = all(users[full] <= inside for one in inside for full in one.names.values())
        whole = whole and not any(one.held_bare for one in inside)
        if not name or not plain or own_bias or not whole or not all(_has_ghost(one) for one in inside):
            continue
        size, positions = size_of(group[0].tracked), sum(call.positions for call in group)
        cheap = size > _SMALL and 8 * positions * _width(group[0].tracked) < size
        large = 4 * examples * size > (_largest(group[0]) if memory is None else memory)
        settled = {known[one.name] for one in inside if one.name in known}
        if "ghost" in settled if settled else cheap or large or policy == "ghost":
            for call in group:
                call.policy, call.shared = "ghost", name.rpartition(".")[0]


def _fastest(call: LayerCall, examples: int, memory: int | None, choices: Choices | None) -> str:
    """Choose the fastest policy that may fit, for a call alone."""
    tracked, size = call.tracked, size_of(call.tracked)
    if size <= _SMALL:
        return "store"
    ways = ["store", "recompute"]
    if 4 * examples * size > (_largest(call) if memory is None else memory):
        ways.remove("store")
    # Inner products of positions are cheap only where there are few.
    if _has_ghost(tracked) and call.positions * _width(tracked) <= size:
        ways.insert(0, "ghost")
    guess = "ghost" if "ghost" in ways and 8 * call.positions * _width(tracked) < size else ways[-2:][0]
    if choices is None or len(ways) == 1:
        return guess
    known = choices.made.get(name := _name(call, examples))
    if known in ways:
        return known
    if call.layout is None or not call.layout.sure:  # its examples have not been found yet
        return guess
    device = next(tracked.module.parameters()).device

    @functools.cache
    def gradient() -> torch.Tensor:  # of any sign: some ways look closer where sums cancel
        generator = torch.Generator(device).manual_seed(0)
        return torch.randn(call.shape, generator=generator, dtype=call.dtype, device=device)

    tries: dict[str, Callable[[], None]] = {
        way: functools.partial(_try, call, way, gradient, examples, choices) for way in ways
    }
    return choices.find(name, device, tries)


def _largest(call: LayerCall) -> int:
    """Bytes that a way may take to be tried."""
    device = next(call.tracked.module.parameters()).device
    return torch.cuda.get_device_properties(device).total_memory // 8 if device.type == "cuda" else _LARGEST


def _try(call: LayerCall, policy: str, g: Callable[[], torch.Tensor], examples: int, choices: Choices) -> None:
    """Do all that a policy does with a call, on an output gradient."""
    per_sample = PerSampleGradients(examples)
    weight = next(call.tracked.module.parameters())
    BackwardCollector(per_sample, choices).arrived(replace(call, policy=policy), g())
    per_sample.finish(torch.zeros(examples, device=weight.device))
    total = torch.float64 if weight.dtype == torch.float64 else torch.float32
    sums = {
        full: torch.zeros_like(call.tracked.module.get_parameter(name), dtype=total)
        for name, full in call.tracked.names.items()
    }
    per_sample.add_weighted_sum(sums, torch.ones(examples, dtype=per_sample.norms.dtype, device=weight.device))


def _name(call: LayerCall, examples: int) -> str:
    """Of what a policy does with a call, for `Choices`."""
    module = call.tracked.module
    parts = [type(module).__name__, *(str(tuple(p.shape)) for p in module.parameters())]
    parts += [f"{tuple(x.shape)} {x.dtype}" for x in call.arguments if isinstance(x, torch.Tensor)]
    return " ".join(["policy", *parts, "to", f"{tuple(call.shape)} {call.dtype}", f"of {examples}"])


def _has_ghost(tracked: TrackedLayer) -> bool:
    return tracked.rule.ghost_norm is not None and len(tracked.names) == len(list(tracked.module.parameters()))


def _width(tracked: TrackedLayer) -> int:
    """Numbers that go in and come out at one position of a matrix-like layer."""
    weight = next(tracked.module.parameters())
    return int(weight.shape[0] + weight[0].numel())
