"""What a model must be before anything is trained: its examples independent, its random numbers keyed."""

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_Norm = nn.modules.batchnorm._NormBase


def check_model(model: nn.Module, private: bool) -> None:
    """Refuse a model that cannot be trained as asked.

    Raises:
        ValueError: naming the layer, the reason and the fix.
    """
    for reason in refusals(model, private):
        raise ValueError(reason)


def refusals(model: nn.Module, private: bool) -> Iterator[str]:
    """Say why a model cannot be trained as asked, a sentence per layer or parameter."""
    if not any(p.requires_grad for p in model.parameters()):
        yield "the model has no trainable parameter: unfreeze at least its last layer"
    for name, p in model.named_parameters():
        if p.requires_grad and p.is_complex():
            yield (
                f"the parameter '{name}' is complex, and clip and noise are made for real numbers: hold it as two real "
                "parameters and join them with torch.view_as_complex"
            )
        if hasattr(p, "device_mesh"):  # a DTensor, whose module takes half a second to import
            yield (
                f"the parameter '{name}' is sharded over processes (FSDP2), and per-example gradients are of whole "
                "parameters: leave fully_shard out; a copy per rank works (docs/several_devices.md)"
            )
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, DistributedDataParallel | DataParallel):
            yield (
                f"{kind} averages gradients that are not clipped yet: pass the model itself; in a process group the "
                "sums of all ranks are added up anyway (docs/several_devices.md)"
            )
        if private:
            yield from _private_refusals(name, module)
        if module.training and random_rate(module) is not None:
            yield (
                f"layer '{name}' ({kind}) draws random numbers that are not keyed by example, so a run could not be "
                "resumed or split into other micro-batches: set its rate to 0, as dpopt.fix(model) does"
            )


def random_rate(module: nn.Module) -> tuple[str, float] | None:
    """Name the attribute by which a layer draws random numbers in train mode, and its rate; None for no rate."""
    attribute = "p" if "Dropout" in type(module).__name__ else ""
    attribute = "drop_prob" if hasattr(module, "drop_prob") else attribute
    attribute = "dropout" if isinstance(module, nn.MultiheadAttention | nn.RNNBase) else attribute
    rate = getattr(module, attribute, None) if attribute else None
    return (attribute, rate) if rate else None


def _private_refusals(name: str, module: nn.Module) -> Iterator[str]:
    kind = type(module).__name__
    if isinstance(module, _Norm) and uses_the_batch(module):
        covered = ", ".join(f"{name}.{n}" for n, _ in module.named_parameters(recurse=False)) or "its statistics"
        yield (
            f"layer '{name}' ({kind}) mixes the examples of a batch, so {covered} have no per-example gradient: "
            "replace it by torch.nn.GroupNorm, as dpopt.fix(model) does and the model resnet18 shows, put it into "
            "eval() for good if it is pretrained, or train with privacy=none"
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        yield (
            f"layer '{name}' ({kind}) has max_norm={module.max_norm}, which rescales the rows that a batch uses, past "
            "clip and noise: set max_norm=None, as dpopt.fix(model) does"
        )


def uses_the_batch(module: nn.Module) -> bool:
    """Tell whether a norm reads or writes statistics of the batch; frozen ones, in eval mode, do not."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.training and bool(module.track_running_stats)
    return module.training or module.running_mean is None
