"""Wrong versions of the library, and exact checks of small problems, for scripts/audit_mutants.py and its tests.

A wrong version is a function that patches names of dpopt's modules through `put(target, attribute, value)`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpopt
from dpopt.privacy import canaries, noise, private_gradient, sampling, zeroth_order
from dpopt.privacy.canaries import DISTINCT, REPLAY, Canaries
from dpopt.privacy.clipping import Flat
from dpopt.privacy.plan import PrivacyPlan
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.privacy.sampling import PoissonBatch
from dpopt.rng import RandomKey

EMPTY, VIEWS, PIECES = "an empty batch is a noisy step", "views are averaged before the clip", "micro-batches are alike"
Patch = Callable[[Any, str, Any], None]


def half_the_noise(put: Patch) -> None:
    """Add noise of σ/2."""
    put(private_gradient, "add_noise", lambda total, std, *rest: noise.add_noise(total, std / 2, *rest))


def no_noise(put: Patch) -> None:
    """Add no noise."""
    put(private_gradient, "add_noise", lambda total, std, *rest: noise.add_noise(total, 0.0, *rest))


def no_clip(put: Patch) -> None:
    """Sum gradients as they are."""
    for module in (private_gradient, zeroth_order):
        put(module, "clip_weights", lambda clip, norms, present, bound: present.to(norms))


def half_the_rate_accounted(put: Patch) -> None:
    """Sample at twice the rate that the accountant knows."""

    def sample(plan: PrivacyPlan, step: int, examples: int | None = None) -> Tensor:
        draws = plan.key.uniform(examples or plan.dataset_size, "sample", step)
        return torch.nonzero(draws < 2 * plan.sample_rate).flatten()

    put(sampling, "sample_indices", sample)
    put(canaries, "sample_indices", sample)


def bf16_noise(put: Patch) -> None:
    """Draw the noise with eight bits."""
    real = RandomKey.gaussians
    put(RandomKey, "gaussians", lambda *a, **o: (piece.bfloat16().to(piece) for piece in real(*a, **o)))


def realized_divisor(put: Patch) -> None:
    """Divide by the number of examples in the batch, which is private."""
    real = PrivateGradient.backward
    size = [1]

    def backward(self: PrivateGradient, batch: PoissonBatch) -> None:
        size[0] = max(1, len(batch.indices))
        real(self, batch)

    put(PrivateGradient, "backward", backward)
    put(private_gradient, "add_noise", lambda total, std, _, *rest: noise.add_noise(total, std, size[0], *rest))


def empty_step_skipped(put: Patch) -> None:
    """Release nothing when the batch is empty, which tells that it was."""
    real = PrivateGradient.backward

    def backward(self: PrivateGradient, batch: PoissonBatch) -> None:
        if len(batch.indices):
            real(self, batch)
        else:
            self.step += 1

    put(PrivateGradient, "backward", backward)


def noise_per_micro_batch(put: Patch) -> None:
    """Add noise to the sum of every micro-batch."""
    real = PrivateGradient._add_clipped

    def add(self: PrivateGradient, sums: dict[str, Tensor], *rest: Any) -> None:
        real(self, sums, *rest)
        for total in sums.values():
            total += torch.randn_like(total) * self.plan.noise_multiplier * rest[2]

    put(PrivateGradient, "_add_clipped", add)


def views_clipped_apart(put: Patch) -> None:
    """Clip every view of an example instead of their mean."""
    take, add = PrivateGradient._per_sample_gradients, PrivateGradient._add_clipped

    def taken(self: PrivateGradient, inputs: Tensor, targets: Tensor, *rest: Any) -> Any:
        return take(self, inputs.flatten(0, 1).unsqueeze(1), targets.repeat_interleave(inputs.shape[1]), *rest)

    def added(self: PrivateGradient, sums: Any, per_sample: Any, mask: Tensor, *rest: Any) -> None:
        add(self, sums, per_sample, mask.repeat_interleave(per_sample.examples // len(mask)), *rest)

    put(PrivateGradient, "_per_sample_gradients", taken)
    put(PrivateGradient, "_add_clipped", added)


# By wrong version: what must refute it, the GDP bound or a check.
GDP = "GDP bound"
MUTANTS: dict[Callable[[Patch], None], str] = {
    half_the_noise: GDP,
    no_noise: GDP,
    no_clip: GDP,
    half_the_rate_accounted: GDP,
    bf16_noise: DISTINCT,
    realized_divisor: REPLAY,
    empty_step_skipped: EMPTY,
    noise_per_micro_batch: PIECES,
    views_clipped_apart: VIEWS,
}


# Exact checks of small problems, which an audited run cannot make.


def small_checks() -> dict[str, bool]:
    """Check empty batches, views and micro-batches on a small model."""
    return {EMPTY: _empty_batches_are_steps(), VIEWS: _views_are_averaged(), PIECES: _micro_batches_are_alike()}


def _small(sigma: float, batch_size: int, clip_norm: float = 1.0) -> tuple[nn.Module, PrivateGradient]:
    model = nn.Linear(5, 3)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    plan = PrivacyPlan(sigma, 64, batch_size, 40, 1e-3, key=RandomKey.from_seed(0, "audit"))
    return model, PrivateGradient(model, F.cross_entropy, plan, Flat(clip_norm), canaries=Canaries(64))


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 5, generator=generator), torch.arange(64) % 3


def _empty_batches_are_steps() -> bool:
    """Tell whether every step is released, at about one example per batch."""
    _, private = _small(1.0, 1)
    sizes = []
    for batch in dpopt.poisson_batches(_data(), private.plan, micro_batch=8):
        sizes.append(len(batch.indices))
        private.backward(batch)
    assert private.canaries is not None
    return 0 in sizes and private.canaries.steps == len(sizes)


def _views_are_averaged() -> bool:
    """Tell whether an example with eight equal views adds no more than the sensitivity."""
    model, private = _small(0.0, 16, 0.01)
    inputs, targets = _data()
    views, mask = inputs[:1, None].repeat(1, 8, 1), torch.ones(1, dtype=torch.bool)
    private.backward(PoissonBatch(private.plan, 0, torch.zeros(1), iter([(views, targets[:1], mask)])))
    added = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) * private.plan.batch_size
    return float(added.norm()) <= 0.01 * (1 + 1e-4)


def _micro_batches_are_alike() -> bool:
    """Tell whether micro-batches of 2 and of 16 release the same, to two cells of the grid."""
    released = []
    for size in (2, 16):
        model, private = _small(1.0, 16)
        private.backward(next(iter(dpopt.poisson_batches(_data(), private.plan, micro_batch=size))))
        released.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    cell = noise.release_grid(1.0) / private.plan.batch_size
    return float((released[0] - released[1]).abs().max()) <= 2 * cell
