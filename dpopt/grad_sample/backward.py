"""The backward pass of a micro-batch, and those under scaled losses that verify where the examples lie."""

import torch
from torch import Tensor

from dpopt.grad_sample.hooks import BackwardCollector
from dpopt.grad_sample.layout import UnsureLayoutError
from dpopt.grad_sample.modules import UnsupportedLayerError
from dpopt.grad_sample.norms import Gradients


def backpropagate(
    collector: BackwardCollector, losses: Tensor, root: Tensor, copies: Gradients, values: Gradients, unsure: set[str]
) -> None:
    """Run the backward pass, after one or more under scaled losses if the collector has a probe.

    Args:
        collector: takes gradients of layers.
        losses: (B,).
        root: a scalar that all layers depend on.
        copies: of parameters next to submodules, one per view.
        values: the parameters.
        unsure: names of copies without a gradient that could be checked; a probe adds to them.

    Raises:
        UnsupportedLayerError: for a copy that acts on another example.
        UnsureLayoutError: for a gradient that has to be checked, and cannot be without a probe.
    """
    roots, probe, scaled = [root, *copies.values()], collector.probe, []
    collector.rehearsing = True
    for factor in probe.factors if probe is not None else ():
        with torch.enable_grad():
            loss = (losses * factor.to(losses.dtype)).sum()
            scaled.append(_gradients(loss, roots, keep=True))
    collector.rehearsing = False
    with torch.enable_grad():
        found = _gradients(losses.sum(), roots, keep=False)
    examples = collector.per_sample.examples
    with torch.no_grad():
        collector.finish()
        for i, (name, gradient) in enumerate(zip(copies, found, strict=True)):
            if probe is not None:
                if not probe.belongs(gradient, [one[i] for one in scaled], 0):
                    raise UnsupportedLayerError(name, "acts on more than one example")
                unsure.update(() if probe.sure else (name,))
            elif name in unsure and bool((gradient != 0).any()):
                raise UnsureLayoutError
            gradient = gradient.unflatten(0, (examples, -1)).sum(1)
            collector.per_sample.store(None, {name: gradient.view(examples, *values[name].shape)})


def _gradients(loss: Tensor, roots: list[Tensor], keep: bool) -> list[Tensor]:
    """Gradients of all roots but the first; zeros where there are none."""
    found = torch.autograd.grad(loss, roots, allow_unused=True, retain_graph=keep)
    pairs = zip(found[1:], roots[1:], strict=True)
    return [torch.zeros_like(root) if gradient is None else gradient for gradient, root in pairs]
