"""Private least squares: a linear layer on fixed features, in one step, from noisy sufficient statistics.

Of every example with features x (a last 1 for the bias) and one-hot target y, centered to y − 1/classes,

    v_i = (xxᵀ, xyᵀ),     A = (Σ w(‖v_i‖)·xxᵀ + E)/N,     B = (Σ w(‖v_i‖)·xyᵀ + F)/N

are released together by one Gaussian mechanism, w the weight of the clip rule: an example that is too long counts for
less. xxᵀ enters as its diagonal and √2 times what lies above it, so that ‖v_i‖² = ‖x‖⁴ + ‖x‖²‖y‖² and the noise of A is
symmetric. Its eigenvalues are raised to the size of the noise, and A·θ = B is solved: `p.grad = θ_now − θ`, so that one
step of SGD with learning rate 1 arrives. The idea is old (Vu & Slavković 2009, Dwork et al. 2014, "Analyze Gauss").
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from dpopt.machine import sent
from dpopt.privacy.adaptive import Adaptive
from dpopt.privacy.bounded import clip_weights
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.privacy.raw_statistics import RawStatistics
from dpopt.privacy.sampling import PoissonBatch

_LEAST = 1e-9  # of the largest eigenvalue: what is kept of the smallest where there is no noise


class LeastSquares(PrivateGradient):
    """`PrivateGradient` that points from the weights of the last layer to those of least squares.

    Args:
        arguments: of `PrivateGradient`. The loss function is not used.
        eigenvalue_floor: eigenvalues of A are raised to so many times the norm that its noise is expected to have.
        options: of `PrivateGradient`.

    Raises:
        ValueError: for a plan that is not one step on all examples, a model that trains anything but one nn.Linear,
            and a clip by layer, a count, a scale or a filter, which the statistics do not have.
    """

    takes = "features"

    def __init__(self, *arguments: Any, eigenvalue_floor: float = 3.0, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if not eigenvalue_floor >= 0:
            raise ValueError(f"eigenvalue_floor={eigenvalue_floor} must not be negative")
        if self.plan.steps != 1 or self.plan.batch_size != self.plan.dataset_size:
            raise ValueError(
                f"least squares takes all {self.plan.dataset_size:,} examples in one step: set steps=1 epochs=null "
                f"batch_size={self.plan.dataset_size}"
            )
        fixed = getattr(self.clip, "by_layer", False) or isinstance(self.clip, Adaptive)
        if fixed or self.pre_clip_scale is not None or self.query_points is not None:
            raise ValueError(
                "least squares releases one vector of statistics per example, without layers, a count, a scale or a "
                "filter: choose clipping=flat, filter=none and optimizer=dp_sgd"
            )
        trained = [m for m in self.model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
        if len(trained) != 1 or type(trained[0]) is not nn.Linear or not trained[0].weight.requires_grad:
            names = ", ".join(type(m).__name__ for m in trained) or "nothing"
            raise ValueError(f"least squares trains one nn.Linear, the last layer, not {names}: freeze the others")
        self.layer, self.eigenvalue_floor = trained[0], eigenvalue_floor
        self.bias = self.layer.bias is not None and self.layer.bias.requires_grad
        fixed_bias = self.layer.bias is not None and not self.bias and bool((self.layer.bias != 0).any())
        if fixed_bias or not isinstance(self.layer.weight, nn.Parameter):
            raise ValueError("least squares needs a plain weight parameter and no frozen bias: unfreeze it, or drop it")

    def _constants(self) -> dict[str, Any]:
        return {}  # the step is no noisy gradient

    @torch.no_grad()
    def _fill(self, batch: PoissonBatch) -> None:
        sensitivity, device = self._sensitivity(), self.layer.weight.device
        size, classes = self.layer.in_features + self.bias, self.layer.out_features
        moments = torch.zeros(size, size + classes, dtype=torch.float64, device=device)
        raw = RawStatistics()
        for inputs, targets, mask in batch:
            inputs, targets, mask = (sent(x, device) for x in (inputs, targets, mask))
            x, y, known = self._rows(inputs, targets, mask)
            norms = x.norm(dim=1) * (x.square().sum(1) + y.square().sum(1)).sqrt()
            valid = mask & known & norms.isfinite()
            x, norms = x.masked_fill(~valid[:, None], 0.0), norms.masked_fill(~valid, 0.0)
            weights = mask.double() if self.clip is None else clip_weights(self.clip, norms, valid, sensitivity)
            moments += (x * weights[:, None]).mT @ torch.cat([x, y], 1)
            if self.diagnostics:
                raw.add(torch.zeros_like(norms), weights < 1 - 1e-6, valid, mask)
        above = torch.triu_indices(size, size, 1, device=device)
        parts = moments.diagonal(), math.sqrt(2) * moments[above[0], above[1]], moments[:, size:].flatten()
        behind = moments.new_zeros(self.canaries.count if self.canaries else 0)
        total = self._add_up_ranks(torch.cat([*parts, behind, moments.new_zeros(RawStatistics.ROOM)]), raw)
        if self.diagnostics:
            self.statistics = raw.summary({"statistics": total}, self._std(sensitivity))
        self.step_info = self._constants()
        self._release(total, sensitivity)
        self._observe(raw)
        diagonal, upper, cross = total[: len(total) - len(behind)].split([len(part) for part in parts])
        square = torch.zeros(size, size, dtype=total.dtype, device=device)
        square[above[0], above[1]] = upper / math.sqrt(2)
        self._solve(square + square.mT + diagonal.diag(), cross.view(size, classes), sensitivity)

    def _rows(self, inputs: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, d) and centered targets (B, classes), in float64, and which targets are classes (B,).

        Each example goes through the model by itself, under vmap: no row can hold anything of another one.
        """
        if targets.ndim != 1 or targets.is_floating_point() or inputs.shape[1] != 1:
            raise ValueError("least squares wants one class per example, and one view: set views=1")
        weight, classes = self.layer.weight, self.layer.out_features
        inputs = inputs.to(weight.dtype) if inputs.is_floating_point() else inputs
        if self.clip is not None:
            self._validate(inputs, targets, mask)
        try:
            with self.engine.autocast():
                x = vmap(self._features)(inputs).double()
        except RuntimeError as error:
            raise ValueError(
                f"least squares takes features example by example, which this model does not allow ({error}): "
                "choose estimator=gradient"
            ) from error
        x = torch.cat([x, x.new_ones(len(x), 1)], 1) if self.bias else x
        known = (targets >= 0) & (targets < classes)
        return x, F.one_hot(targets.clamp(0, classes - 1), classes).double() - 1 / classes, known

    def _features(self, views: Tensor) -> Tensor:
        """Return what the layer sees of one example (1, …): (d,)."""
        kept: list[Tensor] = []

        def keep(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            kept.extend(x.clone() for x in (*arguments, *keywords.values()))

        handle = self.layer.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            self.engine.forward({}, views)
        finally:
            handle.remove()
        if len(kept) != 1 or kept[0].shape != (1, self.layer.in_features):
            raise ValueError("least squares wants a layer that sees each example once, as one row of features")
        return kept[0][0]

    def _solve(self, a: Tensor, b: Tensor, sensitivity: float) -> None:
        """Set `p.grad` to what leads from the parameters to the solution."""
        # A symmetric matrix whose diagonal has deviation s, the rest s/√2, has a norm of about s·√(2d).
        noise = self._std(sensitivity) / self.plan.batch_size * math.sqrt(2 * len(a))
        values, vectors = torch.linalg.eigh(a)
        values = values.clamp(min=max(self.eigenvalue_floor * noise, _LEAST * float(values[-1]), 1e-300))
        solution = (vectors @ ((vectors.mT @ b) / values[:, None])).mT
        weight = self.layer.weight
        weight.grad = weight - solution[:, : self.layer.in_features].to(weight.dtype)
        if self.bias:
            self.layer.bias.grad = self.layer.bias - solution[:, -1].to(weight.dtype)
