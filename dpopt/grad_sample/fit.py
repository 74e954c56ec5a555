"""Find the layout of one call of a layer from its gradients under scaled losses, and its arguments' from its output."""

from dataclasses import replace

import torch
from torch import Tensor

from dpopt.grad_sample.fallback import LayerFunction
from dpopt.grad_sample.layout import (
    Layout,
    RowProbe,
    argument_dims,
    close,
    possible_dims,
    rounding_of_outputs,
    split,
)
from dpopt.grad_sample.modules import UnsupportedLayerError
from dpopt.grad_sample.per_sample import LayerCall

_TRIED = 4  # examples on which ways to split the arguments are tried


def fit_layout(call: LayerCall, probe: RowProbe) -> Layout:
    """Find where the examples lie in a call.

    Raises:
        UnsupportedLayerError: when rows of the output belong to no single example, or arguments cannot be split.
    """
    g = call.output_gradient
    assert g is not None
    if g.ndim == 0:
        raise UnsupportedLayerError(call.tracked.name, "returns a number for all examples")
    if call.structure is None:
        return replace(Layout(_ruled_dim(call, g, probe)), sure=probe.sure)
    if probe.examples == 1:
        return _fit_arguments(call, g, 0, probe)
    for dim in possible_dims(g, probe.views, g.ndim):
        if probe.belongs(g, call.scaled, dim):
            return replace(_fit_arguments(call, g, dim, probe), sure=probe.sure)
    raise UnsupportedLayerError(call.tracked.name, "has an output whose rows do not each belong to one example")


def _ruled_dim(call: LayerCall, g: Tensor, probe: RowProbe) -> int:
    x, module = call.arguments[0], call.tracked.module
    features = len(getattr(module, "normalized_shape", (0,)))
    last = g.ndim - 1 - features if call.tracked.rule.positionwise else 0
    dims = [0] if probe.examples == 1 else possible_dims(g, probe.views, last)
    for dim in dims:
        if x.ndim > dim and x.shape[dim] == g.shape[dim] and probe.belongs(g, call.scaled, dim):
            return dim
    raise UnsupportedLayerError(call.tracked.name, "has rows that do not each belong to one example", "expand")


def _fit_arguments(call: LayerCall, g: Tensor, output: int, probe: RowProbe) -> Layout:
    """Split the arguments so that the layer does with each example what it did with all of them."""
    reasons: list[Exception] = []

    def fits(layout: Layout) -> bool:
        try:
            return _does_the_same(call, g, layout, probe)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a shape that does not fit, an operation that vmap does not know
            reasons.append(error)
            return False

    if call.hint is not None and call.hint.output == output and fits(call.hint):
        return call.hint
    ways = list(argument_dims(call.arguments, probe.views, output))
    if probe.examples == 1:
        ways = [(None,) * len(call.arguments)]
    for looped in (False, True):
        found = [layout for dims in ways if fits(layout := Layout(output, dims, looped))]
        if len(found) > 1:
            raise UnsupportedLayerError(call.tracked.name, "has arguments that could be split by example in two ways")
        if found:
            return found[0]
    why = f" ({_first_line(reasons[0])})" if reasons else ""
    raise UnsupportedLayerError(call.tracked.name, f"does not take its examples one by one{why}")


def _does_the_same(call: LayerCall, g: Tensor, layout: Layout, probe: RowProbe) -> bool:
    """Whether the layer, example by example, gives the rows of its output; some examples stand for all."""
    assert call.output is not None and call.structure is not None
    examples = probe.examples
    index = sorted({*range(min(_TRIED // 2, examples)), *range(max(0, examples - _TRIED // 2), examples)})
    dtype = next(call.tracked.module.parameters()).dtype
    leaves = tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in call.arguments)
    leaves = tuple(x if d is None else split(x, d, examples)[index] for x, d in zip(leaves, layout.inputs, strict=True))
    divided = tuple(dim is not None for dim in layout.inputs)
    wanted = split(call.output, layout.output, examples)[index]
    cotangent = split(g.to(dtype), layout.output, examples)[index]
    layer = LayerFunction(call.tracked.module, call.structure, call.index)
    outputs = layer.gradients(leaves, divided, cotangent, layout.looped)[1]
    return close(outputs, wanted, rounding_of_outputs(wanted.dtype, probe.coarse))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
