"""Collect per-sample gradients layer by layer while one backward pass runs."""

from typing import Any

import torch
from torch import Tensor

from dpopt.grad_sample.modules import TrackedLayer, UnsupportedLayerError, size_of
from dpopt.grad_sample.norms import Gradients, at_once, exact
from dpopt.grad_sample.per_sample import LayerCall, PerSampleGradients, apply_rule, split_examples, squares_of


class BackwardCollector:
    """Collects what one backward pass returns, layer by layer."""

    def __init__(self, per_sample: PerSampleGradients) -> None:
        self.per_sample = per_sample
        self._partial: dict[Any, tuple[TrackedLayer | None, Gradients]] = {}

    @torch.no_grad()
    def arrived(self, call: LayerCall, g: Tensor) -> None:
        """Process the gradient with respect to the output of a layer."""
        tracked, examples = call.tracked, self.per_sample.examples
        if [x._version for x in call.arguments if isinstance(x, Tensor)] != call.versions:
            raise ValueError(
                f"the input of layer '{tracked.name}' is changed in place after the layer has read it: "
                "use an operation that is not in place there, or engine=vmap"
            )
        call.output_gradient = g
        with torch.autocast(g.device.type, enabled=False):
            arguments, g = split_examples(call, examples)
            if call.policy == "store":
                self._store(call, apply_rule(tracked, arguments, g))
                call.arguments, call.output_gradient = (), None
                return
            with exact(g.device):
                if (closed := self._closed_form(call, arguments[0], g)) is not None:
                    squares = {tracked.name: closed}
                else:
                    count = at_once(g, size_of(tracked))
                    parts = [
                        squares_of(
                            tracked,
                            apply_rule(tracked, _rows(arguments, i, count), g[i : i + count]),
                            self.per_sample.scale,
                        )
                        for i in range(0, examples, count)
                    ]
                    squares = {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}
            self.per_sample.keep(call, squares)

    def _closed_form(self, call: LayerCall, a: Any, g: Tensor) -> Tensor | None:
        """Squared norms without the gradients, where the layer's rule has them."""
        tracked, scale = call.tracked, self.per_sample.scale
        if call.policy != "ghost":
            return None
        if scale is None:
            assert tracked.rule.ghost_norm is not None
            return tracked.rule.ghost_norm(tracked.module, a, g)
        if tracked.rule.scaled_ghost_norm is None or call.positions > 1:
            return None
        return tracked.rule.scaled_ghost_norm(
            tracked.module, a, g, {name: scale[full] for name, full in tracked.names.items()}
        )

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
        _, total = self._partial.setdefault(key, (tracked, {}))
        for name, gradient in found.items():
            total[name] = total[name] + gradient if name in total else gradient

    def finish(self) -> None:
        """Store what was accumulated once the backward pass is done."""
        for tracked, total in self._partial.values():
            self.per_sample.store(tracked, total)


def _rows(arguments: tuple[Any, ...], start: int, count: int) -> tuple[Any, ...]:
    return tuple(x[start : start + count] if isinstance(x, Tensor) else x for x in arguments)


def layer_call(tracked: TrackedLayer, arguments: tuple[Any, ...], output: Any, examples: int) -> LayerCall:
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
        raise UnsupportedLayerError(tracked.name)
    weight = next(iter(tracked.module.parameters()))
    width = weight.shape[0] if weight.ndim > 1 else max(1, weight.numel())
    # Detached, which shares the version: a record that held the graph would be held by it, through the hook.
    arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    positions, kept = output.numel() // (examples * width), sum(x.numel() for x in [output, *tensors]) // examples
    return LayerCall(tracked, arguments, [x._version for x in tensors], max(1, positions), kept)
