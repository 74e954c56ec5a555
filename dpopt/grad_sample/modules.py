"""Split a model into layers that have a gradient rule and parameters held directly by container modules."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from dpopt.grad_sample.rules import BY_VMAP, Rule, rule_for


@dataclass(eq=False)
class TrackedLayer:
    """A layer whose gradients a rule computes.

    Attributes:
        name: of the layer in the model.
        module: the layer.
        rule: how.
        names: of its trainable parameters, within the layer → in the model.
        tied: whether another unit has one of these parameters, too.
        held_bare: whether a module that only contains others holds one of them, too.
    """

    name: str
    module: nn.Module
    rule: Rule
    names: dict[str, str]
    tied: bool = False
    held_bare: bool = False


class UnsupportedLayerError(ValueError):
    """The per-sample gradients of a layer cannot be told apart; a less divided way may.

    Args:
        name: of the layer.
        reason: completes the sentence "layer … ".
        step: what may help: `expand` the layer's output to one copy per view, take the layer `whole`, without its rule,
            or its `parent`.
    """

    def __init__(self, name: str, reason: str, step: str = "parent") -> None:
        self.name, self.step = name, step
        super().__init__(f"layer '{name}' {reason}: use engine=vmap, or engine=loop where vmap fails")


def find_layers(model: nn.Module, whole: Collection[str] = ()) -> tuple[list[TrackedLayer], dict[str, tuple[int, ...]]]:
    """Find the layers of the trainable parameters, and parameters of no layer.

    Args:
        model: the model.
        whole: names of modules that are not to be taken apart.

    Returns:
        The layers; and of each parameter that a module holds next to its submodules the shape in which it gets a copy
        per view, the first dimension being 1.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    tracked_layers: list[TrackedLayer] = []
    bare: dict[str, tuple[int, ...]] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trained or any(tracked.module is module for tracked in tracked_layers):
            return
        own = {name for name in trained if "." not in name}
        rule = rule_for(module) if len(own) == len(trained) else None
        one = nn.utils.parametrize.is_parametrized(module) or isinstance(module, nn.MultiheadAttention)
        if prefix in whole or (rule is None and has_forward(module) and (one or len(own) == len(trained))):
            rule = BY_VMAP
        if rule is not None:
            tracked_layers.append(
                TrackedLayer(prefix, module, rule, {name: names[id(p)] for name, p in trained.items()})
            )
            return
        for name in own:
            shape = tuple(trained[name].shape)
            bare[names[id(trained[name])]] = shape if shape[:1] == (1,) else (1, *shape)
        for name, child in module.named_children():
            visit(f"{prefix}.{name}" if prefix else name, child)

    visit("", model)
    users: dict[str, int] = {}
    for tracked in tracked_layers:
        for name in tracked.names.values():
            users[name] = users.get(name, 0) + 1
    for tracked in tracked_layers:
        tracked.held_bare = any(name in bare for name in tracked.names.values())
        tracked.tied = any(users[name] > 1 or name in bare for name in tracked.names.values())
        if tracked.tied and tracked.rule.pull_back is not None:  # gradients of tied weights are added up as they are
            tracked.rule = BY_VMAP
    return tracked_layers, bare


def has_forward(module: nn.Module) -> bool:
    """Whether a module is called, rather than only holding parameters or modules for another one."""
    return type(module).forward is not nn.Module.forward


def copy_shapes(shape: torch.Size) -> list[tuple[int, ...]]:
    """Shapes, led by 1, in which a parameter may have a copy per example: as it is, or with dimensions before it."""
    as_it_is = [tuple(shape)] if shape[:1] == (1,) else []
    return as_it_is + [(1,) * (1 + i) + tuple(shape) for i in range(4)]


def size_of(tracked: TrackedLayer) -> int:
    """Count the values in the gradient of one example."""
    return sum(p.numel() for p in tracked.module.parameters() if p.requires_grad)
