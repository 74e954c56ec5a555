"""From a Poisson batch to `p.grad`: per-example gradients, clip, sum, one draw of noise, division by the public qN.

    p.grad = (Σ_i w(‖g_i‖)·g_i + σS·n_t) / (qN),     S = the clip rule's sensitivity, n_t the mechanism's noise

g_i is the gradient of example i's loss, averaged over its K augmented views *before* the clip (De et al., 2204.13650);
`dpopt.grad_sample` computes it. Norms and sums are fp32 (float64 for a float64 model). An example whose gradient is
not finite contributes zero, as a pad does: it is selected away before any reduction, because 0·NaN is NaN. Everything
to the right of `p.grad` is post-processing.

Some algorithms reach to the left of it, through four seams:

    pre_clip_scale  s of the optimizer: s∘g_i is clipped, summed, noised, and divided by s again (scale-then-privatize)
    query_points    from a filter: g_i = Σ_j c_j·∇f_i(θ + d_j), clipped as one gradient (DiSK)
    count           of unclipped examples, noised: the clip rule moves the clip norm by it, the plan pays (adaptive)
    slack           what an example leaves of S, in further coordinates behind the gradient: nothing to pay (slack)

and what they need to know of the step flows right, as `step_info`, all of it public or privatized.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dpopt import ranks
from dpopt.grad_sample.engine import GradSampler, LossFn
from dpopt.grad_sample.forward_check import check_padding
from dpopt.grad_sample.losses import ExampleWeighted, example_losses, per_example_loss
from dpopt.grad_sample.model_check import check_model
from dpopt.grad_sample.norms import Gradients
from dpopt.grad_sample.per_sample import PerSampleGradients
from dpopt.grad_sample.snapshot import displaced
from dpopt.grad_sample.validate import covered, validate
from dpopt.machine import sent
from dpopt.privacy.agreement import check_agreement
from dpopt.privacy.bounded import check_clip, clip_weights, join_scales, unclipped_count
from dpopt.privacy.canaries import Canaries
from dpopt.privacy.clipping import Adaptive, ClipRule, Slack
from dpopt.privacy.correlated import make_noise
from dpopt.privacy.noise import add_count_noise, add_noise
from dpopt.privacy.plan import PrivacyPlan
from dpopt.privacy.raw_statistics import RawStatistics
from dpopt.privacy.sampling import PoissonBatch

Point = tuple[float, dict[nn.Parameter, Tensor] | None]  # weight c and displacement d; None for no displacement


class PrivateGradient:
    """Turns Poisson batches into privatized gradients in `p.grad`, which lie in one buffer: the next ones replace them.

    Args:
        model: every trainable parameter must have a per-example gradient (no BatchNorm in train mode, no active
            dropout). It is validated at the first micro-batch, and again when its modes, modules, settings or the shape
            of its inputs change: no example may enter another's outputs, no forward may write what it sees.
        loss_fn: (outputs (K, …), targets (K, …)) → the mean loss, a scalar; `torch.nn.functional.cross_entropy`, say.
            The loss of a batch must be the mean of the losses of its examples. Class weights of
            `nn.CrossEntropyLoss(weight=w)` and `nn.NLLLoss(weight=w)` weight each example: its loss is w[y]·ℓ, the sum
            over its targets divided by the number of those that are not ignored, and no more divided by the weights.
        plan: the noise, q, N and the number of steps.
        clip: the clip rule. None is the non-private control: no clipping, allowed only with a plan without noise.
        start: number of steps already taken (a resumed run).
        engine: how per-example gradients are taken, a performance setting: a policy of `GradSampler` (`auto`, `store`,
            `recompute`, `ghost`, `vmap`, `loop`), or a `GradSampler` made for this model.
        precision: `fp32`, or `bf16` for autocast in the forward.
        diagnostics: keep raw statistics of private data in `statistics` (training loss, clipped fraction,
            signal-to-noise, realized batch size). They are not covered by ε.
        pre_clip_scale: parameter → a positive tensor of its shape, or None for 1, made of privatized gradients only;
            `dpopt.optim.AdamSTP.pre_clip_scale`, say.
        query_points: () → weights and displacements of the points at which gradients are taken, made of privatized
            gradients only; `dpopt.filters.Kalman.query_points`, say.
        canaries: of an audit; they leave the gradient as it is.

    Attributes:
        step_info: of the last step, for optimizers and schedules: `noise_std`, the standard deviation of the noise in
            each coordinate of `p.grad` (absent where it is not the same for all), `clip_norm`, and `clip_rate`, the
            privatized fraction of clipped examples, under a clip rule that counts them; and `pre_clip_scaled`, whether
            gradients were scaled before the clip.
        wants_to_stop: a wish that ranks agree on. Set it before `backward`; afterwards it is True on all ranks if it
            was on one, and all can stop after the same step.

    Raises:
        TypeError: for a clip that is no clip rule.
        ValueError: for a layer whose parameters have no per-example gradient, a model with nothing to train, noise
            without a clip, or a count that the plan does not pay for.
    """

    takes: ClassVar[str] = "gradients"  # of an example; of others it is losses, features, or updates (of a client)

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        plan: PrivacyPlan,
        clip: ClipRule | None,
        start: int = 0,
        precision: str = "fp32",
        diagnostics: bool = False,
        engine: str | GradSampler = "auto",
        pre_clip_scale: Callable[[Tensor], Tensor | None] | None = None,
        query_points: Callable[[], list[Point]] | None = None,
        canaries: Canaries | None = None,
    ) -> None:
        check_clip(plan, clip, canaries is not None)
        check_model(model, private=clip is not None)
        self.model, self.loss_fn, self.plan, self.clip = model, per_example_loss(loss_fn), plan, clip
        self.step, self.noise = start, make_noise(plan)
        if isinstance(engine, str):
            engine = GradSampler(model, self.loss_fn, engine, precision=precision)
        self.engine = engine
        self.diagnostics = diagnostics
        self.pre_clip_scale, self.query_points, self.canaries = pre_clip_scale, query_points, canaries
        self.wants_to_stop, self._agreed, self._kept = False, 1, torch.empty(2, 0)
        self.step_info = self._constants()
        self.statistics: dict[str, float] = {}

    @property
    def noise_std(self) -> float:
        """The standard deviation of this step's noise in every coordinate of `p.grad`: σ·S/(qN), or more."""
        correlated = self.noise.deviation(self.step) if self.noise else 1.0
        return self._std(self._sensitivity()) * correlated / self.plan.batch_size

    def _constants(self) -> dict[str, Any]:
        known: dict[str, Any] = {"pre_clip_scaled": self.pre_clip_scale is not None}
        if self.pre_clip_scale is None and self.query_points is None:
            known["noise_std"] = self.noise_std
        return known

    def _std(self, sensitivity: float) -> float:
        return self.plan.gradient_noise_multiplier * sensitivity

    def backward(self, batch: PoissonBatch) -> None:
        """Fill `p.grad` of every trainable parameter with the privatized mean gradient of the batch.

        Raises:
            TypeError: for anything but a batch of `poisson_batches`.
            ValueError: when the batch was sampled under another plan, repeats or skips a step, or exceeds the plan.
        """
        if not isinstance(batch, PoissonBatch):
            raise TypeError(f"backward takes a batch of dpopt.poisson_batches, not a {type(batch).__name__}")
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
        if batch.share != (share := ranks.share()):
            raise ValueError(
                f"the batch is for rank {batch.share.rank} of {batch.share.world} and this is rank {share.rank} of "
                f"{share.world}: start the process group before poisson_batches, and keep it"
            )
        if share.world > 1 and share.world != self._agreed:
            check_agreement(self, batch.data)
        self._agreed = share.world  # how many ranks have been compared
        self._fill(batch)
        self.step += 1

    def update_param_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Write `step_info` into the parameter groups that have an option of that name.

        Raises:
            ValueError: when an optimizer wants the noise of a gradient whose coordinates have different noise.
        """
        for group in optimizer.param_groups:
            if "noise_std" in group and "noise_std" not in self.step_info:
                raise ValueError(
                    f"{type(optimizer).__name__} corrects for noise that is the same in every coordinate and step, "
                    "which a scale, a filter or a zeroth-order estimate is not: choose another optimizer"
                )
            group.update({name: value for name, value in self.step_info.items() if name in group})

    def _release(self, total: Tensor, sensitivity: float) -> None:
        """Add the noise of this logical step, once, to the sum. From here on the step is spent, whatever fails."""
        self.plan.key.released[0] = self.step + 1
        if self.canaries is not None:
            self.canaries.add_to(total, self, sensitivity)
        pieces = self.noise.pieces if self.noise else None
        add_noise(total, self._std(sensitivity), self.plan.batch_size, self.plan.key, self.step, 0, pieces)
        if self.canaries is not None:
            self.canaries.observe(total, self.plan, self.step, sensitivity)

    def add_canaries(self, sums: Gradients, per_sample: PerSampleGradients, sensitivity: float) -> None:
        """Clip and sum canaries as examples are; an adaptive clip rule does not count them."""
        present = torch.ones(per_sample.examples, dtype=torch.bool, device=per_sample.norms.device)
        self._add_clipped(sums, per_sample, present, sensitivity, RawStatistics())

    def _sensitivity(self) -> float:
        """S of this step, read once: clip and noise must not see two values."""
        return 0.0 if self.clip is None else float(self.clip.sensitivity)

    def _fill(self, batch: PoissonBatch) -> None:
        sensitivity = self._sensitivity()
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        reference = next(iter(parameters.values()))
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters.values()) else torch.float32
        ours, slack = sum(p.numel() for p in parameters.values()), getattr(self.clip, "coordinates", 0)
        size = ours + slack + (self.canaries.count if self.canaries else 0)
        self.model.zero_grad()
        row = self._vectors(size + RawStatistics.ROOM, dtype, reference.device)[0].zero_()
        total = row[:size]
        sums = _split_up(total, parameters)
        scaled = self.pre_clip_scale if self.clip is not None else None
        scale = None if scaled is None else join_scales(scaled, parameters, total)
        by_name = None if scale is None else _split_up(scale, parameters)
        points: list[Point] = self.query_points() if self.query_points is not None else [(1.0, None)]
        raw, left = RawStatistics(), len(batch.indices)
        with displaced(points[0][1] if len(points) == 1 else None):
            for inputs, targets, mask in batch:
                inputs, targets, mask = (sent(x, reference.device) for x in (inputs, targets, mask))
                inputs = inputs.to(reference.dtype) if inputs.is_floating_point() else inputs
                if self.clip is None:
                    few = min(left, len(mask))  # padding comes last; to ask the mask would wait for the device
                    left -= few
                    self._add_plain(sums, inputs[:few], targets[:few], points, raw)
                    continue
                self._validate(inputs, targets, mask, batch.trimmed)
                few = len(inputs) if len(points) == 1 else self._explicit(total)
                for x, y, present in zip(inputs.split(few), targets.split(few), mask.split(few), strict=True):
                    per_sample = self._per_sample_gradients(x, y, by_name, points)
                    self._add_clipped(sums, per_sample, present, sensitivity, raw)
        self.step_info = self._constants()
        total[ours : ours + slack] += raw.slack
        self._add_up_ranks(row, raw)
        if scale is not None:
            total.mul_(scale)
        if self.diagnostics:
            self.statistics = raw.summary(sums, self.noise_std * self.plan.batch_size)
        self._release(total, sensitivity)
        if scale is not None:
            total.div_(scale)
        self._observe(raw, total[ours : ours + slack])
        gradients = _split_up(self._kept[1, :size].copy_(total), parameters)
        for name, parameter in parameters.items():
            grad = gradients[name].to(parameter.dtype)
            # Some fused optimizers want the strides of the parameter.
            parameter.grad = grad if grad.stride() == parameter.stride() else torch.empty_like(parameter).copy_(grad)

    def _add_up_ranks(self, row: Tensor, raw: RawStatistics) -> Tensor:
        """Add up the sums of all ranks, and the statistics behind them; return the sums."""
        if ranks.share().world > 1:
            self.wants_to_stop = raw.add_up_ranks(row, self.wants_to_stop)
        return row[: -RawStatistics.ROOM]

    def _vectors(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(2, size): sums, and what is released of them, so that no gradient ever points to sums without noise.

        Always the same, so that optimizers on a GPU find the gradients where they were.
        """
        if (self._kept.shape[1], self._kept.dtype, self._kept.device) != (size, dtype, device):
            self._kept = torch.empty(2, size, dtype=dtype, device=device)
        return self._kept

    def _explicit(self, total: Tensor) -> int:
        """Count the examples whose gradients at two points, and combination, fit memory."""
        memory = 1 << 30 if self.engine.memory is None else self.engine.memory
        return max(1, memory // (3 * total.element_size() * len(total)))

    def _observe(self, raw: RawStatistics, slack: Tensor | None = None) -> None:
        """Let an adaptive clip rule move the clip norm: by its slack, as released, or by its count, noised here."""
        if self.clip is None:
            return
        self.step_info["clip_norm"] = self.clip.sensitivity
        if not isinstance(self.clip, Adaptive):
            return
        if isinstance(self.clip, Slack):
            assert slack is not None  # estimators without it refuse the rule
            self.clip.observe_shares(slack)
        else:
            std = self.plan.count_noise if self.plan.noise_multiplier > 0 else 0.0
            count = add_count_noise(float(raw.unclipped), std, self.plan.key, self.step)
            self.clip.observe(count, self.plan.batch_size)
        self.step_info["clip_rate"] = self.clip.clip_rate

    def _validate(self, inputs: Tensor, targets: Tensor, mask: Tensor, trimmed: bool = False) -> None:
        """Validate model and loss before the first micro-batch, and after every change."""
        if not covered(self.engine, inputs, self.takes != "losses"):
            validate(self.engine, inputs, targets, mask, self.takes != "losses")
            if trimmed:
                tokens = inputs[:, 0]
                check_padding(self.model, tokens.where(tokens >= 0, tokens[:, :1].clamp(min=0)))

    def _per_sample_gradients(
        self, inputs: Tensor, targets: Tensor, scale: Gradients | None, points: list[Point]
    ) -> PerSampleGradients:
        """Take the per-example gradients of a micro-batch, combined over points."""
        if len(points) == 1:
            return self.engine(inputs, targets, scale)
        combined: Gradients = {}
        for weight, displacement in points:
            with displaced(displacement):
                found, losses = self.engine.gradients(inputs, targets)
            for name, gradient in found.items():
                gradient = gradient * weight
                combined[name] = combined[name] + gradient if name in combined else gradient
        per_sample = PerSampleGradients(len(inputs), scale)
        per_sample.store(None, combined)
        return per_sample.finish(losses)

    def _add_clipped(
        self, sums: Gradients, per_sample: PerSampleGradients, mask: Tensor, sensitivity: float, raw: RawStatistics
    ) -> None:
        assert self.clip is not None
        valid = mask & per_sample.norms.isfinite()
        norms = per_sample.layer_norms if getattr(self.clip, "by_layer", False) else per_sample.norms
        weights = clip_weights(self.clip, norms, valid, sensitivity)
        per_sample.add_weighted_sum(sums, weights)
        if isinstance(self.clip, Slack):
            raw.slack = raw.slack + self.clip.fill(weights * per_sample.norms, valid)
        elif isinstance(self.clip, Adaptive):
            raw.unclipped += unclipped_count(self.clip, per_sample.norms, mask)
        if self.diagnostics:
            raw.add(per_sample.losses, weights.view(len(weights), -1).amin(1) < 1 - 1e-6, valid, mask)

    def _add_plain(
        self, sums: Gradients, inputs: Tensor, targets: Tensor, points: list[Point], raw: RawStatistics
    ) -> None:
        """Add the summed losses' ordinary batched gradient: the non-private control."""
        if len(inputs) == 0:
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        count, views = inputs.shape[:2]
        for weight, displacement in points:
            with displaced(displacement if len(points) > 1 else None):
                with self.engine.autocast():
                    outputs = self.model(inputs.flatten(0, 1))
                    if isinstance(self.loss_fn, ExampleWeighted):
                        loss = example_losses(self.loss_fn, outputs, targets, views).mean()
                    else:
                        loss = self.loss_fn(outputs, targets.repeat_interleave(views, 0))
                gradients = torch.autograd.grad(weight * loss * count, parameters, materialize_grads=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total += gradient
        if self.diagnostics:
            present = torch.ones(count, dtype=torch.bool, device=loss.device)
            raw.add(loss.detach().expand(count), ~present, present, present)


def _split_up(total: Tensor, parameters: dict[str, nn.Parameter]) -> Gradients:
    sizes = [p.numel() for p in parameters.values()]
    parts = total[: sum(sizes)].split(sizes)  # those of canaries are behind
    return {n: part.view(p.shape) for (n, p), part in zip(parameters.items(), parts, strict=True)}
