"""Hold clip rules to what they promise: no weighted gradient is longer than S, and no example's count exceeds ½.

The noise is made for the sensitivity S that a rule states. A rule of the library is trusted to weigh each example by
its own norm. Any other rule is asked for one example at a time, must not change while it weighs, and its weights are
cut to S/‖g‖: an example then adds at most S to the sum, and no example's weight depends on another example.
"""

import pickle

import torch
from torch import Tensor

from dpopt.privacy.adaptive import Adaptive
from dpopt.privacy.clipping import PSAC, PSASC, Automatic, ClipRule, Flat, PerLayer

_TRUSTED = (Flat, Automatic, PSAC, PSASC, PerLayer, Adaptive)


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
    weights = clip.weight(norms) if type(clip) in _TRUSTED else _one_by_one(clip, norms)
    if weights.shape != norms.shape:
        raise ValueError(
            f"{type(clip).__name__}.weight gives weights of shape {tuple(weights.shape)} for norms of shape "
            f"{tuple(norms.shape)}: return one weight per norm"
        )
    lengths = (weights * norms).abs().view(len(norms), -1).norm(dim=1)
    factor = (bound / lengths).clamp(max=1.0).view(-1, *(1,) * (norms.ndim - 1))
    weights = weights * factor
    return torch.where(present.view(factor.shape) & weights.isfinite(), weights, 0.0)


def _one_by_one(clip: ClipRule, norms: Tensor) -> Tensor:
    before = _state(clip)
    weights = [clip.weight(norms[i : i + 1]) for i in range(len(norms))]
    if _state(clip) != before:
        raise ValueError(
            f"{type(clip).__name__} changes while it weighs examples, so its clip norm would follow raw norms, which "
            "are private: move it in observe(count, batch_size) of a subclass of dpopt.clipping.Adaptive"
        )
    return torch.cat(weights) if weights else torch.ones_like(norms)


def unclipped_count(clip: Adaptive, norms: Tensor, present: Tensor) -> float:
    """Add up the centered indicators of the examples that are present, each at most ½ in size; raw, hence private."""
    if type(clip) is Adaptive:
        return clip.count(norms, present)
    counts = [clip.count(norms[i : i + 1], present[i : i + 1]) for i in torch.nonzero(present).flatten().tolist()]
    return sum(min(max(float(count), -0.5), 0.5) if count == count else 0.0 for count in counts)


def _state(clip: ClipRule) -> bytes:
    """Everything that a rule keeps, and its sensitivity."""
    kept = {name: value for name, value in getattr(clip, "__dict__", {}).items()}
    try:
        return pickle.dumps((kept, float(clip.sensitivity)))
    except (pickle.PicklingError, TypeError, AttributeError):
        return repr((sorted(kept), float(clip.sensitivity))).encode()
