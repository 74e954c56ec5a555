"""What a model must be before anything is trained: its examples independent, its random numbers keyed."""

from torch import nn


def check_model(model: nn.Module, private: bool) -> None:
    """Refuse a model that cannot be trained as asked.

    Raises:
        ValueError: naming the layer, the reason and the fix.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameter: unfreeze at least its last layer")
    for name, module in model.named_modules():
        kind = type(module).__name__
        if (
            private
            and isinstance(module, nn.modules.batchnorm._NormBase)
            and (isinstance(module, nn.modules.batchnorm._BatchNorm) or module.track_running_stats)
        ):
            covered = ", ".join(f"{name}.{n}" for n, _ in module.named_parameters(recurse=False)) or "its statistics"
            raise ValueError(
                f"layer '{name}' ({kind}) mixes the examples of a batch, so {covered} have no per-example gradient: "
                "replace it by torch.nn.GroupNorm (the model resnet18 shows how), or train with privacy=none"
            )
        rate = getattr(module, "drop_prob", getattr(module, "p", None) if "Dropout" in kind else None)
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            rate = module.dropout
        if module.training and rate:
            raise ValueError(
                f"layer '{name}' ({kind}) draws random numbers that are not keyed by example, so a run could not be "
                "resumed or split into other micro-batches: set its rate to 0"
            )
