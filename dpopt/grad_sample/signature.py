"""What a validation holds for: the structure of model and loss, and the shapes of inputs."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_SCALARS = (bool, int, float, str, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class _Shapes:
    """Shapes between the smallest and the largest that were validated."""

    low: tuple[int, ...]
    high: tuple[int, ...]


class Validated:
    """The model as it was validated last, and the shapes of inputs that passed.

    Attributes:
        written: (module, attribute) of the numbers that a forward writes, whatever its inputs.
    """

    def __init__(self) -> None:
        self.written: set[tuple[nn.Module, str]] = set()
        self._structure: Any = None
        self._shapes: dict[Any, _Shapes] = {}

    def covers(self, model: nn.Module, loss_fn: Any, inputs: Tensor, gradients: bool) -> bool:
        """Tell whether a model in its present state may take inputs (B, K, …) of this shape and dtype."""
        shapes = self._shapes.get((inputs.dtype, inputs.ndim, gradients))
        if shapes is None or self._structure != self._structure_of(model, loss_fn):
            return False
        return all(a <= n <= b for a, n, b in zip(shapes.low, inputs.shape, shapes.high, strict=True))

    def add(self, model: nn.Module, loss_fn: Any, inputs: Tensor, gradients: bool) -> None:
        """Record a passed validation; shapes between two validated ones count as validated."""
        structure = self._structure_of(model, loss_fn)
        if structure != self._structure:
            self._structure, self._shapes = structure, {}
        shape = tuple(inputs.shape)
        shapes = self._shapes.setdefault((inputs.dtype, inputs.ndim, gradients), _Shapes(shape, shape))
        shapes.low = tuple(map(min, shapes.low, shape))
        shapes.high = tuple(map(max, shapes.high, shape))

    def _structure_of(self, model: nn.Module, loss_fn: Any) -> Any:
        loss = _structure(loss_fn, self.written) if isinstance(loss_fn, nn.Module) else loss_fn
        return _structure(model, self.written), loss


def _structure(model: nn.Module, written: set[tuple[nn.Module, str]]) -> tuple[Any, ...]:
    """Modules, modes, settings, hooks, and which parameters are trained; 1 to 2 µs per module.

    Modules and hooks enter as themselves, not by id, so that a new one is never taken for the one whose memory it got.
    """
    found: list[Any] = [tuple(torch_module._global_forward_hooks), tuple(torch_module._global_forward_pre_hooks)]
    todo, seen = [model], set()
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        attributes = module.__dict__
        found += (module, type(module), type(module).forward)
        if written:
            found += [v for k, v in attributes.items() if type(v) in _SCALARS and (module, k) not in written]
        else:
            found += [v for v in attributes.values() if type(v) in _SCALARS]
        for name in _HOOKS:
            if hooks := attributes.get(name):
                found += hooks.values()
        if "forward" in attributes:
            found.append(attributes["forward"])
        found += [p if p is None else (p.requires_grad, p.dtype) for p in attributes["_parameters"].values()]
        todo += [child for child in attributes["_modules"].values() if child is not None]
    return tuple(found)
