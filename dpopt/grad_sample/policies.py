"""Choose for every call of a layer what is done with its per-sample gradients."""

from collections import Counter

from dpopt.grad_sample.modules import TrackedLayer, size_of
from dpopt.grad_sample.per_sample import LayerCall

# Operations that a device does in the time of moving one byte; storing saves 2 operations per position and weight, and
# costs the reading of 4 bytes.
_BALANCE = {"cpu": 7, "cuda": 166}
_SMALL = 4096  # values of a gradient that is not worth recomputing


def choose_policies(calls: list[LayerCall], examples: int, device: str, policy: str, memory: int | None) -> None:
    """Set the policy of every call.

    Args:
        calls: of one forward pass.
        examples: B.
        device: on which it ran.
        policy: `auto`, or one for all layers that can follow it.
        memory: bytes that stored gradients may take under `auto`; None for no limit.
    """
    times = Counter(call.tracked for call in calls)
    for call in calls:
        tracked, size = call.tracked, size_of(call.tracked)
        call.alone = times[tracked] == 1 and not tracked.tied
        ghost = tracked.rule.ghost_norm is not None and len(tracked.names) == sum(
            1 for _ in tracked.module.parameters()
        )
        narrow = call.structure is not None and next(tracked.module.parameters()).element_size() < 4
        if not call.alone or narrow:
            call.policy = "store"  # several calls make one gradient; in 16 bits norm and sum would differ
        elif policy == "ghost":
            call.policy = "ghost" if ghost else "recompute" if size > _SMALL else "store"
        elif policy != "auto":
            call.policy = policy
        elif ghost and 8 * call.positions * _width(tracked) < size:
            call.policy = "ghost"
        elif size > _SMALL and call.positions < 2 * _BALANCE.get(device, 7):
            call.policy = "recompute"
        else:
            call.policy = "store"
    if policy == "auto" and memory is not None:
        stored = [call for call in calls if call.policy == "store"]
        left = memory - sum(4 * examples * size_of(call.tracked) for call in stored)
        # Where there are few positions, recomputing costs least per byte saved.
        for call in sorted(stored, key=lambda r: r.positions):
            if left < 0 and call.alone and size_of(call.tracked) > call.kept:
                call.policy = "recompute"
                left += 4 * examples * size_of(call.tracked)


def _width(tracked: TrackedLayer) -> int:
    """Numbers that go in and come out at one position of a matrix-like layer."""
    weight = next(tracked.module.parameters())
    return int(weight.shape[0] + weight[0].numel())
