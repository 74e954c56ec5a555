"""What one backward pass leaves of a micro-batch: the norms of its examples, and what their weighted sum is made of."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from dpopt.privacy.rules import BY_VMAP
from dpopt.privacy.tensors import Gradients, at_once, by_example, memory_order, square_norms
from dpopt.privacy.units import Inseparable, Unit


@dataclass(eq=False)
class Record:
    """One call of a unit: its arguments, and the gradient with respect to its output once that has come back.

    Attributes:
        versions: of the tensors among the arguments when they were read.
        positions: of an example, over its views, at which the layer's weight is used.
        kept: values of an example in arguments and output.
        policy: what is done with the gradients.
        alone: whether this call is all that the unit's parameters are used for.
    """

    unit: Unit
    arguments: tuple[Any, ...]
    versions: list[int]
    positions: int
    kept: int
    policy: str = "store"
    alone: bool = True
    output_gradient: Tensor | None = None


class Taken:
    """Per-example gradients of one micro-batch.

    Args:
        examples: B.
        scale: by which gradients are multiplied, element by element, before their norms are taken; by parameter name.

    Attributes:
        losses: mean loss of each example over its views, (B,).
        norms: of each example's (scaled) gradient over all parameters, (B,), at least float32; not finite where the
            gradient is not, or where its square overflows.
        layers: names of the modules with trainable parameters of their own.
        layer_norms: of each example's gradient in each of them, (B, L).
    """

    def __init__(self, examples: int, scale: Gradients | None = None) -> None:
        self.examples, self.scale = examples, scale
        self.losses = self.norms = self.layer_norms = torch.empty(0)
        self.layers: list[str] = []
        self._squares: Gradients = {}  # by layer
        self._stored: list[tuple[Unit | None, Gradients]] = []  # without a unit: by the model's names
        self._kept: list[Record] = []

    def store(self, unit: Unit | None, found: Gradients) -> None:
        """Keep gradients (B, *shape), and count their norms."""
        with exact(next(iter(found.values())).device):
            self._count(squares_of(unit, found, self.scale))
        self._stored.append((unit, found))

    def keep(self, record: Record, squares: Gradients) -> None:
        """Keep what a layer's sum can be made of."""
        self._count(squares)
        self._kept.append(record)

    def finish(self, losses: Tensor) -> "Taken":
        """Add up the norms."""
        self.losses, self.layers = losses, list(self._squares)
        squares = torch.stack(list(self._squares.values()), 1)
        dtype = max(losses.dtype, torch.float32, key=_bits)
        self.layer_norms, self.norms = squares.sqrt().to(dtype), squares.sum(1).sqrt().to(dtype)
        return self

    def gradients(self) -> Gradients:
        """(B, *shape) by the model's names; all must have been stored."""
        return {name: g for unit, found in self._stored for name, g in _by_model_names(unit, found).items()}

    def tensors(self) -> tuple[Any, ...]:
        """All that it holds, for a compiled graph to return."""
        kept = [(record.arguments, record.output_gradient) for record in self._kept]
        return self.losses, self.norms, self.layer_norms, [found for _, found in self._stored], kept

    def form(self) -> "Taken":
        """The same layers, without the tensors."""
        other = Taken(self.examples)
        other.layers = self.layers
        other._stored = [(unit, {}) for unit, _ in self._stored]
        other._kept = [replace(record, arguments=(), output_gradient=None) for record in self._kept]
        return other

    def filled(self, tensors: tuple[Any, ...]) -> "Taken":
        """This form, with tensors that a compiled graph has returned."""
        other = Taken(self.examples)
        other.layers = self.layers
        other.losses, other.norms, other.layer_norms, stored, kept = tensors
        other._stored = [(unit, found) for (unit, _), found in zip(self._stored, stored, strict=True)]
        other._kept = [
            replace(record, arguments=arguments, output_gradient=g)
            for record, (arguments, g) in zip(self._kept, kept, strict=True)
        ]
        return other

    def add_to(self, sums: Gradients, weights: Tensor) -> None:
        """sums[name] += Σ weights[i]·g_i[name], not scaled; an example whose norm is not finite counts as zero.

        Args:
            sums: fp32 (float64 for a float64 model), by the model's parameter names.
            weights: (B,), or (B, L) with one for every layer; finite.
        """
        broken = ~self.norms.isfinite()
        weights = weights.masked_fill(broken.view(-1, *(1,) * (weights.ndim - 1)), 0.0)
        # What is not finite is selected away before any reduction: 0·NaN is NaN.
        select = broken if bool(broken.any()) else None

        def weight(layer: str) -> Tensor:
            return weights if weights.ndim == 1 else weights[:, self.layers.index(layer)].contiguous()

        with exact(weights.device):
            for unit, found in self._stored:
                local = {n: _weighted(g, weight(_layer(unit, n)), select) for n, g in found.items()}
                _add(sums, unit, local)
            for record in self._kept:
                unit = record.unit
                layers = dict.fromkeys(_layer(unit, name) for name in unit.names)
                arguments, g = _split(record, self.examples)
                if select is not None:
                    g = g.masked_fill(_column(select, g), 0.0)
                    arguments = tuple(
                        x.masked_fill(_column(select, x), 0.0) if isinstance(x, Tensor) and x.is_floating_point() else x
                        for x in arguments
                    )
                together = tuple(x.flatten(0, 1)[None] if isinstance(x, Tensor) else x for x in arguments)
                for layer in layers if weights.ndim > 1 else ("",):
                    weighted = g.mul(_column(weight(layer), g)).flatten(0, 1)[None]
                    local = {name: gradient[0] for name, gradient in _apply(unit, together, weighted).items()}
                    _add(sums, unit, local, layer if len(layers) > 1 and weights.ndim > 1 else None)

    def _count(self, squares: Gradients) -> None:
        for layer, square in squares.items():
            self._squares[layer] = self._squares[layer] + square if layer in self._squares else square


def _add(sums: Gradients, unit: Unit | None, local: Gradients, layer: str | None = None) -> None:
    """Add summed gradients of a unit, of one layer within it only where one is named."""
    if unit is None:
        for name, gradient in local.items():
            sums[name] += gradient
        return
    if unit.rule.pull_back is not None:
        local = unit.rule.pull_back(unit.module, local)
    for name, full in unit.names.items():
        if layer in (None, _layer(unit, name)):
            sums[full] += local[name]


def _layer(unit: Unit | None, name: str) -> str:
    """The module that a parameter belongs to: the unit, but for units that were left in one piece."""
    if unit is not None and unit.rule is not BY_VMAP:
        return unit.name
    return (name if unit is None else unit.names[name]).rpartition(".")[0]


def _by_model_names(unit: Unit | None, found: Gradients) -> Gradients:
    """Per-example gradients of the parameters themselves."""
    if unit is None:
        return found
    if (pull_back := unit.rule.pull_back) is not None:
        found = vmap(lambda one: pull_back(unit.module, one))(found)
    return {full: found[name] for name, full in unit.names.items()}


def squares_of(unit: Unit | None, found: Gradients, scale: Gradients | None = None) -> Gradients:
    """Squared norms (B,) of every layer's gradients, scaled first if need be, in float64."""
    if unit is not None and unit.rule.square_norms is not None and scale is None:
        return {unit.name: unit.rule.square_norms(unit.module, found)}
    squares: Gradients = {}
    for name, gradient in _by_model_names(unit, found).items():
        layer = name.rpartition(".")[0]
        square = square_norms(by_example(gradient if scale is None else gradient * scale[name]))
        squares[layer] = squares[layer] + square if layer in squares else square
    return squares


def _weighted(gradient: Tensor, weights: Tensor, select: Tensor | None) -> Tensor:
    """Σ weights[i]·gradient[i], (*shape)."""
    rows = by_example(gradient).to(weights.dtype)
    if select is not None:
        rows = rows.masked_fill(select[:, None], 0.0)
    order = memory_order(gradient)
    total = torch.mv(rows.T, weights).view([gradient.shape[i] for i in order])
    return total.permute([order.index(i) for i in range(1, gradient.ndim)])


def _apply(unit: Unit, arguments: tuple[Any, ...], g: Tensor) -> Gradients:
    """The rule's gradients of the trainable parameters; under a function of the parameters, all that it needs."""
    if unit.rule is BY_VMAP:
        return unit.rule.gradients(unit.module, arguments, g)
    found = unit.rule.gradients(unit.module, arguments[0], g)
    return found if unit.rule.pull_back is not None else {name: found[name] for name in unit.names}


def _column(x: Tensor, like: Tensor) -> Tensor:
    """One number per example, or a yes or no, (B, 1, …), to go with a tensor (B, …) and in its type."""
    x = x.view(-1, *(1,) * (like.ndim - 1))
    return x if x.dtype == torch.bool else x.to(like)


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def _split(record: Record, examples: int) -> tuple[tuple[Any, ...], Tensor]:
    """Arguments and output gradient, (B, K, …), in one floating-point type: where gradients are not stored as they are
    formed, that of the sum, since the norm must be the norm of what is summed."""
    g = record.output_gradient
    assert g is not None
    dtype = g.dtype if record.policy == "store" else max(g.dtype, torch.float32, key=_bits)
    arguments = tuple(
        (x.to(dtype) if x.is_floating_point() else x).unflatten(0, (examples, -1)) if isinstance(x, Tensor) else x
        for x in record.arguments
    )
    return arguments, g.to(dtype).unflatten(0, (examples, -1))


class Gathered:
    """What comes back from one backward pass, layer by layer."""

    def __init__(self, taken: Taken) -> None:
        self.taken = taken
        self._partial: dict[Any, tuple[Unit | None, Gradients]] = {}

    @torch.no_grad()
    def arrived(self, record: Record, g: Tensor) -> None:
        """The gradient with respect to a layer's output has come back."""
        unit, examples = record.unit, self.taken.examples
        if [x._version for x in record.arguments if isinstance(x, Tensor)] != record.versions:
            raise ValueError(
                f"the input of layer '{unit.name}' is changed in place after the layer has read it: "
                "use an operation that is not in place there, or engine=vmap"
            )
        record.output_gradient = g
        with torch.autocast(g.device.type, enabled=False):
            arguments, g = _split(record, examples)
            if record.policy == "store":
                self._store(record, _apply(unit, arguments, g))
                record.arguments, record.output_gradient = (), None
                return
            with exact(g.device):
                if (closed := self._closed_form(record, arguments[0], g)) is not None:
                    squares = {unit.name: closed}
                else:
                    count = at_once(g, size_of(unit))
                    parts = [
                        squares_of(unit, _apply(unit, _rows(arguments, i, count), g[i : i + count]), self.taken.scale)
                        for i in range(0, examples, count)
                    ]
                    squares = {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}
            self.taken.keep(record, squares)

    def _closed_form(self, record: Record, a: Any, g: Tensor) -> Tensor | None:
        """Squared norms without the gradients, where the layer's rule has them."""
        unit, scale = record.unit, self.taken.scale
        if record.policy != "gram":
            return None
        if scale is None:
            assert unit.rule.gram is not None
            return unit.rule.gram(unit.module, a, g)
        if unit.rule.scaled_gram is None or record.positions > 1:
            return None
        return unit.rule.scaled_gram(unit.module, a, g, {name: scale[full] for name, full in unit.names.items()})

    def _store(self, record: Record, found: Gradients) -> None:
        unit = record.unit
        if record.alone:
            self.taken.store(unit, found)
        elif unit.tied:  # by the model's names, in which tied parameters are one
            for name, gradient in found.items():
                self._add(unit.names[name], None, {unit.names[name]: gradient})
        else:
            self._add(unit, unit, found)

    def _add(self, key: Any, unit: Unit | None, found: Gradients) -> None:
        _, total = self._partial.setdefault(key, (unit, {}))
        for name, gradient in found.items():
            total[name] = total[name] + gradient if name in total else gradient

    def finish(self) -> None:
        """All has come back that will."""
        for unit, total in self._partial.values():
            self.taken.store(unit, total)


def _rows(arguments: tuple[Any, ...], start: int, count: int) -> tuple[Any, ...]:
    return tuple(x[start : start + count] if isinstance(x, Tensor) else x for x in arguments)


def record_of(unit: Unit, arguments: tuple[Any, ...], output: Any, examples: int) -> Record:
    """The record of a call.

    Raises:
        Inseparable: when arguments and output are not tensors with the examples, or pieces of them, first.
    """
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    if (
        not isinstance(output, Tensor)
        or not tensors
        or any(x.ndim == 0 or len(x) % examples for x in [output, *tensors])
    ):
        raise Inseparable(unit.name)
    weight = next(iter(unit.module.parameters()))
    width = weight.shape[0] if weight.ndim > 1 else max(1, weight.numel())
    # Detached, which shares the version: a record that held the graph would be held by it, through the hook.
    arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    positions, kept = output.numel() // (examples * width), sum(x.numel() for x in [output, *tensors]) // examples
    return Record(unit, arguments, [x._version for x in tensors], max(1, positions), kept)


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Matrix products in full precision: TF32 or autocast would round the sum, and it could be longer than its norm."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        cudnn = torch.backends.cudnn.flags(allow_tf32=False) if device.type == "cuda" else nullcontext()
        with cudnn, torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def size_of(unit: Unit) -> int:
    """Number of values in the gradient of one example."""
    return sum(p.numel() for p in unit.module.parameters() if p.requires_grad)
