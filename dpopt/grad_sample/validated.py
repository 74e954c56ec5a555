"""For which model, loss and input shapes the check of per-sample gradients has passed, so that no step repeats it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from dpopt.grad_sample.snapshot import same

_PLAIN = (bool, int, float, str, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class _Shapes:
    """The smallest and the largest size of every dimension that was validated."""

    low: tuple[int, ...]
    high: tuple[int, ...]


@dataclass(eq=False)
class _Values:
    """What a tensor holds now."""

    tensor: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Values) and same(self.tensor, other.tensor)


class Validated:
    """The model as it was validated last, and the shapes of inputs that passed.

    Attributes:
        written: (module, attribute) of the numbers that forward itself changes with the shape of its inputs, which are
            left out of the comparison; and of the buffers that it changes, in which nobody else may write. `validate`
            fills it.
    """

    def __init__(self) -> None:
        self.written: set[tuple[nn.Module, str]] = set()
        self._structure: Any = None
        self._shapes: dict[Any, _Shapes] = {}

    def covers(self, model: nn.Module, loss_fn: Any, inputs: Tensor, gradients: bool) -> bool:
        """Tell whether the model, as it is now, has passed for inputs (B, K, …) of this dtype and about this shape.

        B examples have K augmented views each. `gradients` asks for a check of gradients, not of the loss alone.
        """
        shapes = self._shapes.get((inputs.dtype, inputs.ndim, gradients))
        if shapes is None or self._structure != self._describe(model, loss_fn):
            return False
        return all(a <= n <= b for a, n, b in zip(shapes.low, inputs.shape, shapes.high, strict=True))

    def add(self, model: nn.Module, loss_fn: Any, inputs: Tensor, gradients: bool) -> None:
        """Record a passed check: it holds while every dimension stays between the sizes seen so far."""
        structure = self._describe(model, loss_fn)
        if structure != self._structure:
            self._structure, self._shapes = structure, {}
        shape = tuple(inputs.shape)
        shapes = self._shapes.setdefault((inputs.dtype, inputs.ndim, gradients), _Shapes(shape, shape))
        shapes.low = tuple(map(min, shapes.low, shape))
        shapes.high = tuple(map(max, shapes.high, shape))

    def _describe(self, model: nn.Module, loss_fn: Any) -> Any:
        loss = _parts(loss_fn, self.written) if isinstance(loss_fn, nn.Module) else loss_fn
        return _parts(model, self.written), loss


def _parts(model: nn.Module, written: set[tuple[nn.Module, str]]) -> tuple[Any, ...]:
    """List what can change what the model computes: modules, their plain attributes, hooks, dtypes, what is trained.

    It runs in every step, at 1 to 2 µs per module. Modules and hooks are kept as objects: Python may give the `id()` of
    a deleted one to another.
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
            buffers = attributes["_buffers"].items()
            held = [x.detach().clone() for name, x in buffers if x is not None and (module, name) in written]
            found += map(_Values, held)
            found += [v for k, v in attributes.items() if type(v) in _PLAIN and (module, k) not in written]
        else:
            found += [v for v in attributes.values() if type(v) in _PLAIN]
        for name in _HOOKS:
            if hooks := attributes.get(name):
                found += hooks.values()
        if "forward" in attributes:
            found.append(attributes["forward"])  # replaced on this module alone
        found += [p if p is None else (p.requires_grad, p.dtype) for p in attributes["_parameters"].values()]
        todo += [child for child in attributes["_modules"].values() if child is not None]
    return tuple(found)
