"""Per-sample gradients of a micro-batch: their norms, and what is needed to sum them under weights."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec

from dpopt.grad_sample.choices import Choices, using
from dpopt.grad_sample.fallback import LayerFunction
from dpopt.grad_sample.layout import Layout, split, with_views
from dpopt.grad_sample.modules import TrackedLayer, size_of
from dpopt.grad_sample.norms import (
    TERMS,
    Gradients,
    add_up,
    at_once,
    by_example,
    exact,
    kernels,
    memory_order,
    pieces,
    squares_by_example,
)
from dpopt.grad_sample.rules import BY_VMAP, OnChip


@dataclass(eq=False)
class LayerCall:
    """One call of a layer: its arguments, and the gradient with respect to an output once that has come back.

    Attributes:
        arguments: the leaves of positional and keyword arguments; without those that are None, for a rule.
        structure: puts the leaves together again; None for a rule, which takes one tensor.
        versions: of the tensors among the arguments when they were read.
        positions: of an example, over its views, at which the layer's weight is used.
        kept: values of an example in arguments and output.
        policy: what is done with the gradients.
        alone: whether this call is all that the layer's parameters are used for.
        shared: name of the layer that a weight of several calls counts for, where its norm is taken from all of them
            together; else empty.
        index: of the output tensor; a layer with several has a call for each.
        shape: of that tensor.
        dtype: of that tensor.
        layout: where the examples lie; None until it has been found.
        hint: a layout that fitted an equal call.
        on_chip: the kernel that recomputes the gradients, if there is one.
        wide: whether to compute in float64, since the norm is taken after a scale that may magnify rounding.
        output: what came out, kept while the layout is not known.
        scaled: gradients of the output under scaled losses.
    """

    tracked: TrackedLayer
    arguments: tuple[Any, ...]
    versions: list[int]
    positions: int
    kept: int
    policy: str = "store"
    alone: bool = True
    shared: str = ""
    output_gradient: Tensor | None = None
    structure: TreeSpec | None = None
    index: int = 0
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    layout: Layout | None = None
    hint: Layout | None = None
    on_chip: OnChip | None = None
    wide: bool = False
    output: Tensor | None = None
    scaled: list[Tensor] = field(default_factory=list)

    def signature(self) -> tuple[Any, ...]:
        """Return the layer and the shapes of its tensors.

        Calls of a model without branches have equal layouts if these are equal.
        """
        shapes = tuple(x.shape if isinstance(x, Tensor) else x for x in self.arguments if not isinstance(x, float))
        return self.tracked.name, self.index, self.shape, shapes

    def divided(self) -> tuple[bool, ...]:
        """Which arguments are divided among examples."""
        if self.structure is None or self.layout is None:
            return (True,)
        return tuple(dim is not None for dim in self.layout.inputs)


class PerSampleGradients:
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
        stored: the gradients of units; without a unit, by the model's names.
        kept: calls of layers whose sums are made later.
        choices: what is fastest, so that gradients that are taken twice are taken in the same way.
    """

    def __init__(self, examples: int, scale: Gradients | None = None) -> None:
        self.examples, self.scale = examples, scale
        self.losses = self.norms = self.layer_norms = torch.empty(0, dtype=torch.float32)
        self.layers: list[str] = []
        self._squares: Gradients = {}  # by layer
        self.stored: list[tuple[TrackedLayer | None, Gradients]] = []
        self.kept: list[LayerCall] = []
        self.choices: Choices | None = None

    def store(self, tracked: TrackedLayer | None, found: Gradients) -> None:
        """Keep gradients (B, *shape), and count their norms."""
        self.count_stored(tracked, found)
        self.stored.append((tracked, found))

    def keep(self, call: LayerCall) -> None:
        """Keep what a layer's sum can be made of; its norms are counted by the caller."""
        self.kept.append(call)

    def finish(self, losses: Tensor) -> "PerSampleGradients":
        """Add up the norms."""
        self.losses, self.layers = losses, list(self._squares)
        squares = torch.stack(list(self._squares.values()), 1)
        dtype = torch.promote_types(losses.dtype, torch.float32)
        self.layer_norms, self.norms = squares.sqrt().to(dtype), squares.sum(1).sqrt().to(dtype)
        return self

    def gradients(self) -> Gradients:
        """(B, *shape) by the model's names; all must have been stored."""
        return {name: g for tracked, found in self.stored for name, g in _by_model_names(tracked, found).items()}

    def tensors(self) -> tuple[Any, ...]:
        """All that sums are made of, for a compiled graph to return."""
        kept = [(call.arguments, call.output_gradient) for call in self.kept]
        return self.losses, [found for _, found in self.stored], kept

    def form(self) -> "PerSampleGradients":
        """Return the same layers, without the tensors."""
        other = PerSampleGradients(self.examples)
        other.stored = [(tracked, {}) for tracked, _ in self.stored]
        other.kept = [replace(call, arguments=(), output_gradient=None) for call in self.kept]
        return other

    def filled(self, tensors: tuple[Any, ...]) -> "PerSampleGradients":
        """Return this form, with tensors that a compiled graph has returned, and without norms."""
        other = PerSampleGradients(self.examples)
        other.losses, stored, kept = tensors
        other.stored = [(tracked, found) for (tracked, _), found in zip(self.stored, stored, strict=True)]
        other.kept = [
            replace(call, arguments=arguments, output_gradient=g)
            for call, (arguments, g) in zip(self.kept, kept, strict=True)
        ]
        return other

    def add_weighted_sum(self, sums: Gradients, weights: Tensor) -> None:
        """sums[name] += Σ weights[i]·g_i[name], not scaled; an example whose norm is not finite counts as zero.

        Args:
            sums: fp32 (float64 for a float64 model), by the model's parameter names.
            weights: (B,), or (B, L) with one for every layer; finite.
        """
        broken = ~self.norms.isfinite()
        weights = weights.masked_fill(broken.view(-1, *(1,) * (weights.ndim - 1)), 0.0)
        # What is not finite is selected away before any reduction: 0·NaN is NaN.
        select = broken if broken.is_cuda or bool(broken.any()) else None  # a GPU is not waited for

        def weight(layer: str) -> Tensor:
            return weights if weights.ndim == 1 else weights[:, self.layers.index(layer)].contiguous()

        with exact(weights.device):
            for tracked, found in self.stored:
                local = {n: _weighted(g, weight(_layer(tracked, n)), select) for n, g in found.items()}
                _add(sums, tracked, local)
            for call in self.kept:
                tracked, (arguments, g) = call.tracked, split_examples(call, self.examples)
                total: Gradients = {}
                if self.in_closed_form(call):  # by a rule, for the parameters of one module
                    a, layer = arguments[0], _layer(tracked, next(iter(tracked.names)))
                    if select is not None:
                        a = a.masked_fill(_column(select, a), 0.0) if a.is_floating_point() else a
                        g = g.masked_fill(_column(select, g), 0.0)
                    g = g.mul(_column(weight(layer), g))
                    parts = _parts(call, g)
                    for at in parts:
                        x, y = (part[at].flatten(0, 1)[None] for part in (a, g))
                        for name, gradient in apply_rule(call, (x,), y).items():
                            if name in total:
                                total[name] += gradient[0]
                            else:
                                total[name] = gradient[0].double() if len(parts) > 1 else gradient[0]
                elif call.on_chip is not None:
                    found = call.on_chip.weighted_sum(tracked.module, arguments[0], g, weight(tracked.name))
                    for name, full in tracked.names.items():
                        sums[full] += found[name]
                    continue
                else:
                    for at, found in self.gradients_of(call, arguments, g):
                        bad = None if select is None else select[at]
                        local = {n: _weighted(x, weight(_layer(tracked, n))[at], bad) for n, x in found.items()}
                        add_up(total, local)
                _add(sums, tracked, total)

    def in_closed_form(self, call: LayerCall) -> bool:
        """Whether a call's norms are taken without its gradients."""
        scaled = call.tracked.rule.scaled_ghost_norm is not None and call.positions == 1
        return call.policy == "ghost" and (self.scale is None or scaled)

    def gradients_of(self, call: LayerCall, arguments: tuple[Any, ...], g: Tensor) -> Iterator[tuple[slice, Gradients]]:
        """Take the gradients of some examples at a time; whoever takes them again gets the same bits."""
        count = at_once(g, size_of(call.tracked))
        with using(self.choices):
            for start in range(0, len(g), count):
                at = slice(start, start + count)
                rows = tuple(x[at] if divided else x for x, divided in zip(arguments, call.divided(), strict=True))
                yield at, apply_rule(call, rows, g[at])

    def count_stored(self, tracked: TrackedLayer | None, found: Gradients) -> None:
        """Count the norms of gradients (B, *shape)."""
        with exact(next(iter(found.values())).device):
            self.count(squares_of(tracked, found, self.scale))

    def count(self, squares: Gradients) -> None:
        """Add squared norms (B,) by layer."""
        add_up(self._squares, squares)


def _parts(call: LayerCall, g: Tensor) -> list[slice]:
    """Split examples, by output gradients (B, K, …), so that few meet in a sum: who else is in it rounds them."""
    width = g.shape[2] if isinstance(call.tracked.module, nn.Conv1d | nn.Conv2d) else g.shape[-1]
    count = max(1, min(TERMS * width // g[:1].numel(), 64))
    return [slice(start, start + count) for start in range(0, len(g), count)]


def _add(sums: Gradients, tracked: TrackedLayer | None, local: Gradients) -> None:
    """Add summed gradients of a unit."""
    if tracked is None:
        for name, gradient in local.items():
            sums[name] += gradient
        return
    if tracked.rule.pull_back is not None:
        local = tracked.rule.pull_back(tracked.module, local)
    for name, full in tracked.names.items():
        sums[full] += local[name]


def _layer(tracked: TrackedLayer | None, name: str) -> str:
    """Name the module that a parameter belongs to.

    It is the unit, except in units that were left in one piece.
    """
    if tracked is not None and tracked.rule is not BY_VMAP and not tracked.tied:
        return tracked.name
    return (name if tracked is None else tracked.names[name]).rpartition(".")[0]


def _by_model_names(tracked: TrackedLayer | None, found: Gradients) -> Gradients:
    """Per-sample gradients of the parameters themselves, pulled back in at least float32."""
    if tracked is None:
        return found
    if tracked.rule.pull_back is not None:
        found = {n: g.to(torch.promote_types(g.dtype, torch.float32)) for n, g in found.items()}
        found = tracked.rule.pull_back(tracked.module, found)
    return {full: found[name] for name, full in tracked.names.items()}


def squares_of(tracked: TrackedLayer | None, found: Gradients, scale: Gradients | None = None) -> Gradients:
    """Squared norms (B,) of every layer's gradients, scaled first if need be, in float64."""
    if tracked is not None and tracked.rule.square_norms is not None:
        own = None if scale is None else {name: scale[full] for name, full in tracked.names.items()}
        return {tracked.name: tracked.rule.square_norms(tracked.module, found, own)}
    return _squares(_by_model_names(tracked, found), scale)


def _squares(found: Gradients, scale: Gradients | None) -> Gradients:
    squares: Gradients = {}
    for name, gradient in found.items():
        layer = name.rpartition(".")[0]
        square = squares_by_example(gradient if scale is None else gradient * scale[name])
        squares[layer] = squares[layer] + square if layer in squares else square
    return squares


def _weighted(gradient: Tensor, weights: Tensor, select: Tensor | None) -> Tensor:
    """Σ weights[i]·gradient[i], (*shape), in float64: in float32 one example may change how others are rounded."""
    rows = by_example(gradient)
    if weights.dtype == torch.float32 and rows.dtype != torch.float64 and (found := kernels(rows)) is not None:
        total = found.weighted_sum(rows, weights)
    else:
        rows = rows if select is None else rows.masked_fill(select[:, None], 0.0)
        weights = weights.double()
        total, done = weights.new_zeros(rows.shape[1]), 0
        for piece in pieces(rows):
            total.addmv_(piece.double().T, weights[done : done + len(piece)])
            done += len(piece)
    order = memory_order(gradient)
    total = total.view([gradient.shape[i] for i in order])
    return total.permute([order.index(i) for i in range(1, gradient.ndim)])


def apply_rule(call: LayerCall, arguments: tuple[Any, ...], g: Tensor) -> Gradients:
    """Return the rule's gradients of the trainable parameters.

    A rule that is pulled back through a function of the parameters returns all that the function needs.
    """
    tracked = call.tracked
    if call.structure is not None:
        assert call.layout is not None
        layer = LayerFunction(tracked.module, call.structure, call.index)
        return layer.gradients(arguments, call.divided(), g, call.layout.looped)[0]
    found = tracked.rule.gradients(tracked.module, arguments[0], g)
    return found if tracked.rule.pull_back is not None else {name: found[name] for name in tracked.names}


def _column(x: Tensor, like: Tensor) -> Tensor:
    """One number per example, or a yes or no, (B, 1, …), to go with a tensor (B, …) and in its type."""
    x = x.view(-1, *(1,) * (like.ndim - 1))
    return x if x.dtype == torch.bool else x.to(like)


def split_examples(call: LayerCall, examples: int) -> tuple[tuple[Any, ...], Tensor]:
    """Split arguments and output gradient by example, in one floating-point type.

    They are (B, K, …) for a rule and, for a layer without one, (B, …) with what the layer takes as a batch. Where
    gradients are not stored as they are formed, the type is that of the sum: the norm must be the norm of what is
    summed.
    """
    g, layout = call.output_gradient, call.layout
    assert g is not None and layout is not None
    if call.structure is not None:
        dtype = next(call.tracked.module.parameters()).dtype
        leaves = tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in call.arguments)
        leaves = tuple(x if d is None else split(x, d, examples) for x, d in zip(leaves, layout.inputs, strict=True))
        return leaves, split(g.to(dtype), layout.output, examples)
    dtype = g.dtype
    if call.policy != "store" and call.on_chip is None:
        dtype = torch.float64 if call.wide else torch.promote_types(dtype, torch.float32)
    arguments = tuple(
        with_views((x.to(dtype) if x.is_floating_point() else x), layout.output, examples) for x in call.arguments
    )
    return arguments, with_views(g.to(dtype), layout.output, examples)
