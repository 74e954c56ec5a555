"""Ranks: the processes of a `torch.distributed` group that train one model together; one process is rank 0 of 1.

From the key every rank derives the same global batch and the same noise. It takes the gradients of its share, and the
ranks add up their sums once per step. How many ranks there are changes no released value, but for rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dpopt.rng import RandomKey

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Every world-th example of a batch, from the rank's on.

    Attributes:
        rank: of this process.
        world: number of ranks.
    """

    rank: int = 0
    world: int = 1

    def of(self, rows: Tensor) -> Tensor:
        """Select this rank's rows."""
        return rows[self.rank :: self.world]


WHOLE = Share()


def share() -> Share:
    """Look up this process's share."""
    if not (dist.is_available() and dist.is_initialized()):
        return WHOLE
    return Share(dist.get_rank(), dist.get_world_size())


def is_first() -> bool:
    """Tell whether this process is rank 0, which owns files and console."""
    return share().rank == 0


def add_up(row: Tensor) -> None:
    """Replace a tensor by its sum over all ranks, the same bits on each."""
    dist.all_reduce(row)


def from_first(make: Callable[[], T]) -> T:
    """Return what `make` returns on rank 0, where alone it is called."""
    if share().world == 1:
        return make()
    values: list[Any] = [make() if is_first() else None]
    dist.broadcast_object_list(values, src=0, device=_device())
    made: T = values[0]
    return made


def key_of_first(make: Callable[[], RandomKey]) -> RandomKey:
    """Return the secret key that rank 0 makes. The group's network must be trusted: sums travel there, too."""
    return make() if share().world == 1 else RandomKey(from_first(lambda: make().material), secure=True)


def first_difference(items: dict[str, str]) -> tuple[int, str] | None:
    """Find the first item, and the rank, in which a rank differs from rank 0; None where all agree.

    Args:
        items: by name, of this rank; hashes or MACs where a value must not travel.
    """
    if share().world == 1:
        return None
    found: list[Any] = [None] * share().world
    dist.all_gather_object(found, items)
    for name in found[0]:
        for rank, theirs in enumerate(found):
            if theirs.get(name) != found[0][name]:
                return rank, name
    return None


def wait() -> None:
    """Wait until every rank is here."""
    if share().world > 1:
        first_difference({})


def _device() -> torch.device:
    """Return where the group's backend wants tensors."""
    cuda = "nccl" in dist.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
