"""Losses of single examples: class weights that mean the same for one example as for many, and what is refused.

The clip needs g_i, the gradient of example i's own loss, so the loss of a batch has to be the mean of the losses of its
examples. `nn.CrossEntropyLoss(weight=w)` and `nn.NLLLoss(weight=w)` divide by the weights of the batch; for one example
the weight would cancel. Here the loss of example i is

    Σ_j w[y_ij]·ℓ_ij / (number of its targets that are not ignored)

which for one target is w[y_i]·ℓ_i. Contrastive losses, sums over the batch and penalties on the parameters have no such
form and are refused.
"""

import copy
import functools
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from dpopt.grad_sample.nested import map_tensors, tensors_in
from dpopt.grad_sample.snapshot import Snapshot, same

LossFn = Callable[[Any, Tensor], Tensor]
_KINDS: tuple[tuple[Any, Any], ...] = ((nn.CrossEntropyLoss, F.cross_entropy), (nn.NLLLoss, F.nll_loss))


class ExampleWeighted:
    """A loss with class weights, for the targets of one example.

    Args:
        function: `F.cross_entropy` or `F.nll_loss`.
        weight: (classes,).
        options: of the function.
    """

    def __init__(self, function: Callable[..., Tensor], weight: Tensor, options: dict[str, Any]) -> None:
        self.function, self.weight, self.options = function, weight, options

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return Σ w[y]·ℓ over the targets that are not ignored, divided by their number."""
        weight = self.weight.to(outputs)
        if targets.is_floating_point():  # probabilities: torch's mean does not divide by weights
            return self.function(outputs, targets, weight=weight, **self.options)
        total = self.function(outputs, targets, weight=weight, reduction="sum", **self.options)
        count = (targets != self.options.get("ignore_index", -100)).sum()
        return total / count.clamp(min=1)


def per_example_loss(loss_fn: LossFn) -> LossFn:
    """Turn class weights into weights of examples; leave other losses as they are.

    Raises:
        ValueError: for a loss that does not average.
    """
    reduction = loss_fn.keywords.get("reduction") if isinstance(loss_fn, functools.partial) else None
    if isinstance(loss_fn, nn.Module):
        reduction = getattr(loss_fn, "reduction", None)
    if reduction in ("sum", "none"):
        raise ValueError(
            f"the loss has reduction={reduction!r}, so a batch's loss is not the mean of its examples' losses: use "
            "reduction='mean'"
        )
    for kind, function in _KINDS:
        if isinstance(loss_fn, kind) and type(loss_fn).forward is kind.forward and loss_fn.weight is not None:
            options = {"ignore_index": loss_fn.ignore_index}
            if kind is nn.CrossEntropyLoss:
                options["label_smoothing"] = loss_fn.label_smoothing
            return ExampleWeighted(function, loss_fn.weight, options)
        if isinstance(loss_fn, functools.partial) and loss_fn.func is function and not loss_fn.args:
            options = {k: v for k, v in loss_fn.keywords.items() if k not in ("weight", "reduction")}
            if isinstance(weight := loss_fn.keywords.get("weight"), Tensor):
                return ExampleWeighted(function, weight, options)
    return loss_fn


def loss_in_float64(loss_fn: LossFn) -> LossFn:
    """Return a loss whose own tensors are float64."""
    return copy.deepcopy(loss_fn).double() if isinstance(loss_fn, nn.Module) else loss_fn


def check_loss(loss_fn: LossFn, model: nn.Module, outputs: Any, targets: Tensor, views: int) -> None:
    """Refuse a loss that is not the mean of the losses of single examples.

    Args:
        loss_fn: (outputs (K, …), targets (K, …)) → a scalar.
        model: whose parameters the loss must leave alone.
        outputs: of the model on at least two examples and their views, (B·K, …).
        targets: (B, …), moved about here so that classes differ.
        views: K.

    Raises:
        ValueError: in one sentence.
    """
    outputs = map_tensors(lambda x: x.detach().clone().requires_grad_(x.is_floating_point()), outputs)
    before = Snapshot(holder) if (holder := _holder(loss_fn)) is not None else None
    try:
        with torch.enable_grad():
            for number, chosen in enumerate(_draws(loss_fn, outputs, targets, views)):
                singles = _compare(loss_fn, model, outputs, chosen, views)
                written = {} if before is None else before.differences()
                if any(isinstance(value, Tensor | float | tuple) for value in written.values()):
                    raise ValueError(
                        f"the loss keeps what it sees of the data in {next(iter(written))}, past clip and noise: make "
                        "it a function of outputs and targets alone"
                    )
                if number == 0:
                    try:
                        by_vmap = example_losses(loss_fn, outputs, chosen, views).detach()
                    except (RuntimeError, ValueError) as error:
                        raise ValueError(
                            f"the loss cannot be taken for many examples at once ({type(error).__name__} in "
                            "torch.func.vmap): write it without .item(), in-place writes and branches on values"
                        ) from error
                    if not _close(by_vmap, singles, outputs):
                        raise ValueError(_NO_MEAN)
    finally:
        if before is not None:
            before.restore()


def _compare(loss_fn: LossFn, model: nn.Module, outputs: Any, targets: Tensor, views: int) -> Tensor:
    """Compare losses of two examples with the mean of their losses; return the losses (B,)."""
    singles, counts = [], []
    for i in range(len(targets)):
        loss = _loss_of(loss_fn, outputs, targets, [i], views)
        _check_graph(loss, model, outputs)
        singles.append(loss.detach())
        counts.append(_used(loss, outputs, i, views) if _has_positions(targets) else ())
    if not same(_loss_of(loss_fn, outputs, targets, [0], views).detach(), singles[0]):
        raise ValueError(
            "the loss differs between two calls with equal arguments (it draws random numbers, or keeps a state): make "
            "it a function of outputs and targets alone"
        )
    finite = [i for i, loss in enumerate(singles) if bool(loss.isfinite())]
    if not finite:
        raise ValueError(
            "the loss of one example alone is not finite: return the mean over examples of a loss that each example "
            "has without the others"
        )
    pairs = list(itertools.combinations(finite, 2))
    # Among several targets some may be ignored: a mean over all of them weights examples by how many they have.
    pairs = [pair for pair in pairs if counts[pair[0]] == counts[pair[1]]]
    for group in [*pairs[:6], (finite[0], finite[0])]:
        together = _loss_of(loss_fn, outputs, targets, list(group), views).detach()
        if not _close(together, torch.stack([singles[i] for i in group]).mean(), outputs):
            raise ValueError(_NO_MEAN)
    return torch.stack(singles)


def example_losses(loss_fn: LossFn, outputs: Any, targets: Tensor, views: int) -> Tensor:
    """Return the losses (B,) of all examples in one call, each the mean over its views.

    Args:
        loss_fn: (outputs (K, …), targets (K, …)) → a scalar.
        outputs: of the model for B·K views.
        targets: (B, …).
        views: K.
    """
    count = len(targets) * views
    rows = [x.unflatten(0, (-1, views)) for x in tensors_in(outputs) if x.ndim > 0 and len(x) == count]

    def one(target: Tensor, *parts: Tensor) -> Tensor:
        left = iter(parts)
        own = map_tensors(lambda x: next(left) if x.ndim > 0 and len(x) == count else x, outputs)
        return loss_fn(own, target).reshape(())

    return vmap(one)(targets[:, None].expand(len(targets), views, *targets.shape[1:]), *rows)


_NO_MEAN = (
    "the loss of two examples is not the mean of their losses (class weights inside a function, a contrastive loss, "
    "statistics of the batch), so no example has its own loss: pass nn.CrossEntropyLoss(weight=…), which weights "
    "each example here, or return the mean over examples"
)


def _holder(loss_fn: Any) -> Any:
    """Find the object whose attributes a loss could write."""
    if isinstance(loss_fn, functools.partial):
        return _holder(loss_fn.func)
    holder = getattr(loss_fn, "__self__", loss_fn)
    return holder if hasattr(holder, "__dict__") and not isinstance(holder, types.FunctionType) else None


def _has_positions(targets: Tensor) -> bool:
    return targets.ndim > 1 and not targets.is_floating_point()


def _draws(loss_fn: LossFn, outputs: Any, targets: Tensor, views: int) -> list[Tensor]:
    """Targets to compare with: the given ones, others' ones, and for classes one that differs."""
    candidates = [targets.roll(1, 0), targets.flip(0)]
    if not targets.is_floating_point() and targets.dtype != torch.bool:
        if targets.ndim > 1:  # the same classes at other positions: as many are ignored
            candidates.append(torch.cat([targets[:1], targets[:1].roll(1, 1), targets[2:]]))
        other = torch.where(targets[:1] > 0, targets[:1] - 1, torch.where(targets[:1] == 0, 1, targets[:1]))
        candidates.append(torch.cat([targets[:1], other.to(targets), targets[2:]]))
    accepted = [targets]
    for candidate in candidates:
        try:
            _loss_of(loss_fn, outputs, candidate, list(range(len(candidate))), views)
        except Exception:  # a class that does not exist
            continue
        accepted.append(candidate)
    return accepted


def _loss_of(loss_fn: LossFn, outputs: Any, targets: Tensor, group: list[int], views: int) -> Tensor:
    rows = torch.tensor([i * views + k for i in group for k in range(views)], device=targets.device)
    total = len(targets) * views
    chosen = map_tensors(lambda x: x[rows] if x.ndim > 0 and len(x) == total else x, outputs)
    wanted = targets[group].repeat_interleave(views, 0)
    try:
        loss = loss_fn(chosen, wanted)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        shapes = [tuple(x.shape) for x in tensors_in(chosen)]
        # Not the error's text, which may repeat a target.
        hint = "; class numbers run from 0 to below the number of outputs" if isinstance(error, IndexError) else ""
        raise ValueError(
            f"the loss raised {type(error).__name__} on outputs of shape {', '.join(map(str, shapes))} and targets of "
            f"shape {tuple(wanted.shape)} and type {wanted.dtype}: make loss_fn(outputs, targets) take both{hint}"
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss is {shape} where a scalar is needed: return the mean over examples")
    return loss.reshape(())


def _check_graph(loss: Tensor, model: nn.Module, outputs: Any) -> None:
    """Refuse a loss that depends on tensors with a gradient other than the outputs."""
    allowed = tensors_in(outputs)
    names = {id(p): name for name, p in model.named_parameters()}
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is x for x in allowed):
            which = f"the parameter {names[id(variable)]}" if id(variable) in names else "trainable tensors"
            raise ValueError(
                f"the loss reads {which} besides the model's outputs, whose gradient no clip would bound: for a "
                "penalty use the optimizer's weight_decay, and move trainable parts of a loss into the model"
            )
        todo += [parent for parent, _ in node.next_functions]


def _used(loss: Tensor, outputs: Any, example: int, views: int) -> tuple[int, ...]:
    """How many outputs of an example its loss depends on: fewer where targets are ignored."""
    leaves = [x for x in tensors_in(outputs) if x.requires_grad]
    if not loss.requires_grad:
        return (0,)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return tuple(0 if g is None else int((g[example * views : (example + 1) * views] != 0).sum()) for g in gradients)


def _close(found: Tensor, expected: Tensor, outputs: Any) -> bool:
    """Tell whether losses agree up to rounding; where one is not finite, so must the other be."""
    dtypes = [found.dtype, *(x.dtype for x in tensors_in(outputs) if x.is_floating_point())]
    tolerance = max({torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 0.05) for dtype in dtypes)
    if not bool((found.isfinite() == expected.isfinite()).all()):
        return False
    found, expected = found[found.isfinite()].double(), expected[expected.isfinite()].double()
    return bool(((found - expected).abs() <= tolerance * (1e-3 + expected.abs())).all())
