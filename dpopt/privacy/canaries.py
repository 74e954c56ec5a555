"""Canaries: made-up examples that show, from the released gradients alone, how much a run tells of an example.

m canaries are m coordinates behind the model's in the vector that is released. A fair coin, keyed, decides whether a
canary belongs to the dataset. One that does enters each batch through the sampler, by the draw behind those of the
data; its gradient lies along its own coordinate, is far longer than the clip norm, and is clipped, summed, noised and
divided as any other. Canaries are orthogonal to each other and to the model, whose coordinates, sampling, clip norm
and noise stay as they are to the bit: an adaptive clip rule does not count them.

The score of a canary is the sum of the log-likelihood ratios of its released coordinates x_t, in units of what it adds,

    Σ_t log(1 − q + q·exp((x_t − ½)s²/σ²)),     s the length of its clipped gradient over the sensitivity S_t,

the best score there is. s is 1, but under a clip by layer a canary is one of L layers, and s = 1/√L. In a zeroth-order
estimate a canary is another slope, next to the slope that is released.

What was released is also compared with the key, exactly: see `CHECKS`.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpopt.grad_sample.norms import Gradients
from dpopt.grad_sample.per_sample import PerSampleGradients
from dpopt.privacy.audit import ALPHA, AuditResult, audit, log_likelihood_ratio
from dpopt.privacy.noise import release_grid
from dpopt.privacy.plan import PrivacyPlan
from dpopt.privacy.sampling import sample_indices

REPLAY, DISTINCT = "the key replays the release", "as many distinct values as the noise has"
STEPS, CLIPPED = "every step is released", "no clipped norm exceeds the sensitivity"
CHECKS = (REPLAY, DISTINCT, STEPS, CLIPPED)
_LENGTH = 1000.0  # of a canary's gradient, over the sensitivity
_TOGETHER = 64  # canaries whose gradients are held at once
_CELLS = 2.0  # of the grid: Gaussian draws of a GPU differ from a CPU's in the last bits
_COUNTED = 4  # steps in which distinct values are counted


class Canaries:
    """Canaries of one run, for `PrivateGradient(canaries=…)`.

    Args:
        count: m.

    Attributes:
        scores: (m,), of the steps so far, float64.
        signal: s, length of a canary's clipped gradient over the sensitivity.
        steps: number of releases seen.

    Raises:
        ValueError: for fewer than 16 canaries, which show nothing.
    """

    def __init__(self, count: int) -> None:
        if count < 16:
            raise ValueError(f"{count} canaries show nothing: take at least 16, better 1,000 or more")
        self.count = count
        self.scores = torch.zeros(count, dtype=torch.float64)
        self.signal, self.steps = 1.0, 0
        self._off, self._distinct, self._longest = 0.0, 1.0, 0.0
        self._entered = torch.empty(0, dtype=torch.int64)

    def included(self, plan: PrivacyPlan) -> Tensor:
        """Toss the coins: whether each canary belongs to the dataset, (m,)."""
        return plan.key.uniform(self.count, "canaries") < 0.5

    def sample(self, plan: PrivacyPlan, step: int) -> Tensor:
        """Draw the canaries of a step: numbers, ascending, of included canaries that enter the batch."""
        drawn = sample_indices(plan, step, plan.dataset_size + self.count)
        numbers = drawn[drawn >= plan.dataset_size] - plan.dataset_size
        return numbers[self.included(plan)[numbers]]

    def add_to(self, total: Tensor, private: Any, sensitivity: float) -> None:
        """Clip the canaries of this step and add them to the sum, as `private` does with examples.

        Args:
            total: (d + m,), the vector that is released; its last m coordinates are the canaries'.
            private: the `PrivateGradient`.
            sensitivity: S of this step.
        """
        tail = total[len(total) - self.count :]
        parameters = dict(private.model.named_parameters())
        owners = {name.rpartition(".")[0] for name, p in parameters.items() if p.requires_grad}
        layers = len(owners) if getattr(private.clip, "by_layer", False) else 1
        self.signal = layers**-0.5
        self._entered = self.sample(private.plan, private.step)
        for numbers in self._entered.split(_TOGETHER):
            if len(numbers):
                sums, per_sample = _gradients(tail, numbers, _LENGTH * sensitivity, layers)
                private.add_canaries(sums, per_sample, sensitivity)
        self._longest = max(self._longest, float(tail.abs().max()) / sensitivity)

    def observe(self, total: Tensor, plan: PrivacyPlan, step: int, sensitivity: float) -> None:
        """Score the released coordinates, and compare them with the key.

        Args:
            total: (d + m,), as released.
            plan: the plan.
            step: number of the logical step.
            sensitivity: S of this step.
        """
        released = total[len(total) - self.count :].double().cpu() * plan.batch_size
        sigma, q, signal = plan.gradient_noise_multiplier, plan.sample_rate, self.signal
        units = (released / (signal * sensitivity)).numpy()  # 1 is what a canary adds
        self.scores += torch.from_numpy(log_likelihood_ratio(units, sigma / signal, q))
        if sigma:
            self._compare(released, sigma * sensitivity, plan, step, total)
        self.steps += 1

    def _compare(self, released: Tensor, std: float, plan: PrivacyPlan, step: int, total: Tensor) -> None:
        """Compare coordinates that got nothing but noise with the noise of the key."""
        grid, start = release_grid(std), len(total) - self.count
        noise = plan.key.normal(self.count, "noise", step, start=start, dtype=total.dtype).double()
        silent = torch.ones(self.count, dtype=torch.bool)
        silent[self._entered] = False
        off = (released - (noise * (std / grid)).round() * grid)[silent].abs() / grid
        self._off = max(self._off, float(off.max()) if len(off) else 0.0)
        if self.steps < _COUNTED:
            ideal = np.random.default_rng(step).normal(scale=std / grid, size=int(silent.sum())).round()
            found = len((released[silent] / grid).unique())
            self._distinct = min(self._distinct, found / max(len(np.unique(ideal)), 1))

    def checks(self, steps: int) -> dict[str, bool]:
        """Tell which exact checks hold after so many steps of the run."""
        clipped = self._longest <= self.signal * (1 + 1e-5)
        held = (self._off <= _CELLS, self._distinct >= 0.9, self.steps == steps, clipped)
        return dict(zip(CHECKS, held, strict=True))

    def audit(self, plan: PrivacyPlan, alpha: float = ALPHA) -> AuditResult:
        """Bound ε from the scores, after the last step of the plan."""
        included = self.included(plan).numpy()
        return audit(self.scores.numpy(), included, plan, alpha, self.signal, self.checks(plan.steps))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        kept = {"off": self._off, "distinct": self._distinct, "longest": self._longest}
        return {"scores": self.scores.clone(), "signal": self.signal, "steps": self.steps, **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it.

        Raises:
            ValueError: for another number of canaries.
        """
        if len(state["scores"]) != self.count:
            raise ValueError(f"the checkpoint has {len(state['scores'])} canaries, not {self.count}")
        self.scores, self.signal, self.steps = state["scores"].clone(), float(state["signal"]), int(state["steps"])
        self._off, self._distinct, self._longest = (float(state[name]) for name in ("off", "distinct", "longest"))


def _gradients(tail: Tensor, numbers: Tensor, length: float, layers: int) -> tuple[Gradients, PerSampleGradients]:
    """Make gradients of canaries, in one of so many layers, and the sums that they belong to.

    Of the coordinates only those between the first and the last canary are spanned.
    """
    first, last = int(numbers[0]), int(numbers[-1]) + 1
    rows = torch.zeros(len(numbers), last - first, dtype=tail.dtype, device=tail.device)
    rows[torch.arange(len(numbers)), numbers - first] = length
    per_sample, sums = PerSampleGradients(len(numbers)), {"canaries.gradient": tail[first:last]}
    per_sample.store(None, {"canaries.gradient": rows})
    for layer in range(1, layers):  # the model's other layers, in which they have no gradient
        sums[f"layer{layer}.gradient"] = tail[:0]
        per_sample.store(None, {f"layer{layer}.gradient": rows[:, :0]})
    return sums, per_sample.finish(rows.sum(1))
