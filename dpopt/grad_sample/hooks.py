"""Collect per-sample gradients layer by layer while one backward pass runs."""

import itertools
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten

from dpopt.grad_sample.choices import Choices, using
from dpopt.grad_sample.fallback import is_plain
from dpopt.grad_sample.fit import fit_layout
from dpopt.grad_sample.layout import RowProbe, UnsureLayoutError
from dpopt.grad_sample.modules import TrackedLayer, UnsupportedLayerError
from dpopt.grad_sample.nested import map_tensors, output_tensors
from dpopt.grad_sample.norms import Gradients, add_up, exact
from dpopt.grad_sample.per_sample import (
    LayerCall,
    PerSampleGradients,
    apply_rule,
    split_examples,
    squares_of,
)
from dpopt.grad_sample.rules import BY_VMAP
from dpopt.grad_sample.text_rules import shared_ghost_norm


class _Attach(torch.autograd.Function):
    """Ties an output that depends on nothing with a gradient to the graph, without a copy."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, root: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, None]:
        return None, None


class BackwardCollector:
    """Collects what one backward pass returns, layer by layer.

    Args:
        per_sample: where it goes.
        choices: what is fastest, for rules that can do it in several ways. Hooks get it from here: with a GPU, autograd
            calls them in another thread.

    Attributes:
        probe: finds the layouts of calls that have none.
        rehearsing: whether the pass is one under scaled losses, whose gradients are only kept for comparison.
    """

    def __init__(self, per_sample: PerSampleGradients, choices: Choices | None = None) -> None:
        self.per_sample, self.choices = per_sample, choices
        per_sample.choices = choices
        self.probe: RowProbe | None = None
        self.rehearsing = False
        self._partial: dict[Any, tuple[TrackedLayer | None, Gradients]] = {}
        self._shared: dict[str, list[tuple[LayerCall, Tensor, Tensor]]] = {}  # by layer

    @torch.no_grad()
    def arrived(self, call: LayerCall, g: Tensor) -> None:
        """Process the gradient with respect to the output of a layer."""
        tracked, examples = call.tracked, self.per_sample.examples
        if self.rehearsing:
            call.scaled.append(g)
            return
        if call.layout is not None and not call.layout.sure and bool((g != 0).any()):
            raise UnsureLayoutError
        if [x._version for x in call.arguments if isinstance(x, Tensor)] != call.versions:
            raise UnsupportedLayerError(tracked.name, "has an input that is changed in place after it was read")
        call.wide = self.per_sample.scale is not None and tracked.rule.pull_back is not None
        on_chip = tracked.rule.on_chip if call.policy == "recompute" and self.per_sample.scale is None else None
        call.on_chip = on_chip if on_chip is not None and on_chip.takes(tracked.module, g) else None
        call.output_gradient = g
        with using(self.choices), torch.autocast(g.device.type, enabled=False):
            if call.layout is None:
                if self.probe is None:
                    raise UnsureLayoutError
                call.layout = fit_layout(call, self.probe)
                call.output, call.scaled = None, []
            arguments, g = split_examples(call, examples)
            if call.policy == "store":
                self._store(call, apply_rule(call, arguments, g))
                call.arguments, call.output_gradient = (), None
                return
            self.per_sample.keep(call)
            if call.shared:
                self._shared.setdefault(call.shared, []).append((call, arguments[0], g))
            else:
                self.per_sample.count(_squares_of_call(self.per_sample, call, arguments, g))

    def _store(self, call: LayerCall, found: Gradients) -> None:
        tracked = call.tracked
        if call.alone:
            self.per_sample.store(tracked, found)
        elif tracked.tied:  # by the model's names, in which tied parameters are one
            for name, gradient in found.items():
                self._add(tracked.names[name], None, {tracked.names[name]: gradient})
        else:
            self._add(tracked, tracked, found)

    def _add(self, key: Any, tracked: TrackedLayer | None, found: Gradients) -> None:
        add_up(self._partial.setdefault(key, (tracked, {}))[1], found)

    def finish(self) -> None:
        """Store what was accumulated once the backward pass is done."""
        for tracked, total in self._partial.values():
            self.per_sample.store(tracked, total)
        _count_shared(self.per_sample, self._shared)


@torch.no_grad()
def count_norms(per_sample: PerSampleGradients, choices: Choices | None) -> None:
    """Count the norms of gradients that were taken without them: of what they hold, which is what will be summed."""
    shared: dict[str, list[tuple[LayerCall, Tensor, Tensor]]] = {}
    per_sample.choices = choices
    with using(choices):
        for tracked, found in per_sample.stored:
            per_sample.count_stored(tracked, found)
        for call in per_sample.kept:
            arguments, g = split_examples(call, per_sample.examples)
            if call.shared:
                shared.setdefault(call.shared, []).append((call, arguments[0], g))
            else:
                per_sample.count(_squares_of_call(per_sample, call, arguments, g))
    _count_shared(per_sample, shared)


def _count_shared(per_sample: PerSampleGradients, shared: dict[str, list[tuple[LayerCall, Tensor, Tensor]]]) -> None:
    for layer, calls in shared.items():
        reads = [(call.tracked.module, a, g) for call, a, g in calls]
        with exact(reads[0][2].device):
            per_sample.count({layer: shared_ghost_norm(reads)})


def _squares_of_call(
    per_sample: PerSampleGradients, call: LayerCall, arguments: tuple[Any, ...], g: Tensor
) -> Gradients:
    """Squared norms (B,) of a call's (scaled) gradients by layer, which are not kept."""
    tracked, scale = call.tracked, per_sample.scale
    with exact(g.device):
        if per_sample.in_closed_form(call):
            return {tracked.name: _closed_form(call, arguments[0], g, scale)}
        if call.on_chip is not None:
            return {tracked.name: call.on_chip.square_norms(tracked.module, arguments[0], g)}
        parts = [squares_of(tracked, found, scale) for _, found in per_sample.gradients_of(call, arguments, g)]
        return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}


def _closed_form(call: LayerCall, a: Any, g: Tensor, scale: Gradients | None) -> Tensor:
    """Squared norms without the gradients."""
    tracked, rule = call.tracked, call.tracked.rule
    if scale is None:
        assert rule.ghost_norm is not None
        return rule.ghost_norm(tracked.module, a, g)
    assert rule.scaled_ghost_norm is not None
    return rule.scaled_ghost_norm(tracked.module, a, g, {name: scale[full] for name, full in tracked.names.items()})


class LayerHooks:
    """Records the calls of layers during one forward pass, and hands their gradients on in the backward pass.

    Args:
        layers: the layers.
        collector: gets the gradients.
        shape: number of examples and of views per example.
        expanded: layers whose output is the same for all views, and gets a copy for each: `lead`, where its first
            dimension is 1, or `new`, in a dimension before all others.
        root: a scalar that everything is made to depend on.
        keep: whether to keep outputs of layers without a rule, for `fit_layout`.

    Attributes:
        calls: so far.
    """

    def __init__(
        self,
        layers: Collection[TrackedLayer],
        collector: BackwardCollector,
        shape: tuple[int, int],
        expanded: dict[str, str],
        root: Tensor,
        keep: bool,
    ) -> None:
        self.layers, self.collector, self.expanded, self.root, self.keep = layers, collector, expanded, root, keep
        self.examples, self.views = shape[0], shape[0] * shape[1]
        self.calls: list[LayerCall] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "LayerHooks":
        for tracked in self.layers:
            self._handles.append(tracked.module.register_forward_hook(self._watch(tracked), with_kwargs=True))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, tracked: TrackedLayer) -> Callable[..., Any]:
        def hook(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
            if tracked.rule is not BY_VMAP:
                return self._ruled(tracked, arguments, keywords, output)
            leaves, structure = tree_flatten((arguments, keywords))
            for x in leaves:
                if not is_plain(x):
                    raise UnsupportedLayerError(tracked.name, f"takes an argument of type {type(x).__name__}")
            several, numbers = len(output_tensors(output)) > 1, itertools.count()
            if not output_tensors(output):
                raise UnsupportedLayerError(tracked.name, f"returns no tensor but a {type(output).__name__}")

            def handed(result: Tensor) -> Tensor:
                if not result.is_floating_point():
                    return result
                # One output may be computed from another: a view gets only what comes from behind the layer.
                result = result.view_as(result) if several else result
                return self._attach(self._call(tracked, tuple(leaves), result, structure, next(numbers)), result)

            return map_tensors(handed, output)

        return hook

    def _ruled(self, tracked: TrackedLayer, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        given = [x for x in (*arguments, *keywords.values()) if x is not None]
        if (
            tracked.rule.reads is not None
            and (read := tracked.rule.reads(tracked.module, arguments, keywords)) is not None
        ):
            given = [read]
        if len(given) != 1 or not isinstance(given[0], Tensor) or not isinstance(output, Tensor):
            raise UnsupportedLayerError(tracked.name, "is called with more than one tensor", "whole")
        x = given[0]
        if self.examples > 1 and (how := self.expanded.get(tracked.name)):
            if how == "lead" and (output.ndim == 0 or len(output) != 1 or len(x) != 1):
                raise UnsupportedLayerError(tracked.name, "has an output that all examples share", "expand")
            x, output = (_copies(t, how, self.views) for t in (x, output))
            output = output.clone()
        return self._attach(self._call(tracked, (x,), output), output)

    def _call(
        self,
        tracked: TrackedLayer,
        arguments: tuple[Any, ...],
        output: Tensor,
        structure: TreeSpec | None = None,
        index: int = 0,
    ) -> LayerCall:
        weight = next(iter(tracked.module.parameters()))
        width = weight.shape[0] if weight.ndim > 1 else max(1, weight.numel())
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        # Detached, which shares the version: a record that held the graph would be held by it, through the hook.
        arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
        positions = max(1, output.numel() // (self.examples * width))
        kept = sum(x.numel() for x in [output, *tensors]) // self.examples
        call = LayerCall(tracked, arguments, [x._version for x in tensors], positions, kept)
        call.structure, call.index, call.shape, call.dtype = structure, index, output.shape, output.dtype
        if self.keep and structure is not None:
            call.output = output.detach().clone()
        self.calls.append(call)
        return call

    def _attach(self, call: LayerCall, output: Tensor) -> Tensor:
        attached: Tensor = output if output.requires_grad else _Attach.apply(output, self.root)
        attached.register_hook(lambda g: self.collector.arrived(call, g))
        return attached


def _copies(x: Tensor, how: str, views: int) -> Tensor:
    x = x if how == "lead" else x[None]
    return x.expand(views, *x.shape[1:])
