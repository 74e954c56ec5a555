"""What a model must be before anything is trained: its examples independent, its random numbers keyed."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_Norm = nn.modules.batchnorm._NormBase


def check_model(model: nn.Module, private: bool) -> None:
    """Refuse a model that cannot be trained as asked.

    Raises:
        ValueError: naming the layer, the reason and the fix.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameter: unfreeze at least its last layer")
    for name, p in model.named_parameters():
        if p.requires_grad and p.is_complex():
            raise ValueError(
                f"the parameter '{name}' is complex, and clip and noise are made for real numbers: hold it as two real "
                "parameters and join them with torch.view_as_complex"
            )
        if hasattr(p, "device_mesh"):  # a DTensor, whose module takes half a second to import
            raise ValueError(
                f"the parameter '{name}' is sharded over processes (FSDP2), and per-example gradients are of whole "
                "parameters: leave fully_shard out; a copy per rank works (docs/several_devices.md)"
            )
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, DistributedDataParallel | DataParallel):
            raise ValueError(
                f"{kind} averages gradients that are not clipped yet: pass the model itself; in a process group the "
                "sums of all ranks are added up anyway (docs/several_devices.md)"
            )
        if private:
            _check_private(name, module)
        rate = getattr(module, "drop_prob", getattr(module, "p", None) if "Dropout" in kind else None)
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            rate = module.dropout
        if module.training and rate:
            raise ValueError(
                f"layer '{name}' ({kind}) draws random numbers that are not keyed by example, so a run could not be "
                "resumed or split into other micro-batches: set its rate to 0"
            )


def _check_private(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if isinstance(module, _Norm) and _uses_the_batch(module):
        covered = ", ".join(f"{name}.{n}" for n, _ in module.named_parameters(recurse=False)) or "its statistics"
        raise ValueError(
            f"layer '{name}' ({kind}) mixes the examples of a batch, so {covered} have no per-example gradient: "
            "replace it by torch.nn.GroupNorm (the model resnet18 shows how), put it into eval() for good if it is "
            "pretrained, or train with privacy=none"
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        raise ValueError(
            f"layer '{name}' ({kind}) has max_norm={module.max_norm}, which rescales the rows that a batch uses, past "
            "clip and noise: set max_norm=None"
        )


def _uses_the_batch(module: _Norm) -> bool:
    """Tell whether a layer reads or writes statistics of the batch; frozen ones, in eval mode, do not."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.training and bool(module.track_running_stats)
    return module.training or module.running_mean is None
