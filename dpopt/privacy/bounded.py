"""Hold clip rules to what they promise: no weighted gradient is longer than S, and no example's count exceeds ½.

The noise is made for the sensitivity S that a rule states. A rule of the library is trusted to weigh each example by
its own norm. Any other rule is asked for one example at a time, in order and backwards. It must not change meanwhile
and must answer the same. Its weights are cut to S/‖g‖. An example then adds at most S to the sum, and no example's
weight depends on another example.
"""

import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dpopt.privacy.adaptive import Adaptive, Slack
from dpopt.privacy.clipping import PSAC, PSASC, Automatic, ClipRule, Flat, PerLayer
from dpopt.privacy.mechanisms import INDEPENDENT
from dpopt.privacy.plan import PrivacyPlan

_OURS = (Flat, Automatic, PSAC, PSASC, PerLayer, Adaptive, Slack)


def check_clip(plan: PrivacyPlan, clip: ClipRule | None, audited: bool) -> None:
    """Refuse a clip rule that does not go with the plan.

    Args:
        plan: its noise and its count.
        clip: the rule; None for no clip.
        audited: whether there are canaries.

    Raises:
        TypeError: for a clip that is no clip rule.
        ValueError: for noise or canaries without a clip, canaries under correlated noise, or a count that the plan does
            not pay for.
    """
    if audited and clip is None:
        raise ValueError("without a clip there is nothing to audit: pass a clip rule, or no canaries")
    if audited and plan.mechanism != INDEPENDENT:
        raise ValueError(
            f"canaries score noise that is independent from step to step, which {type(plan.mechanism).__name__}'s is "
            "not: audit with mechanism=gaussian"
        )
    if clip is None and plan.noise_multiplier > 0:
        raise ValueError("noise without a clip protects nothing: pass a clip rule, for example clip=Flat(1.0)")
    if isinstance(clip, Slack) and not _is_ours(clip):
        raise ValueError(
            f"{type(clip).__name__} changes dpopt.clipping.Slack, and what it fills is not checked example by example: "
            "use Slack itself, or subclass dpopt.clipping.Adaptive"
        )
    counts = isinstance(clip, Adaptive) and not isinstance(clip, Slack)
    if clip is not None and plan.noise_multiplier > 0 and counts != (plan.count_noise > 0):
        raise ValueError(
            "an adaptive clip rule releases a count, and the plan must pay for it, and for no other: calibrate the "
            f"plan with count_noise={plan.batch_size / 20 if counts else 0:g}"
        )
    if isinstance(clip, Adaptive) and plan.count_noise and clip.count_noise not in (None, plan.count_noise):
        raise ValueError(f"count_noise={clip.count_noise} of the clip rule is {plan.count_noise:g} in the plan")
    if clip is not None and not hasattr(clip, "sensitivity"):
        raise TypeError(f"clip={clip!r} is no clip rule: pass one of dpopt.clipping, for example Flat(1.0)")


def join_scales(
    pre_clip_scale: Callable[[Tensor], Tensor | None], parameters: dict[str, nn.Parameter], total: Tensor
) -> Tensor:
    """Join an optimizer's scales to the length of the sum; 1 where it has none, and behind the gradients.

    Raises:
        ValueError: for a scale of another shape, or one that is not positive and finite.
    """
    parts = []
    for name, p in parameters.items():
        part = pre_clip_scale(p)
        part = torch.ones_like(p) if part is None else part
        if part.shape != p.shape:
            raise ValueError(f"the scale of {name} must have its shape {tuple(p.shape)}")
        parts.append(part.detach().flatten().to(total))
    scale = torch.cat([*parts, total.new_ones(len(total) - sum(map(len, parts)))])
    if not bool(((scale > 0) & scale.isfinite()).all()):  # asked once: a GPU is waited for
        named = zip(parameters, parts, strict=True)
        name = next(name for name, part in named if not bool(((part > 0) & part.isfinite()).all()))
        raise ValueError(f"the scale of {name} must be positive and finite")
    return scale


def clip_weights(clip: ClipRule, norms: Tensor, present: Tensor, bound: float) -> Tensor:
    """Weigh examples so that each weighted gradient has a norm of at most `bound`.

    Args:
        clip: the rule.
        norms: of the examples' gradients, (B,), or of their layers, (B, L), for a rule by layer.
        present: (B,), False for pads and for examples whose gradient is not finite; their weight is 0.
        bound: S, the sensitivity that the noise is made for.

    Returns:
        Weights of the shape of `norms`.

    Raises:
        ValueError: for weights of another shape, or a rule that changes while it weighs.
    """
    weights = clip.weight(norms) if _is_ours(clip) else _one_by_one(clip, norms)
    if weights.shape != norms.shape:
        raise ValueError(
            f"{type(clip).__name__}.weight gives weights of shape {tuple(weights.shape)} for norms of shape "
            f"{tuple(norms.shape)}: return one weight per norm"
        )
    if not _is_ours(clip):  # squares of what is so small underflow: its norm says nothing
        weights = weights.masked_fill(norms < (1e-140 if norms.dtype == torch.float64 else 1e-15), 0.0)
    lengths = (weights * norms).abs().view(len(norms), -1).norm(dim=1)
    factor = (bound / lengths).clamp(max=1.0).view(-1, *(1,) * (norms.ndim - 1))
    weights = weights * factor
    return torch.where(present.view(factor.shape) & weights.isfinite(), weights, 0.0)


def _is_ours(clip: ClipRule) -> bool:
    """Whether a rule is the library's, with no method replaced on the object."""
    return type(clip) in _OURS and not vars(clip).keys() & {"weight", "count", "fill"}


def unclipped_count(clip: Adaptive, norms: Tensor, present: Tensor) -> Tensor:
    """Add up the centered indicators of the examples that are present, each at most ½ in size; raw, hence private."""
    if _is_ours(clip):
        return clip.count(norms, present)

    def ask(i: int) -> Tensor:
        return torch.tensor([float(clip.count(norms[i : i + 1], present[i : i + 1]))])

    examples = torch.nonzero(present).flatten().tolist()
    if not examples:
        return torch.zeros((), dtype=torch.float64)
    counts = _ask_alone(clip, ask, examples)
    return counts.double().nan_to_num(nan=0.0).clamp(-0.5, 0.5).sum()


def _one_by_one(clip: ClipRule, norms: Tensor) -> Tensor:
    if not len(norms):
        return torch.ones_like(norms)
    return _ask_alone(clip, lambda i: clip.weight(norms[i : i + 1]), list(range(len(norms))))


def _ask_alone(clip: ClipRule, ask: Callable[[int], Tensor], examples: list[int]) -> Tensor:
    """Ask a rule about each example, in order and backwards: an answer that follows other examples would differ."""
    before = _state(clip)
    answers = torch.cat([ask(i) for i in examples])
    again = torch.cat([ask(i) for i in reversed(examples)][::-1])
    if _state(clip) != before or not torch.equal(answers.nan_to_num(), again.nan_to_num()):
        raise ValueError(
            f"{type(clip).__name__} changes while it weighs examples, or answers otherwise when it is asked again, so "
            "one example would decide over another: move the clip norm in observe(count, batch_size) of a subclass of "
            "dpopt.clipping.Adaptive, and use no other state"
        )
    return answers


def _state(clip: ClipRule) -> list[Any]:
    """Return a rule's sensitivity and what it keeps, as far as picklable."""
    kept: list[Any] = [float(clip.sensitivity)]
    for name, value in sorted(getattr(clip, "__dict__", {}).items()):
        try:
            kept.append((name, pickle.dumps(value)))
        except (pickle.PicklingError, TypeError, AttributeError):
            kept.append(name)
    return kept
