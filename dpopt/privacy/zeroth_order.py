"""DP-ZO (Tang et al., 2401.04343): a private step from losses alone, without a backward pass.

With a random direction z ~ N(0, I), which depends on no data, an example's gradient is seen along z only,

    d_i = (f_i(θ + smoothing·z) − f_i(θ − smoothing·z))/(2·smoothing)
    p.grad = z·(Σ clip(d_i) + N(0, σ²S²))/(qN)

What is released is one number per step, a subsampled Gaussian with the sensitivity of the clip rule: ε is that of any
other run. The paper clips the difference of the losses, which is 2·smoothing·d_i: a clip norm here is in units of the
gradient, and holds whatever the smoothing. z is drawn from the plan's key.
"""

from typing import Any

import torch

from dpopt.grad_sample.snapshot import displaced
from dpopt.machine import sent
from dpopt.privacy.bounded import clip_weights, unclipped_count
from dpopt.privacy.clipping import Adaptive
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.privacy.raw_statistics import RawStatistics
from dpopt.privacy.sampling import PoissonBatch


class ZerothOrder(PrivateGradient):
    """`PrivateGradient` from differences of losses.

    Args:
        arguments: of `PrivateGradient`.
        smoothing: how far along z the losses are taken, on either side.
        options: of `PrivateGradient`.

    Raises:
        ValueError: with a clip by layer, a scale or a filter, which one number per example does not have,
            and noise that is correlated over steps.
    """

    takes = "losses"

    def __init__(self, *arguments: Any, smoothing: float = 1e-3, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if not smoothing > 0:
            raise ValueError(f"smoothing={smoothing} must be positive")
        more = getattr(self.clip, "by_layer", False) or getattr(self.clip, "coordinates", 0)
        if self.pre_clip_scale is not None or self.query_points is not None or more:
            raise ValueError(
                "a zeroth-order estimate is one number per example, which has no layers, slack, scale or filter: "
                "choose clipping=flat, filter=none and an optimizer without a scale"
            )
        if self.noise is not None:
            raise ValueError(
                "a zeroth-order estimate has another direction in every step, so noise that is correlated over steps "
                "does not cancel: choose mechanism=gaussian"
            )
        self.smoothing = smoothing

    def _constants(self) -> dict[str, Any]:
        return {}  # the noise lies along z

    @torch.no_grad()
    def _fill(self, batch: PoissonBatch) -> None:
        sensitivity = self._sensitivity()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        reference = parameters[0]
        size = sum(p.numel() for p in parameters)
        draw = sent(self.plan.key.normal(size, "direction", self.step), reference.device)
        pieces = draw.split([p.numel() for p in parameters])
        z = {p: piece.view(p.shape).to(p.dtype) for p, piece in zip(parameters, pieces, strict=True)}
        dtype = torch.float64 if reference.dtype == torch.float64 else torch.float32
        behind = self.canaries.count if self.canaries else 0  # each canary has its own slope
        total = torch.zeros(1 + behind + RawStatistics.ROOM, dtype=dtype, device=reference.device)
        raw = RawStatistics()
        for inputs, targets, mask in batch:
            inputs, targets, mask = (sent(x, reference.device) for x in (inputs, targets, mask))
            inputs = inputs.to(reference.dtype) if inputs.is_floating_point() else inputs
            if self.clip is not None:
                self._validate(inputs, targets, mask, batch.trimmed)
            sides = []
            for sign in (1, -1):
                with displaced({p: sign * self.smoothing * piece for p, piece in z.items()}):
                    sides.append(self.engine.losses(inputs, targets))
            slope = ((sides[0] - sides[1]) / (2 * self.smoothing)).to(dtype)
            norm = slope.abs()
            valid = mask & norm.isfinite()
            weights = mask.to(dtype) if self.clip is None else clip_weights(self.clip, norm, valid, sensitivity)
            total[0] += (weights * slope.masked_fill(~valid, 0.0)).sum()
            if isinstance(self.clip, Adaptive):
                raw.unclipped += unclipped_count(self.clip, norm, mask)
            if self.diagnostics:
                raw.add((sides[0] + sides[1]) / 2, weights < 1 - 1e-6, valid, mask)
        total = self._add_up_ranks(total, raw)
        if self.diagnostics:
            self.statistics = raw.summary({"slope": total[:1]}, self._std(sensitivity))
        self.step_info = self._constants()
        self._release(total, sensitivity)
        self._observe(raw)
        for p in parameters:
            p.grad = z[p] * total[0].to(p.dtype)
