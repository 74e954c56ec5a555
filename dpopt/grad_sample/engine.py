"""Per-example gradients of a micro-batch, as their norms and a way to sum them under weights.

    per_sample = sampler(inputs, targets)          # (B, K, …), (B, …) → norms (B,), losses (B,)
    per_sample.add_weighted_sum(sums, weights)        # sums[name] += Σ weights[i]·g_i[name]

g_i is the gradient of example i's mean loss over its K views. The model runs forward as it is, on all views at once,
with detached parameters: the backward yields gradients of activations only, and an aggregated weight gradient, which
nobody wants, is never computed. Hooks on the layers, there for the time of one forward, see what goes in and what comes
back, and the rule of the layer (`dpopt.grad_sample.rules`) makes of it one of three things:

    store      the per-example gradients, summed when the weights are known
    recompute  their norms only, a few examples at a time; the sum is the ordinary gradient of scaled output gradients
    ghost       their norms from inner products of positions, never the gradients; then as recompute

A parameter that a module holds beside its submodules (a class token, a position embedding, a skip gain) enters the
forward as one copy per view. Layers without a rule go through vmap alone, and `policy="vmap"` does so with the model.
Before the first batch is taken, `dpopt.grad_sample.validate` compares two examples with ordinary backward passes.
"""

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from dpopt.grad_sample.hooks import BackwardCollector, layer_call
from dpopt.grad_sample.losses import per_example_loss
from dpopt.grad_sample.modules import TrackedLayer, find_layers, size_of
from dpopt.grad_sample.norms import Gradients
from dpopt.grad_sample.per_sample import LayerCall, PerSampleGradients
from dpopt.grad_sample.rules import BY_VMAP
from dpopt.grad_sample.signature import Validated

LossFn = Callable[[Tensor, Tensor], Tensor]
POLICIES = ("auto", "store", "recompute", "ghost", "vmap")
# Operations that a device does in the time of moving one byte; storing saves 2 operations per position and weight, and
# costs the reading of 4 bytes.
_BALANCE = {"cpu": 7, "cuda": 166}
_SMALL = 4096  # values of a gradient that is not worth recomputing


class _Attach(torch.autograd.Function):
    """Ties an output that depends on nothing with a gradient to the graph, without a copy."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, root: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, None]:
        return None, None


class GradSampler:
    """Takes per-example gradients by per-layer rules.

    Args:
        model: checked by `dpopt.grad_sample.model_check.check_model`.
        loss_fn: (outputs (K, …), targets (K, …)) → the mean loss, a scalar.
        policy: `store`, `recompute` or `ghost` wherever a layer can; `vmap`, no rules; `auto` chooses layer by layer.
        memory: bytes that stored gradients may take under `auto`, if recomputing takes less; None for no limit.
        precision: `bf16` for autocast in the forward.
        compiled: compile forward, backward and rules as one graph, anew for every shape of a batch.

    Attributes:
        validated: whether the gradients of two examples have been compared with autograd's.
        validations: the states of the model and shapes of inputs that have passed `dpopt.grad_sample.validate`.
        fallbacks: names of layers that go through vmap, for want of a rule.
        policies: what is done with the gradients of every layer, once a batch has been taken.

    Raises:
        ValueError: for an unknown policy.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        policy: str = "auto",
        memory: int | None = None,
        precision: str = "fp32",
        compiled: bool = False,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"engine={policy} must be one of {', '.join(POLICIES)}")
        self.model, self.loss_fn, self.policy, self.memory = model, per_example_loss(loss_fn), policy, memory
        self.precision, self.compiled = precision, compiled
        self.validated, self.validations = False, Validated()
        self.policies: dict[str, str] = {}
        self._graphs: dict[Any, Callable[..., PerSampleGradients]] = {}
        self._trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self._whole: set[str] = set()
        self._split_up()

    def _split_up(self) -> None:
        self.tracked_layers, self.bare = ([], {}) if self.policy == "vmap" else find_layers(self.model, self._whole)
        everything = [u.name or "the whole model" for u in self.tracked_layers if u.rule is BY_VMAP]
        self.fallbacks = ["the whole model"] if self.policy == "vmap" else everything

    def __call__(self, inputs: Tensor, targets: Tensor, scale: Gradients | None = None) -> PerSampleGradients:
        """Per-example gradients of (B, K, …) inputs and (B, …) targets.

        With a scale, norms are those of scaled gradients (`PerSampleGradients`), and nothing is compiled.

        Raises:
            ValueError: for a layer whose gradients cannot be told apart by example.
        """
        values = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        if values.keys() != self._trained:
            changed = ", ".join(sorted(values.keys() ^ self._trained)[:3])
            raise ValueError(f"{changed} was frozen, unfrozen or added since: make a new PrivateGradient for the model")
        if not self.compiled or scale is not None:
            return self.sample_at(values, inputs, targets, scale)
        shapes = (inputs.shape, inputs.dtype, targets.shape, self.model.training)
        if shapes not in self._graphs:
            self._graphs[shapes] = self._compile(values, inputs, targets)
        return self._graphs[shapes](values, inputs, targets)

    def _compile(self, values: Gradients, inputs: Tensor, targets: Tensor) -> Callable[..., PerSampleGradients]:
        """`sample_at`, traced once through its backward and hooks, and compiled."""
        traced: list[Any] = []

        def flat(*tensors: Tensor) -> tuple[Any, ...]:
            per_sample = self.sample_at(dict(zip(values, tensors, strict=False)), tensors[-2], tensors[-1])
            leaves, structure = tree_flatten(per_sample.tensors())
            traced[:] = per_sample.form(), structure
            return tuple(leaves)

        example: list[Any] = [*values.values(), inputs, targets]
        compiled = torch._inductor.compile(make_fx(flat)(*example), example)  # what has been traced needs no Dynamo
        form, structure = traced

        def run(values: Gradients, inputs: Tensor, targets: Tensor) -> PerSampleGradients:
            return form.filled(tree_unflatten(list(compiled(*values.values(), inputs, targets)), structure))

        return run

    def gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Gradients, Tensor]:
        """The per-example gradients themselves, (B, *shape) by parameter name, and the losses (B,)."""
        values = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        per_sample = self.sample_at(values, inputs, targets, policy="store")
        return per_sample.gradients(), per_sample.losses

    def losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of each example over its views, (B,), without gradients."""

        def loss(views: Tensor, target: Tensor) -> Tensor:
            return self.loss_fn(self.forward({}, views), target.expand(len(views), *target.shape))

        with self.autocast():
            found: Tensor = vmap(loss)(inputs, targets)
        return found

    def sample_at(
        self,
        values: Gradients,
        inputs: Tensor,
        targets: Tensor,
        scale: Gradients | None = None,
        policy: str | None = None,
    ) -> PerSampleGradients:
        """Take them at parameters that are not the model's own or by another policy, and never compiled."""
        examples, views = inputs.shape[:2]
        per_sample = PerSampleGradients(examples, scale)
        if self.policy == "vmap":
            gradients, losses = per_example_gradients(self.model, self.loss_fn, inputs, targets, self.autocast, values)
            per_sample.store(None, gradients)
            return per_sample.finish(losses)
        calls: list[LayerCall] = []
        collector = BackwardCollector(per_sample)
        root = torch.zeros((), device=inputs.device, requires_grad=True)
        copies = {
            name: values[name].view(shape).expand(examples * views, *shape[1:]).requires_grad_()
            for name, shape in self.bare.items()
        }

        def watch(tracked: TrackedLayer) -> Callable[..., Any]:
            def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
                call = layer_call(tracked, arguments, output, examples)
                calls.append(call)
                attached = output if output.requires_grad else _Attach.apply(output, root)
                attached.register_hook(lambda g: collector.arrived(call, g))
                return attached

            return hook

        hooks = [tracked.module.register_forward_hook(watch(tracked)) for tracked in self.tracked_layers]
        try:
            with torch.enable_grad(), self.autocast():
                outputs = self.forward({**values, **copies}, inputs.flatten(0, 1))
                outputs = tree_map(lambda x: x.unflatten(0, (examples, views)), outputs)
                targets = targets[:, None].expand(examples, views, *targets.shape[1:])
                losses = vmap(self.loss_fn)(outputs, targets)
        finally:
            for hook in hooks:
                hook.remove()
        self._choose(calls, examples, inputs.device.type, policy or self.policy)
        with torch.enable_grad():
            found = torch.autograd.grad(losses.sum(), [root, *copies.values()], allow_unused=True)
        with torch.no_grad():
            collector.finish()
            for (name, copy), gradient in zip(copies.items(), found[1:], strict=True):
                gradient = torch.zeros_like(copy) if gradient is None else gradient
                gradient = gradient.unflatten(0, (examples, views)).sum(1)
                per_sample.store(None, {name: gradient.view(examples, *values[name].shape)})
            return per_sample.finish(losses.detach())

    def forward(self, values: Gradients, inputs: Tensor) -> Any:
        """The model's outputs for views (N, …) with these parameters; what it does to its buffers is forgotten."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return functional_call(self.model, {**buffers, **values}, (inputs,))

    def keep_whole(self, name: str) -> None:
        """Leave the module that contains a layer or parameter in one piece, to go through vmap."""
        parent = name.rpartition(".")[0]
        if not parent:
            self.policy = "vmap"
        self._whole.add(parent)
        self._split_up()

    def twin(self, model: nn.Module, loss_fn: LossFn, precision: str = "fp32") -> "GradSampler":
        """Make a sampler of the model or a copy of it, with the same choices."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, dict | set):
                setattr(other, name, copy.copy(value))
        other.model, other.loss_fn, other.precision = model, loss_fn, precision
        other._graphs = {}
        other._split_up()
        other.bare = {name: self.bare.get(name, shape) for name, shape in other.bare.items()}
        return other

    def adopt(self, other: "GradSampler") -> None:
        """Take over what a twin found: what goes through vmap, and shapes of copies."""
        self.policy, self._whole = other.policy, set(other._whole)
        self._split_up()
        self.bare = dict(other.bare)
        self._graphs.clear()

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of forward passes."""
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(next(self.model.parameters()).device.type, dtype=torch.bfloat16)

    def _choose(self, calls: list[LayerCall], examples: int, device: str, policy: str) -> None:
        """Decide for every call of a layer what is done with its gradients."""
        times = Counter(call.tracked for call in calls)
        for call in calls:
            tracked, size = call.tracked, size_of(call.tracked)
            call.alone = times[tracked] == 1 and not tracked.tied
            ghost = tracked.rule.ghost_norm is not None and len(tracked.names) == sum(
                1 for _ in tracked.module.parameters()
            )
            if not call.alone:
                call.policy = "store"  # several calls make one gradient
            elif policy == "ghost":
                call.policy = "ghost" if ghost else "recompute" if size > _SMALL else "store"
            elif policy != "auto":
                call.policy = policy
            elif ghost and 8 * call.positions * _width(tracked) < size:
                call.policy = "ghost"
            elif size > _SMALL and call.positions < 2 * _BALANCE.get(device, 7):
                call.policy = "recompute"
            else:
                call.policy = "store"
        if policy == "auto" and self.memory is not None:
            stored = [call for call in calls if call.policy == "store"]
            left = self.memory - sum(4 * examples * size_of(call.tracked) for call in stored)
            # Where there are few positions, recomputing costs least per byte saved.
            for call in sorted(stored, key=lambda r: r.positions):
                if left < 0 and call.alone and size_of(call.tracked) > call.kept:
                    call.policy = "recompute"
                    left += 4 * examples * size_of(call.tracked)
        self.policies = {call.tracked.name: call.policy for call in calls}


def _width(tracked: TrackedLayer) -> int:
    """Numbers that go in and come out at one position of a matrix-like layer."""
    weight = next(tracked.module.parameters())
    return int(weight.shape[0] + weight[0].numel())


def per_example_gradients(
    model: nn.Module,
    loss_fn: LossFn,
    inputs: Tensor,
    targets: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    values: Gradients | None = None,
) -> tuple[Gradients, Tensor]:
    """Gradients (examples, *parameter shape) of the trainable parameters, by name, and losses (examples,).

    Args:
        model: called on the K views of one example at a time, (K, …).
        loss_fn: mean loss over the views.
        inputs: (examples, K, …).
        targets: (examples, …).
        autocast: context of forward and backward.
        values: the trainable parameters, by name, where they are not the model's own.
    """
    trainable = values or {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    constant = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad} | dict(model.named_buffers())

    def loss(values: dict[str, Tensor], views: Tensor, target: Tensor) -> Tensor:
        outputs = functional_call(model, (values, constant), (views,))
        return loss_fn(outputs, target.expand(len(views), *target.shape))

    with autocast():
        return vmap(grad_and_value(loss), in_dims=(None, 0, 0))(trainable, inputs, targets)
