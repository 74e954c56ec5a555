"""The layers of a model that answer for its parameters, and the parameters that no layer answers for."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from dpopt.privacy.rules import BY_VMAP, Rule, rule_for


@dataclass(eq=False)
class Unit:
    """A layer that answers for its parameters.

    Attributes:
        name: of the layer in the model.
        module: the layer.
        rule: how.
        names: of its trainable parameters, within the layer → in the model.
        tied: whether another unit has one of these parameters, too.
    """

    name: str
    module: nn.Module
    rule: Rule
    names: dict[str, str]
    tied: bool = False


class Inseparable(ValueError):
    """A layer's calls do not keep the examples of a batch apart in a form that a rule could read."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"layer '{name}' does not turn tensors of a batch into one tensor of the batch, examples first: "
            "per-example gradients need engine=vmap"
        )


def find_units(model: nn.Module, whole: Collection[str] = ()) -> tuple[list[Unit], dict[str, tuple[int, ...]]]:
    """The layers that answer for the trainable parameters, and the parameters that belong to none of them.

    Args:
        model: the model.
        whole: names of modules that are not to be taken apart.

    Returns:
        The units; and of each parameter that a module holds beside its submodules the shape in which it gets a copy per
        view, the first dimension being 1.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    units: list[Unit] = []
    bare: dict[str, tuple[int, ...]] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trained or any(unit.module is module for unit in units):
            return
        own = {name for name in trained if "." not in name}
        rule = rule_for(module) if len(own) == len(trained) else None
        one = nn.utils.parametrize.is_parametrized(module) or isinstance(module, nn.MultiheadAttention)
        if rule is None and (one or prefix in whole or len(own) == len(trained)):
            rule = BY_VMAP
        if rule is not None:
            units.append(Unit(prefix, module, rule, {name: names[id(p)] for name, p in trained.items()}))
            return
        for name in own:
            shape = tuple(trained[name].shape)
            bare[names[id(trained[name])]] = shape if shape[:1] == (1,) else (1, *shape)
        for name, child in module.named_children():
            visit(f"{prefix}.{name}" if prefix else name, child)

    visit("", model)
    users: dict[str, int] = {}
    for unit in units:
        for name in unit.names.values():
            users[name] = users.get(name, 0) + 1
    for unit in units:
        unit.tied = any(users[name] > 1 or name in bare for name in unit.names.values())
    return units, bare


def copy_shapes(shape: torch.Size) -> list[tuple[int, ...]]:
    """Shapes, led by 1, in which a parameter may have a copy per example: as it is, or with dimensions before it."""
    as_it_is = [tuple(shape)] if shape[:1] == (1,) else []
    return as_it_is + [(1,) * (1 + i) + tuple(shape) for i in range(4)]
