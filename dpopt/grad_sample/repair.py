"""Repair a model that private training refuses: BatchNorm becomes GroupNorm, rates of dropout become 0.

In-place activations stay: every way of taking per-sample gradients keeps what it needs before they overwrite it.
"""

import copy
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dpopt.grad_sample.model_check import random_rate, refusals, uses_the_batch

_MOST_GROUPS = 32  # as Wu & He (1803.08494), fewer where the channels do not divide
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Fixed:
    """A repaired model, and what was done to it.

    Attributes:
        model: a repaired copy; the model that was given is as it was.
        changes: what was changed, a sentence per layer.
        remaining: what is still refused and has to be changed by hand; empty for a model that may be trained.
    """

    model: nn.Module
    changes: list[str]
    remaining: list[str]

    def __str__(self) -> str:
        lines = [*self.changes, *(f"not fixed: {sentence}" for sentence in self.remaining)]
        return "\n".join(lines or ["nothing to fix"])


def fix(model: nn.Module) -> Fixed:
    """Repair a copy of a model for private training.

    BatchNorm becomes GroupNorm with the same affine values and without running statistics, so a pretrained model
    computes something else until it is trained. Layers in eval mode stay: they are frozen. What a forward does by
    itself, `F.dropout` for instance, is not seen here; `PrivateGradient` validates it before the first step.
    """
    model, changes = copy.deepcopy(model), list[str]()
    while isinstance(model, DistributedDataParallel | DataParallel):
        changes.append(f"{type(model).__name__}: the model within it is taken; per-example gradients need no averaging")
        model = model.module
    for name, module in list(model.named_modules()):
        if (repaired := _repaired(module)) is not None:
            other, what = repaired
            changes.append(f"layer '{name}': {what}")
            model = _put(model, name, other)
    return Fixed(model, changes, list(refusals(model, private=True)))


def _repaired(module: nn.Module) -> tuple[nn.Module, str] | None:
    """Return what takes the place of a layer, and a sentence about it; None where nothing is to be done."""
    kind = type(module).__name__
    if isinstance(module, _BatchNorm) and type(module) in _BATCH_NORMS and uses_the_batch(module):
        return _group_norm(module)
    if isinstance(module, _InstanceNorm) and uses_the_batch(module):
        module.track_running_stats = False
        module.running_mean = module.running_var = module.num_batches_tracked = None
        return module, f"{kind} keeps no running statistics any more"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        was, module.max_norm = module.max_norm, None
        return module, f"{kind}.max_norm={was} is None now"
    if module.training and (found := random_rate(module)) is not None:
        attribute, rate = found
        setattr(module, attribute, 0.0)
        return module, f"{kind}.{attribute}={rate:g} is 0 now; the noise of the gradient regularizes, too"
    return None


def _group_norm(norm: _BatchNorm) -> tuple[nn.Module, str]:
    """Make a GroupNorm with a layer's affine values.

    Features (N, C) get one group: of two channels without positions, a group would keep signs alone.
    """
    channels = norm.num_features
    most = 1 if isinstance(norm, nn.BatchNorm1d) else min(_MOST_GROUPS, max(channels // 2, 1))
    groups = max(count for count in range(1, most + 1) if channels % count == 0)
    made = nn.GroupNorm(groups, channels, norm.eps, norm.affine)
    if norm.affine:
        made.weight, made.bias = norm.weight, norm.bias
    dropped = "" if norm.running_mean is None else "; its running statistics are dropped"
    affine = "with its affine values" if norm.affine else "without affine values"
    return made.train(norm.training), f"{type(norm).__name__} is GroupNorm({groups}, {channels}) now, {affine}{dropped}"


def _put(model: nn.Module, name: str, other: nn.Module) -> nn.Module:
    """Put a layer in its place, wherever the model holds the one that was there."""
    if not name:
        return other
    there = model.get_submodule(name)
    for holder in list(model.modules()):
        for key, child in list(holder._modules.items()):
            if child is there:
                holder._modules[key] = other
    return model
