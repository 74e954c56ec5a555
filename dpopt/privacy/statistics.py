"""Means and deviations of channels, released once with noise, by which all inputs are standardized.

An example x of C channels adds the mean of each channel, m = (m_1, …, m_C), and of its square, s = (s_1, …, s_C). Each
is clipped to a public bound, ‖m‖ ≤ M and ‖s‖ ≤ S, and Σ(m/M, s/S) is one Gaussian release of all examples: an example
more or less moves it by √2 at most, and its noise is σ√2. In ε it is a Gaussian of noise multiplier σ, sampled at rate
1, before the steps (`PrivacyPlan.statistics_noise`). Standardizing is post-processing. A variance below the noise of
its mean square, σ√2·S/N, says nothing: it is raised to that, so that noise is not taken for a small scale.

Tramèr & Boneh (2011.11660) standardize scattering features so; their bounds are quantiles of the private data, which
are not covered, and a channel whose variance comes out negative is left out.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dpopt.data.datasets import ChannelStatistics
from dpopt.data.sources import TensorSource
from dpopt.privacy.noise import release_grid
from dpopt.privacy.plan import PrivacyPlan

SENSITIVITY = math.sqrt(2)
_ADDED = 1e-5  # to a variance
_AT_ONCE = 512


def check_channels(source: Any) -> None:
    """Refuse a source without channels that could be standardized.

    Raises:
        ValueError: for anything but floating-point features in memory.
    """
    if not isinstance(source, TensorSource) or not source.inputs.is_floating_point() or source.inputs.ndim < 3:
        raise ValueError(
            "statistics of channels are taken of floating-point features (N, C, …) in memory: drop "
            "dataset.statistics, or give a TensorSource of features"
        )


def release_statistics(
    statistics: ChannelStatistics, source: Any, plan: PrivacyPlan
) -> tuple[list[float], list[float]]:
    """Release mean and deviation of each channel, in ε of a plan with `statistics_noise`; exact if σ = 0.

    Args:
        statistics: noise and bounds.
        source: the training examples, floating point (N, C, …), in memory.
        plan: under the key of the run, which the release uses once.

    Raises:
        ValueError: for another source, a plan that does not account for it, or a second release.
    """
    check_channels(source)
    private = plan.noise_multiplier > 0
    if private and plan.statistics_noise != statistics.noise_multiplier:
        raise ValueError(
            f"the plan accounts for statistics of noise multiplier {plan.statistics_noise:g}, not "
            f"{statistics.noise_multiplier:g}: calibrate it with statistics_noise={statistics.noise_multiplier:g}"
        )
    if private and plan.key.secure and plan.key.released[1]:
        raise ValueError(
            "the noise of this plan's statistics was already used, and using it twice would cancel it: calibrate a new "
            "plan for every training"
        )
    plan.key.released[1] = 1
    total = _sum(statistics, source.inputs, clip=private)
    std = SENSITIVITY * statistics.noise_multiplier if private else 0.0
    if private:
        grid = release_grid(std)
        noise = plan.key.normal(len(total), "statistics", 0, dtype=torch.float64)
        total = (total / grid + noise * (std / grid)).round() * grid
    mean, square = (total / plan.dataset_size).chunk(2)
    mean, square = mean * statistics.mean_norm, square * statistics.square_norm
    least = std * statistics.square_norm / plan.dataset_size
    deviation = ((square - mean.square()).clamp(min=least) + _ADDED).sqrt()
    return mean.tolist(), deviation.tolist()


def _sum(statistics: ChannelStatistics, inputs: Tensor, clip: bool) -> Tensor:
    """Add up (m/M, s/S) of all examples: (2C,), float64, on the CPU. What is not finite adds nothing."""
    total = torch.zeros(2 * inputs.shape[1], dtype=torch.float64)
    for piece in inputs.split(_AT_ONCE):
        x = piece.double().flatten(2)
        for part, (values, norm) in enumerate(((x, statistics.mean_norm), (x.square(), statistics.square_norm))):
            rows = values.mean(2) / norm
            rows = rows.masked_fill(~rows.isfinite().all(1, keepdim=True), 0.0)
            rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1.0) if clip else rows
            total.chunk(2)[part].add_(rows.sum(0).cpu())
    return total
