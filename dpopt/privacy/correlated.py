"""Noise that is correlated over steps: computed from keyed draws, with a memory that is never stored.

n_t = Σ_i draws_i·z_{t−i} − Σ_{j≥1} feedback_j·n_{t−j}, by the recursion of the plan's mechanism, z_t the standard draws
that independent noise of step t would be. The last noises are kept in the dtype of the sum: 4 bytes per parameter and
band. They would let whoever reads a checkpoint subtract what is to come, so they are in none. A run that resumes at
step t draws z_0 to z_{t−1} once more and comes by the same bits, whatever was lost in between: the memory knows which
step it has reached, and is rebuilt for any other.

Each step's noise is a function of the key and of public numbers alone, so it is the same on all ranks.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dpopt.privacy.mechanisms import INDEPENDENT, impulse
from dpopt.privacy.noise import standard_noise
from dpopt.privacy.plan import PrivacyPlan
from dpopt.rng import RandomKey


class CorrelatedNoise:
    """The noise of one training, in units of σS.

    Args:
        plan: its mechanism and number of steps.

    Attributes:
        reached: the next step that the memory serves.
    """

    def __init__(self, plan: PrivacyPlan) -> None:
        self.draws, self.feedback = plan.mechanism.recursion(plan.steps)
        variances = np.cumsum(np.square(impulse(self.draws, self.feedback, plan.steps)))
        self._deviations = np.sqrt(variances)
        self.reached = 0
        self._past = torch.empty(0, 0)

    def deviation(self, step: int) -> float:
        """Return the standard deviation of a step's noise by itself, in units of σS."""
        return float(self._deviations[min(step, len(self._deviations) - 1)])

    def pieces(self, total: Tensor, key: RandomKey, step: int) -> Iterator[Tensor]:
        """Yield the noise of a step in pieces, which may be overwritten.

        Args:
            total: a vector like the one that the noise is for.
            key: of the run.
            step: number of the logical step.
        """
        like = (len(total), total.dtype, total.device)
        if self.reached != step or (self._past.shape[1], self._past.dtype, self._past.device) != like:
            self._past = total.new_zeros(len(self.feedback), len(total))
            for earlier in range(step if self.feedback else 0):
                for _ in self._advance(total, key, earlier):
                    pass
        self.reached = -1  # until the step is done: what breaks off leaves half a memory
        yield from self._advance(total, key, step)
        self.reached = step + 1

    def _advance(self, total: Tensor, key: RandomKey, step: int) -> Iterator[Tensor]:
        """Yield a step's noise from that of the steps before, and put it in the place of the oldest."""
        begin, kept = 0, len(self.feedback)
        count = min(len(self.draws), step + 1)
        for parts in zip(*(standard_noise(total, key, step - i) for i in range(count)), strict=True):
            noise = parts[0].mul_(self.draws[0])
            for weight, part in zip(self.draws[1:], parts[1:], strict=False):
                noise.add_(part, alpha=weight)
            at = slice(begin, begin + len(noise))
            for j, weight in enumerate(self.feedback[:step], 1):
                noise.sub_(self._past[(step - j) % kept, at], alpha=weight)
            if kept:
                self._past[step % kept, at] = noise
            yield noise
            begin += len(noise)


def make_noise(plan: PrivacyPlan) -> CorrelatedNoise | None:
    """Make the noise of a training; None where it is independent from step to step."""
    return None if plan.mechanism == INDEPENDENT or not plan.noise_multiplier else CorrelatedNoise(plan)
