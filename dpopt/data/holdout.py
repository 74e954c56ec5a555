"""The hold-out: examples of the training set that are not trained on, chosen without a look at the others.

A split by position permutes all examples, so that removing one moves others to the other side: what is trained on then
depends on an example that is not in it, and on each example through more than itself. `split_holdout` therefore tosses
a coin for each example, keyed by the seed and the example's content. An example's side depends on nothing else, equal
examples and all records of a group fall on one side, and the numbers of examples that plans, accountants and divisors
use are the public ones, N − round(hN) and round(hN), whatever the coins give.
"""

import hashlib
from typing import Literal

import torch
from torch import Tensor

from dpopt.data.datasets import DataSpec
from dpopt.data.sources import Source
from dpopt.rng import RandomKey

By = Literal["content", "position"]


def check_holdout(spec: DataSpec, by: str) -> None:
    """Check that one record decides about no other's side in a private run.

    Raises:
        ValueError: for records that are grouped by what other records hold.
    """
    if spec.related and by == "content":
        raise ValueError(
            f"the records of {spec.name} are grouped by what others hold, so the side of one would depend on others: "
            "set holdout=0, or holdout_by=position, which leaves relatives on both sides"
        )


def split_holdout(source: Source, fraction: float, seed: int, by: str = "content") -> tuple[Source, Source | None]:
    """Split a source into examples to train on and examples held out.

    Args:
        source: all examples.
        fraction: h, the probability that an example is held out, or the fraction of a split by position.
        seed: of the coins, or of the permutation.
        by: `content`, a coin per example; `position`, exactly round(hN) examples of a permutation, as papers split.

    Returns:
        What is trained on, of public size N − round(hN), and what is held out; None for a fraction of 0.

    Raises:
        ValueError: when one of the sides has no example.
    """
    if by not in ("content", "position"):
        raise ValueError(f"holdout_by={by} must be content or position")
    size = source.public_size
    held = round(fraction * size)
    if not (fraction if by == "content" else held):
        return source, None
    if by == "position":
        order = torch.argsort(RandomKey.from_seed(seed).uniform(len(source), "split"))
        out = torch.zeros(len(source), dtype=torch.bool)
        out[order[:held]] = True
    else:
        out = _coins(source.contents(), fraction, seed)
    if not 0 < int(out.sum()) < len(out):
        side = "train on" if out.any() else "hold out"
        raise ValueError(f"holdout={fraction:g} of {size:,} examples leaves none to {side}: choose another fraction")
    kept = source.subset(torch.nonzero(~out).flatten(), public_size=size - held)
    return kept, source.subset(torch.nonzero(out).flatten(), public_size=held)


def _coins(contents: list[bytes], fraction: float, seed: int) -> Tensor:
    """Toss a coin of 53 bits per content; equal contents agree."""
    key = RandomKey.from_seed(seed).derive("holdout").material
    tosses = (hashlib.blake2b(content, key=key, digest_size=8).digest() for content in contents)
    return torch.tensor([(int.from_bytes(toss, "little") >> 11) * 2.0**-53 < fraction for toss in tosses])
