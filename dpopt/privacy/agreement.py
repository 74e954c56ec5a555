"""Before its first step each rank proves to the others that it trains the same: key, plan, data, model, clip, noise.

Ranks with different keys would draw different batches and noise, and add up sums that belong to nothing. What is
compared are HMACs (RFC 2104) under the plan's key: they tell nothing of data or weights to whoever reads along.
"""

import hmac
from typing import Any

import torch

from dpopt import ranks
from dpopt.data.fingerprint import combine, module_fingerprint, tensor_digest
from dpopt.privacy.noise import NOISE_VERSION, add_noise
from dpopt.rng import RandomKey

_LABEL = "dpopt: ranks agree"
_PROBE = 1 << 18  # draws: two processors' last bits differ in some of their roundings to the grid
_FIXES = {
    "secret key": "make the plan with PrivacyPlan.calibrate after the process group, on every rank, or give it a seed",
    "plan": "give every rank the same plan and the same first step, and the same checkpoint to go on from",
    "data": "give every rank the whole dataset, in the same order",
    "model": "build it from the same seed or file on every rank, and resume all from one checkpoint",
    "clip rule": "give every rank the same clip rule, estimator, scale, filter and canaries",
    "noise": "use processors of one kind with the same versions of dpopt, torch and NumPy",
}


def check_agreement(private: Any, data: str) -> None:
    """Compare what makes a training over all ranks.

    Args:
        private: the `PrivateGradient` before its first step.
        data: fingerprint of the dataset that its batches come from.

    Raises:
        ValueError: on every rank, naming a rank that differs, in what, and the fix.
    """
    plan, model, clip = private.plan, private.model, private.clip
    shapes = [f"{n} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for n, p in model.named_parameters()]
    seams = [private.pre_clip_scale is not None, private.query_points is not None, private.canaries is not None]
    facts = {
        "secret key": "",
        "plan": combine(str(plan.to_dict()), str(private.step)),
        "data": data,
        "model": combine(*shapes, module_fingerprint(model)),
        "clip rule": combine(type(private).__name__, type(clip).__name__, str(private._sensitivity()), str(seams)),
        "noise": _noise(next(model.parameters())),
    }
    key = plan.key.for_workers(_LABEL).material
    macs = {
        name: hmac.digest(key, f"{_LABEL}\0{name}\0{fact}".encode(), "sha256").hex() for name, fact in facts.items()
    }
    if (difference := ranks.first_difference(macs)) is not None:
        rank, name = difference
        raise ValueError(
            f"rank {rank} has another {name} than rank 0, so their sums do not belong together: {_FIXES[name]}"
        )


def check_weights(model: torch.nn.Module) -> None:
    """Compare the trained parameters of all ranks.

    Raises:
        ValueError: on every rank, where they have drifted apart.
    """
    if ranks.share().world == 1:
        return
    digests = [tensor_digest(p) for p in model.parameters() if p.requires_grad]
    if (difference := ranks.first_difference({"weights": combine(*digests)})) is not None:
        raise ValueError(
            f"the weights of rank {difference[0]} are no longer those of rank 0, though each step was the same: use "
            "processors of one kind and an optimizer that repeats itself; the run continues from its last checkpoint"
        )


def _noise(parameter: torch.Tensor) -> str:
    """Fingerprint the noise that this process draws and how it rounds it."""
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    probe = torch.zeros(_PROBE, dtype=dtype, device=parameter.device)
    add_noise(probe, 1.0, 1.0, RandomKey(_LABEL.encode()), 0)
    return combine(str(NOISE_VERSION), torch.__version__, tensor_digest(probe))
