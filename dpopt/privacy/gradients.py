"""From a Poisson batch to `p.grad`: per-example gradients, clip, sum, one draw of noise, division by the public qN.

    p.grad = (Σ_i w(‖g_i‖)·g_i + N(0, σ²S²I)) / (qN),     S = the clip rule's sensitivity

g_i is the gradient of example i's loss, averaged over its K augmented views *before* the clip (De et al., 2204.13650).
Per-example gradients come from `torch.func.vmap(grad)`. Norms and sums are fp32 (float64 for a float64 model). An
example whose gradient is not finite contributes zero, as a pad does: it is selected away before any reduction, because
0·NaN is NaN. Everything to the right of `p.grad` is post-processing.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from dpopt.plan import PrivacyPlan
from dpopt.privacy.clipping import ClipRule
from dpopt.privacy.noise import add_noise
from dpopt.privacy.sampling import PoissonBatch

# On a CPU, torch adds the squares of a long row one by one in fp32: 25 million equal entries lose 1 % of their norm.
_NORM_BLOCK = 256  # at most 2e-7 is lost, whatever the length; 64 elements would cost half as much time again
LossFn = Callable[[Tensor, Tensor], Tensor]


class PrivateGradient:
    """Turns Poisson batches into privatised gradients in `p.grad`.

    Args:
        model: every trainable parameter must have a per-example gradient (no BatchNorm, no active dropout).
        loss_fn: (outputs (K, …), targets (K, …)) → the mean loss, a scalar; `torch.nn.functional.cross_entropy`, say.
        plan: the noise, q, N and the number of steps.
        clip: the clip rule. None is the non-private control: no clipping, allowed only with a plan without noise.
        start: number of steps already taken (a resumed run).
        precision: `fp32`, or `bf16` for autocast in forward and backward.
        diagnostics: keep raw statistics of private data in `statistics` (training loss, clipped fraction,
            signal-to-noise, realised batch size). They are not covered by ε.

    Raises:
        ValueError: for a layer whose parameters have no per-example gradient, a model with nothing to train, or noise
            without a clip.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        plan: PrivacyPlan,
        clip: ClipRule | None,
        start: int = 0,
        precision: str = "fp32",
        diagnostics: bool = False,
    ) -> None:
        if clip is None and plan.noise_multiplier > 0:
            raise ValueError("noise without a clip protects nothing: pass a clip rule, for example clip=Flat(1.0)")
        check_model(model, private=clip is not None)
        self.model, self.loss_fn, self.plan, self.clip = model, loss_fn, plan, clip
        self.step = start
        self.precision, self.diagnostics = precision, diagnostics
        self.statistics: dict[str, float] = {}
        self._probed = False

    @property
    def noise_std(self) -> float:
        """The standard deviation of the noise in every coordinate of `p.grad`: σ·S/(qN)."""
        return 0.0 if self.clip is None else self.plan.noise_multiplier * self.clip.sensitivity / self.plan.batch_size

    def backward(self, batch: PoissonBatch) -> None:
        """Fill `p.grad` of every trainable parameter with the privatised mean gradient of the batch.

        Raises:
            ValueError: when the batch was sampled under another plan, repeats or skips a step, or exceeds the plan.
        """
        if batch.plan is not self.plan and (batch.plan != self.plan or batch.plan.key != self.plan.key):
            raise ValueError("the batch was sampled under another plan: pass the same plan to poisson_batches")
        if batch.step != self.step:
            raise ValueError(
                f"this is the batch of step {batch.step} where step {self.step} is due: a batch is used exactly once, "
                "in order; after a resume pass the same start= to poisson_batches and PrivateGradient"
            )
        if self.step >= self.plan.steps:
            raise ValueError(f"the plan's {self.plan.steps:,} steps are spent: calibrate a plan with more steps")
        key = self.plan.key
        if key.secure and self.step < key.released[0]:
            raise ValueError(
                "the noise of this step was already used for another model or an earlier try, and using it twice would "
                "cancel it: calibrate a new plan for every training"
            )
        key.released[0] = self.step + 1
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        accumulate = self._accumulate_plain if self.clip is None else self._accumulate_clipped
        reference = next(iter(parameters.values()))
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters.values()) else torch.float32
        total = torch.zeros(sum(p.numel() for p in parameters.values()), dtype=dtype, device=reference.device)
        parts = total.split([p.numel() for p in parameters.values()])
        sums = {n: part.view(p.shape) for (n, p), part in zip(parameters.items(), parts, strict=True)}
        raw = _RawStatistics()
        for inputs, targets, mask in batch:
            inputs = inputs.to(reference.device, reference.dtype if inputs.is_floating_point() else None)
            targets, mask = targets.to(reference.device), mask.to(reference.device)
            accumulate(parameters, sums, inputs, targets, mask, raw)
        if self.diagnostics:
            self.statistics = raw.summary(sums, self.noise_std * self.plan.batch_size)
        # The noise of this logical step, once, on the sum.
        std = 0.0 if self.clip is None else self.plan.noise_multiplier * self.clip.sensitivity
        add_noise(total, std, self.plan.batch_size, self.plan.key, self.step)
        for name, parameter in parameters.items():
            grad = sums[name].to(parameter.dtype)
            # Some fused optimizers want the strides of the parameter.
            parameter.grad = grad if grad.stride() == parameter.stride() else torch.empty_like(parameter).copy_(grad)
        self.step += 1

    def _accumulate_clipped(
        self,
        parameters: dict[str, nn.Parameter],
        sums: dict[str, Tensor],
        inputs: Tensor,
        targets: Tensor,
        mask: Tensor,
        raw: "_RawStatistics",
    ) -> None:
        assert self.clip is not None
        if not self._probed:
            self._probe(parameters, inputs[0], targets[0])
        gradients, losses = per_example_gradients(self.model, self.loss_fn, inputs, targets, self._autocast)
        norms = _norms(gradients)
        valid = mask & norms.isfinite()
        weights = torch.where(valid, self.clip.weight(norms), 0.0)
        for name, gradient in gradients.items():
            column = (-1,) + (1,) * (gradient.ndim - 1)
            # Elementwise, not a matrix product: TF32 or autocast would round it, and the norm could exceed S. The first
            # operation makes a copy: a gradient that is the same for all examples comes as one expanded tensor.
            selected = gradient.to(sums[name].dtype).masked_fill(~valid.view(column), 0.0)
            sums[name] += selected.mul_(weights.view(column)).sum(0)
        if self.diagnostics:
            raw.add(losses[valid], weights[valid] * norms[valid] < norms[valid] * (1 - 1e-6), int(mask.sum()))

    def _accumulate_plain(
        self,
        parameters: dict[str, nn.Parameter],
        sums: dict[str, Tensor],
        inputs: Tensor,
        targets: Tensor,
        mask: Tensor,
        raw: "_RawStatistics",
    ) -> None:
        """The non-private control: the ordinary batched gradient of the summed losses."""
        inputs, targets = inputs[mask], targets[mask]
        if len(inputs) == 0:
            return
        views = inputs.shape[1]
        with self._autocast():
            loss = self.loss_fn(self.model(inputs.flatten(0, 1)), targets.repeat_interleave(views, 0))
        gradients = torch.autograd.grad(loss * len(inputs), list(parameters.values()), materialize_grads=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += gradient
        if self.diagnostics:
            count = len(inputs)
            raw.add(loss.detach().expand(count), torch.zeros(count, dtype=torch.bool), count)

    def _probe(self, parameters: dict[str, nn.Parameter], views: Tensor, target: Tensor) -> None:
        """Refuse parameters that the loss does not depend on: they would be trained on noise alone."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}  # no trace of the example
        with torch.enable_grad(), self._autocast():
            outputs = functional_call(self.model, buffers, (views,))
            loss = self.loss_fn(outputs, target.expand(len(views), *target.shape))
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        unused = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
        if unused:
            raise ValueError(
                f"the loss does not depend on {', '.join(unused)}, so only noise would move them: "
                "freeze them with requires_grad_(False) or remove them from the model"
            )
        self._probed = True

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(next(self.model.parameters()).device.type, dtype=torch.bfloat16)


def per_example_gradients(
    model: nn.Module,
    loss_fn: LossFn,
    inputs: Tensor,
    targets: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients (examples, *parameter shape) of the trainable parameters, by name, and losses (examples,).

    Args:
        model: called on the K views of one example at a time, (K, …).
        loss_fn: mean loss over the views.
        inputs: (examples, K, …).
        targets: (examples, …).
        autocast: context of forward and backward.
    """
    trainable = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    constant = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad} | dict(model.named_buffers())

    def loss(values: dict[str, Tensor], views: Tensor, target: Tensor) -> Tensor:
        outputs = functional_call(model, (values, constant), (views,))
        return loss_fn(outputs, target.expand(len(views), *target.shape))

    with autocast():
        return vmap(grad_and_value(loss), in_dims=(None, 0, 0))(trainable, inputs, targets)


def check_model(model: nn.Module, private: bool) -> None:
    """Refuse a model that cannot be trained as asked.

    Raises:
        ValueError: naming the layer, the reason and the fix.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameter: unfreeze at least its last layer")
    for name, module in model.named_modules():
        kind = type(module).__name__
        if (
            private
            and isinstance(module, nn.modules.batchnorm._NormBase)
            and (isinstance(module, nn.modules.batchnorm._BatchNorm) or module.track_running_stats)
        ):
            covered = ", ".join(f"{name}.{n}" for n, _ in module.named_parameters(recurse=False)) or "its statistics"
            raise ValueError(
                f"layer '{name}' ({kind}) mixes the examples of a batch, so {covered} have no per-example gradient: "
                "replace it by torch.nn.GroupNorm (the model resnet18 shows how), or train with privacy=none"
            )
        rate = getattr(module, "drop_prob", getattr(module, "p", None) if "Dropout" in kind else None)
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            rate = module.dropout
        if module.training and rate:
            raise ValueError(
                f"layer '{name}' ({kind}) draws random numbers that are not keyed by example, so a run could not be "
                "resumed or split into other micro-batches: set its rate to 0"
            )


class _RawStatistics:
    """Sums of private statistics over the micro-batches of one step; kept only for diagnostics."""

    def __init__(self) -> None:
        self.loss, self.clipped, self.count, self.valid = 0.0, 0.0, 0, 0

    def add(self, losses: Tensor, clipped: Tensor, count: int) -> None:
        self.loss += float(losses.double().sum())
        self.clipped += float(clipped.sum())
        self.count += count
        self.valid += len(losses)

    def summary(self, sums: dict[str, Tensor], noise_std: float) -> dict[str, float]:
        dimension = sum(total.numel() for total in sums.values())
        signal = sum(float(total.double().square().sum()) for total in sums.values()) ** 0.5
        return {
            "private/train_loss": self.loss / max(self.valid, 1),
            "private/clipped_fraction": self.clipped / max(self.valid, 1),
            "private/signal_to_noise": signal / (noise_std * dimension**0.5) if noise_std else float("inf"),
            "private/batch_size": float(self.count),
        }


def _sum_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _norms(gradients: dict[str, Tensor]) -> Tensor:
    """Norms over all parameters, (examples,); a finite gradient whose square overflows counts as not finite."""
    blocks = []
    for gradient in gradients.values():
        flat = gradient.reshape(len(gradient), -1).to(_sum_dtype(gradient))
        whole = flat.shape[1] // _NORM_BLOCK * _NORM_BLOCK
        blocks.append(torch.linalg.vector_norm(flat[:, :whole].unflatten(1, (-1, _NORM_BLOCK)), dim=2))
        blocks.append(torch.linalg.vector_norm(flat[:, whole:], dim=1, keepdim=True))
    total = torch.linalg.vector_norm(torch.cat(blocks, dim=1), dim=1, dtype=torch.float64)
    return total.to(blocks[0].dtype)
