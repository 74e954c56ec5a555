"""From a Poisson batch to `p.grad`: per-example gradients, clip, sum, one draw of noise, division by the public qN.

    p.grad = (Σ_i w(‖g_i‖)·g_i + N(0, σ²S²I)) / (qN),     S = the clip rule's sensitivity

g_i is the gradient of example i's loss, averaged over its K augmented views *before* the clip (De et al., 2204.13650);
`dpopt.privacy.engine` takes it. Norms and sums are fp32 (float64 for a float64 model). An example whose gradient is not
finite contributes zero, as a pad does: it is selected away before any reduction, because 0·NaN is NaN. Everything to
the right of `p.grad` is post-processing.
"""

import torch
from torch import Tensor, nn

from dpopt.plan import PrivacyPlan
from dpopt.privacy.clipping import ClipRule
from dpopt.privacy.engine import Engine, LossFn
from dpopt.privacy.noise import add_noise
from dpopt.privacy.proof import check
from dpopt.privacy.sampling import PoissonBatch


class PrivateGradient:
    """Turns Poisson batches into privatised gradients in `p.grad`.

    Args:
        model: every trainable parameter must have a per-example gradient (no BatchNorm, no active dropout).
        loss_fn: (outputs (K, …), targets (K, …)) → the mean loss, a scalar; `torch.nn.functional.cross_entropy`, say.
        plan: the noise, q, N and the number of steps.
        clip: the clip rule. None is the non-private control: no clipping, allowed only with a plan without noise.
        start: number of steps already taken (a resumed run).
        engine: how per-example gradients are taken, a performance setting: a policy of `Engine` (`auto`, `store`,
            `recompute`, `gram`, `vmap`), or an Engine made for this model.
        precision: `fp32`, or `bf16` for autocast in the forward.
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
        engine: str | Engine = "auto",
    ) -> None:
        if clip is None and plan.noise_multiplier > 0:
            raise ValueError("noise without a clip protects nothing: pass a clip rule, for example clip=Flat(1.0)")
        check_model(model, private=clip is not None)
        self.model, self.loss_fn, self.plan, self.clip = model, loss_fn, plan, clip
        self.step = start
        self.engine = Engine(model, loss_fn, engine, precision=precision) if isinstance(engine, str) else engine
        self.diagnostics = diagnostics
        self.statistics: dict[str, float] = {}

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
        if not self.engine.proved:
            check(self.engine, inputs, targets)
        taken = self.engine.take(inputs, targets)
        valid = mask & taken.norms.isfinite()
        weights = torch.where(valid, self.clip.weight(taken.norms), 0.0)
        taken.add_to(sums, weights)
        if self.diagnostics:
            clipped = weights[valid] * taken.norms[valid] < taken.norms[valid] * (1 - 1e-6)
            raw.add(taken.losses[valid], clipped, int(mask.sum()))

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
        with self.engine.autocast():
            loss = self.loss_fn(self.model(inputs.flatten(0, 1)), targets.repeat_interleave(views, 0))
        gradients = torch.autograd.grad(loss * len(inputs), list(parameters.values()), materialize_grads=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += gradient
        if self.diagnostics:
            count = len(inputs)
            raw.add(loss.detach().expand(count), torch.zeros(count, dtype=torch.bool), count)


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
