"""Poisson batches: at every step each example enters independently with probability q, so batches differ in size.

A logical batch is handed out in micro-batches of one constant, padded shape under a mask; it is never materialized
whole. An empty batch is one micro-batch of padding: a step like any other. Which examples enter, and how they are
augmented, is keyed by (plan.key, step) and independent of the micro-batch size. Of several ranks each draws the whole
batch and takes its share.

A mechanism that correlates noise over steps wants cyclic Poisson batches: each example belongs to one of so many
groups, by its own coin, and step t samples group t mod `groups` alone, at a rate that keeps the expected size qN.
"""

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dpopt import ranks
from dpopt.data.sources import Source, as_source
from dpopt.privacy.plan import PrivacyPlan

MicroBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class PoissonBatch:
    """One logical batch: iterate over it, once and before the next one is asked for, for (inputs, targets, mask).

    Attributes:
        plan: the plan that sampled it.
        step: its number, from 0.
        indices: the sampled examples, int64 of shape (n,), ascending; their number is private. Of several ranks each
            has its share of them.
        micro_batches: inputs (micro_batch, views, …), targets (micro_batch, …) and mask (micro_batch,), False on pads.
        used: whether it was read or passed over.
        data: fingerprint of the dataset, where there are several ranks to compare it.
        share: which part of it this process has.
        trimmed: whether micro-batches of texts are as long as their longest one.
    """

    plan: PrivacyPlan
    step: int
    indices: torch.Tensor
    micro_batches: Iterator[MicroBatch]
    used: bool = False
    data: str = ""
    share: ranks.Share = ranks.WHOLE
    trimmed: bool = False

    def __iter__(self) -> Iterator[MicroBatch]:
        if self.used:
            raise ValueError(
                f"the batch of step {self.step} was already read or passed over: give each batch to backward once, "
                "before asking poisson_batches for the next"
            )
        self.used = True
        return self.micro_batches


def sample_indices(plan: PrivacyPlan, step: int, examples: int | None = None) -> torch.Tensor:
    """Draw the examples of a step: each, or each of the step's group, independently with the plan's probability.

    Args:
        plan: decides sampler, rate and key.
        step: its number.
        examples: how many there are; by default as many as the plan was made for.
    """
    count = plan.dataset_size if examples is None else examples
    enters = plan.key.uniform(count, "sample", step) < plan.group_rate
    if plan.groups > 1:
        enters &= (plan.key.uniform(count, "group") * plan.groups).floor() == step % plan.groups
    return torch.nonzero(enters).flatten()


def poisson_batches(
    dataset: Any, plan: PrivacyPlan, start: int = 0, views: int = 1, micro_batch: int = 64
) -> Iterator[PoissonBatch]:
    """Yield the plan's batches from step `start` to its last.

    Args:
        dataset: a `dpopt.data.sources.Source`, a pair of tensors (inputs, targets), or a map-style Dataset of pairs.
        plan: decides q, the number of steps and the random key.
        start: the first step to yield; a resumed run passes the number of steps it has taken.
        views: augmentation multiplicity K; the views of an example stay together.
        micro_batch: examples per micro-batch, a performance setting.

    Raises:
        ValueError: when the dataset's public size is not `plan.dataset_size`, or it has no examples.
    """
    source = as_source(dataset)
    if not len(source):
        raise ValueError("the dataset has no examples: give it at least one")
    if source.public_size != plan.dataset_size:
        raise ValueError(
            f"the dataset has {source.public_size:,} examples but the plan was made for {plan.dataset_size:,}: "
            f"calibrate the plan with dataset_size={source.public_size}"
        )
    if ranks.share().world > 1 and "share" not in inspect.signature(source.views).parameters:
        raise ValueError(
            f"{type(source).__name__}.views cannot give each rank its share: add the argument share, as in "
            "dpopt.data.sources.Source, or train in one process"
        )
    return _batches(source, plan, start, views, micro_batch)


def _batches(source: Source, plan: PrivacyPlan, start: int, views: int, micro_batch: int) -> Iterator[PoissonBatch]:
    sampled = ((step, sample_indices(plan, step, len(source))) for step in range(start, plan.steps))
    ours, theirs = itertools.tee(sampled)
    share = ranks.share()
    if share.world == 1:
        data, loaded = "", source.views(theirs, plan.key, views, micro_batch)
    else:
        data, loaded = source.fingerprint("quick"), source.views(theirs, plan.key, views, micro_batch, share)
    for step, drawn in ours:
        indices = share.of(drawn)
        pieces = (_pad(*next(loaded), micro_batch) for _ in indices.split(micro_batch))  # nothing: one empty piece
        trimmed = getattr(source, "trimmed", False)
        batch = PoissonBatch(plan, step, indices, pieces, data=data, share=share, trimmed=trimmed)
        yield batch
        batch.used = True
        for _ in pieces:  # a caller that broke off must not shift the stream for the next step
            pass


def _pad(inputs: torch.Tensor, targets: torch.Tensor, size: int) -> MicroBatch:
    missing = size - len(inputs)
    mask = torch.arange(size, device=inputs.device) < len(inputs)
    if missing:
        inputs = torch.cat([inputs, inputs.new_zeros(missing, *inputs.shape[1:])])
        targets = torch.cat([targets, targets.new_zeros(missing, *targets.shape[1:])])
    return inputs, targets, mask
