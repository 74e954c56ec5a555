"""Per-sample gradients of a micro-batch, as their norms and a way to sum them under weights.

    per_sample = sampler(inputs, targets)          # (B, K, …), (B, …) → norms (B,), losses (B,)
    per_sample.add_weighted_sum(sums, weights)        # sums[name] += Σ weights[i]·g_i[name]

g_i is the gradient of example i's mean loss over its K views. The model runs forward as it is, on all views at once,
with detached parameters: the backward yields gradients of activations only, and the summed weight gradient is never
computed. Hooks on the layers, there for the time of one forward, see what goes in and what comes back, and the rule of
the layer (`dpopt.grad_sample.rules`) makes of it one of three things:

    store      the per-sample gradients, summed when the weights are known
    recompute  their norms only, a few examples at a time, and once more for the sum: the same bits; a kernel writes
               none of them to memory (`rules.OnChip`)
    ghost      their norms from inner products of positions, never the gradients; the sum is the ordinary gradient of
               scaled output gradients, and where positions cancel the norms count what rounding may add to it

A parameter that a module holds next to its submodules (a class token, a position embedding, a skip gain) enters the
forward as one copy per view. So does the output of a layer that all examples share (an embedding of positions).

Where the examples lie in the tensors of a layer is verified (`dpopt.grad_sample.layout`): once for every shape of a
batch and every branch that the model takes, or in every batch if the model moves rows by the data. What cannot be told
apart falls back, step by step, and `fallbacks` says how far:

    a rule → the layer under vmap → the layer in a loop over examples → the module around it, likewise → …
           → the whole model under vmap → the whole model in a loop over examples
"""

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpopt.grad_sample.backward import backpropagate
from dpopt.grad_sample.choices import Choices
from dpopt.grad_sample.compiled import compile_sampler
from dpopt.grad_sample.data_flow import Answers, DataFlow
from dpopt.grad_sample.fallback import (
    call_module,
    fails_alone,
    looped_gradients,
    per_example_gradients,
    without_inference_kernels,
)
from dpopt.grad_sample.hooks import BackwardCollector, LayerHooks
from dpopt.grad_sample.layout import Layout, RowProbe, UnsureLayoutError, same_outputs
from dpopt.grad_sample.losses import LossFn, example_losses, per_example_loss
from dpopt.grad_sample.modes import autocast
from dpopt.grad_sample.modules import UnsupportedLayerError, find_layers, has_forward
from dpopt.grad_sample.norms import Gradients
from dpopt.grad_sample.per_sample import LayerCall, PerSampleGradients
from dpopt.grad_sample.policies import choose_policies
from dpopt.grad_sample.rules import BY_VMAP
from dpopt.grad_sample.validated import Validated

__all__ = ["POLICIES", "GradSampler", "LossFn", "per_example_gradients"]
POLICIES = ("auto", "store", "recompute", "ghost", "vmap", "loop")


class GradSampler:
    """Takes per-sample gradients by per-layer rules.

    Args:
        model: checked by `dpopt.grad_sample.model_check.check_model`.
        loss_fn: (outputs (K, …), targets (K, …)) → the mean loss, a scalar.
        policy: `store`, `recompute` or `ghost` wherever a layer can; `vmap` or `loop` for the whole model, without
            rules; `auto` chooses layer by layer.
        memory: bytes that stored gradients may take under `auto`, if recomputing takes less; None for no limit.
        precision: `bf16` for autocast in the forward.
        compiled: compile forward, backward and rules as one graph, recompiled for each batch shape.

    Attributes:
        validated: whether the gradients of two examples have been compared with autograd's.
        validations: the states of the model and shapes of inputs that have passed `dpopt.grad_sample.validate`.
        policies: what is done with the gradients of every layer, once a batch has been taken.
        choices: what was found fastest on this machine, under `auto`.
        measured: whether `auto` may measure what is fastest; False to go by rules of thumb.
        data_dependent: whether the model moves rows by the data, so that every batch is checked.

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
        self.validated = self.data_dependent = False
        self.validations = Validated()
        self.policies: dict[str, str] = {}
        self.choices, self.measured = Choices(), True
        self.bare: dict[str, tuple[int, ...]] = {}
        self._graphs: dict[Any, Callable[..., PerSampleGradients]] = {}
        self._trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self._whole: set[str] = set()
        self._looped: set[str] = set()
        self._expanded: dict[str, str] = {}  # layers whose output all examples share (`LayerHooks`)
        self._trial = ""  # the last of them, while it is not known whether that works
        self._layouts: dict[Any, list[Layout | None]] = {}  # by the shapes of a batch and of its layers' calls
        self._unsure: dict[Any, set[str]] = {}  # parameters whose copies had no gradient in a batch of these shapes
        self._branching = False  # whether branches depend on the data, and nothing else about layouts does
        self._news = self._checked = False  # whether the last batch had new layouts, and left nothing open about them
        self.split_up()

    def split_up(self) -> None:
        """Find the layers with a rule, and the parameters outside of them."""
        rules = self.policy not in ("vmap", "loop")
        self.tracked_layers, bare = find_layers(self.model, self._whole) if rules else ([], {})
        self.bare = {name: self.bare.get(name, shape) for name, shape in bare.items()}

    @property
    def fallbacks(self) -> list[str]:
        """Names of the layers that have no rule, and go through vmap or a loop."""
        if self.policy in ("vmap", "loop"):
            return ["the whole model" if self.policy == "vmap" else "the whole model, example by example"]
        names = [t.name for t in self.tracked_layers if t.rule is BY_VMAP]
        return [f"{n or 'the whole model'}{', example by example' if n in self._looped else ''}" for n in names]

    def __call__(self, inputs: Tensor, targets: Tensor, scale: Gradients | None = None) -> PerSampleGradients:
        """Take per-sample gradients of (B, K, …) inputs and (B, …) targets.

        With a scale, norms are those of scaled gradients (`PerSampleGradients`), and nothing is compiled.

        Raises:
            ValueError: for parameters frozen or unfrozen since, or a model that fails on a single example.
        """
        values = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        if values.keys() != self._trained:
            changed = ", ".join(sorted(values.keys() ^ self._trained)[:3])
            raise ValueError(f"{changed} was frozen, unfrozen or added since: make a new PrivateGradient for the model")
        shapes = (inputs.shape, inputs.dtype, targets.shape, self.model.training)
        if not self.compiled or scale is not None:
            return self.sample_at(values, inputs, targets, scale)
        if shapes not in self._graphs:
            per_sample = self.sample_at(values, inputs, targets)
            if self.policy == "loop" or self._looped or self.data_dependent or self._branching or not self._checked:
                return per_sample  # a graph has no branches
            traced = functools.partial(self._attempt, scale=None, policy=None)
            self._graphs[shapes] = compile_sampler(traced, self.model, inputs, targets, self._choices(None))
        return self._graphs[shapes](values, inputs, targets)

    def gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Gradients, Tensor]:
        """Take the gradients themselves, (B, *shape) by parameter name, and the losses (B,)."""
        values = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        per_sample = self.sample_at(values, inputs, targets, policy="store")
        return per_sample.gradients(), per_sample.losses

    def losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Compute each example's mean loss over its views, (B,), without gradients."""

        def loss(views: Tensor, target: Tensor) -> Tensor:
            return self.loss_fn(self.forward({}, views), target.expand(len(views), *target.shape))

        with self.autocast(), sdpa_kernel(SDPBackend.MATH):  # other kernels of attention have no rule under vmap
            if self.policy == "loop":
                return torch.stack([loss(views, target) for views, target in zip(inputs, targets, strict=True)])
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
        """Take them at parameters that are not the model's own or by another policy, and never compiled.

        Where rules cannot tell the examples apart, the layer is left to vmap or a loop, then the module around it,
        then the model (`fallbacks`).

        Raises:
            ValueError: for a model that fails on a single example, too.
        """
        before = self.policy, set(self._whole), dict(self._expanded)
        while True:
            try:
                per_sample = self._attempt(values, inputs, targets, scale, policy)
                if not self._news or self._choices(policy) is None:
                    return per_sample
                self._news = False  # once more, to measure what is fastest, now that layouts are known
                return self._attempt(values, inputs, targets, scale, policy)
            except UnsupportedLayerError as error:
                self._leave_rule(error)
            except UnsureLayoutError:
                self._layouts.clear()
            except Exception as error:
                if "allocate" in str(error) or isinstance(error, torch.OutOfMemoryError | MemoryError):
                    raise
                if self._trial:
                    self._leave_rule(UnsupportedLayerError(self._trial, "", "expand"))
                elif self.policy != "loop":
                    self.policy = "loop" if self.policy == "vmap" else "vmap"
                else:
                    self.policy, self._whole, self._expanded = before
                    self.split_up()
                    if isinstance(error, ValueError):
                        raise
                    raise fails_alone(error, inputs) from error
            self.split_up()

    def _attempt(
        self, values: Gradients, inputs: Tensor, targets: Tensor, scale: Gradients | None, policy: str | None
    ) -> PerSampleGradients:
        per_sample = PerSampleGradients(len(inputs), scale)
        if self.policy in ("vmap", "loop"):
            take = per_example_gradients if self.policy == "vmap" else looped_gradients
            gradients, losses = take(self.model, self.loss_fn, inputs, targets, self.autocast, values)
            per_sample.store(None, gradients)
            self._checked = True
            return per_sample.finish(losses)
        examples, views = inputs.shape[:2]
        collector = BackwardCollector(per_sample, self._choices(policy))
        copies = {
            name: values[name].view(shape).expand(examples * views, *shape[1:]).requires_grad_()
            for name, shape in self.bare.items()
        }
        root = torch.zeros((), dtype=torch.float32, device=inputs.device, requires_grad=True)
        batch = (inputs.shape, inputs.dtype, self.model.training, self.precision)
        keep = self.data_dependent or batch not in self._layouts
        hooks = LayerHooks(self.tracked_layers, collector, (examples, views), self._expanded, root, keep)
        # A checkpointed layer would run again in the backward pass, with other parameters.
        unsaved = torch.autograd.graph.disable_saved_tensors_hooks("checkpoints need a loop over examples")
        answers = Answers()
        with unsaved, hooks, torch.enable_grad(), self.autocast():
            with answers if self._branching else nullcontext():
                outputs = self.forward({**values, **copies}, inputs.flatten(0, 1))
            losses = example_losses(self.loss_fn, outputs, targets, views)
        calls = hooks.calls
        key = (batch, *answers.values, *(call.signature() for call in calls))
        if key in self._layouts and not self.data_dependent:
            for call, layout in zip(calls, self._layouts[key], strict=True):
                call.layout = layout
            unsure = self._unsure.get(key, set())
        elif not keep:  # another sequence of calls than for the last batch of these shapes
            del self._layouts[batch]
            return self._attempt(values, inputs, targets, scale, policy)
        else:
            collector.probe = RowProbe(examples, examples * views, losses.detach(), self.precision == "bf16")
            if key not in self._layouts:
                self._follow(values, inputs, outputs, calls)
            for call, hint in zip(calls, self._layouts.get(key, [None] * len(calls)), strict=True):
                call.hint = hint
            unsure = set()
        settled = {} if self.measured else self.policies  # of a twin
        options = (policy or self.policy, self.memory, self._choices(policy), settled, scale is not None)
        choose_policies(calls, examples, *options)
        self.policies = {call.tracked.name: call.policy for call in calls}
        backpropagate(collector, losses, root, copies, values, unsure)
        if collector.probe is not None:
            self._record(batch, key, calls, unsure)
        return per_sample.finish(losses.detach())

    def _follow(self, values: Gradients, inputs: Tensor, outputs: Any, calls: list[LayerCall]) -> None:
        """Check a forward pass against the model as it is, and follow the data through it."""
        called = {call.tracked for call in calls}
        for tracked in self.tracked_layers:
            if tracked not in called:
                raise UnsupportedLayerError(tracked.name, "has parameters but is not called")
        views = inputs.flatten(0, 1).clone()
        flow = DataFlow(views, {t.name: t.module for t in self.tracked_layers})
        with flow, torch.enable_grad(), self.autocast():
            plain = self.forward(values, views)
        self.data_dependent |= flow.moves_rows
        if flow.answers and not flow.moves_rows and not self._branching:
            self._branching = True
            raise UnsureLayoutError  # once more, with the answers
        if flow.used_outside:
            raise UnsupportedLayerError(flow.used_outside, "has a parameter that is used outside of the layer")
        if (self.bare or self._expanded) and not same_outputs(outputs, plain, self.precision == "bf16"):
            raise RuntimeError("a parameter or an output with a copy for every view changes what the model returns")

    def _record(self, batch: Any, key: Any, calls: list[LayerCall], unsure: set[str]) -> None:
        """Remember the layouts of a batch."""
        layouts = [call.layout for call in calls]
        self._looped |= {call.tracked.name for call in calls if call.layout is not None and call.layout.looped}
        self._checked = not unsure and all(layout is None or layout.sure for layout in layouts)
        self._layouts[batch], self._layouts[key], self._unsure[key] = [], layouts, unsure
        self._trial, self._news = "", self._checked and not self.data_dependent

    def _choices(self, policy: str | None) -> Choices | None:
        return self.choices if self.measured and (policy or self.policy) == "auto" else None

    def _leave_rule(self, error: UnsupportedLayerError) -> None:
        """Take the step that an error asks for."""
        name = error.name
        following = {"": "lead", "lead": "new"}.get(self._expanded.pop(name, ""))
        if error.step == "expand" and following is not None:
            self._expanded[name], self._trial = following, name
            return
        self._trial = ""
        if error.step == "whole" and name and name not in self._whole:
            self._whole.add(name)
        else:
            self.keep_whole(name)

    def forward(self, values: Gradients, inputs: Tensor) -> Any:
        """Call the model on views (N, …) with these parameters; changes to its buffers are discarded."""
        with without_inference_kernels():
            return call_module(self.model, values, (inputs,))

    def keep_whole(self, name: str) -> None:
        """Leave the module that contains a layer or parameter in one piece, without rules."""
        parent = name.rpartition(".")[0]
        while parent and not has_forward(self.model.get_submodule(parent)):
            parent = parent.rpartition(".")[0]
        if parent:
            self._whole.add(parent)
        else:
            self.policy = "vmap"
        self.split_up()

    def twin(self, model: nn.Module, loss_fn: LossFn, precision: str = "fp32") -> "GradSampler":
        """Make a sampler of the model or a copy of it, with the same choices; it measures nothing."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, dict | set):
                setattr(other, name, copy.copy(value))
        other.model, other.loss_fn, other.precision, other.measured = model, loss_fn, precision, False
        other._graphs, other._layouts, other._unsure = {}, {}, {}
        other.split_up()
        return other

    def adopt(self, other: "GradSampler") -> None:
        """Take over what a twin found: what goes without rules, and shapes of copies."""
        self.policy, self._whole, self._expanded = other.policy, set(other._whole), dict(other._expanded)
        self.split_up()
        self.bare = dict(other.bare)
        self.data_dependent |= other.data_dependent
        for known in (self._graphs, self._layouts, self._unsure):
            known.clear()

    def autocast(self) -> AbstractContextManager[Any]:
        """Make the context of forward passes."""
        return autocast(self.model, self.precision)
